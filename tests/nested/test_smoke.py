"""The smallest host boots, and guests run in it under real nested KVM."""

import re
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.nested.machine import BUILT, HostFailed, Machine, booted
from tests.nested.stages import Stages

pytestmark = pytest.mark.kvm

IMAGE = BUILT / "smoke"
BOOT_DEADLINE_S = 90
GUEST_DEADLINE_S = 120
GUESTS = ("tiny", "linux:pc")


@pytest.fixture(scope="module")
def host(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Machine]:
    if not (IMAGE / "initrd.cpio").exists():
        pytest.skip("run ./dev image l1-smoke first")
    guests = " ".join(f"guest={one}" for one in GUESTS)
    options = [
        *("-no-reboot", "-kernel", str(IMAGE / "vmlinuz"), "-initrd", str(IMAGE / "initrd.cpio")),
        *("-append", f"console=ttyS0 quiet panic=-1 {guests}"),
    ]
    with booted(tmp_path_factory.mktemp("smoke"), options, memory_mib=1024) as machine:
        yield machine


def test_a_64_bit_guest_runs_under_kvm_in_a_host_that_runs_in_a_guest(
    host: Machine, stages: Stages
) -> None:
    began = time.monotonic()

    def reached(what: str) -> None:
        stages.note(f"smoke: from the start to {what}", time.monotonic() - began)

    up = host.wait_for("L1-SMOKE up", BOOT_DEADLINE_S)
    reached("a host that is up")
    assert "kvm=yes" in up
    host.wait_for("KVMSEC-TINY up", GUEST_DEADLINE_S)
    reached("the first guest's banner")
    banner = host.wait_for("KVMSEC-LINUX up", GUEST_DEADLINE_S)
    reached("the 64-bit guest's banner")
    assert re.search(r" kernel=\S+-amd64 ", banner)
    host.wait_for("L1-SMOKE done", GUEST_DEADLINE_S)
    reached("its end")


def test_a_host_that_does_not_boot_shows_the_end_of_its_console(tmp_path: Path) -> None:
    options = ["-no-reboot", "-kernel", str(IMAGE / "vmlinuz")]
    options += ["-append", "console=ttyS0 panic=-1"]
    with (
        booted(tmp_path, options, memory_mib=256) as machine,
        pytest.raises(HostFailed, match="Unable to mount root fs"),
    ):
        machine.wait_for("L1-SMOKE up", BOOT_DEADLINE_S)
    assert machine.process.returncode is not None, "it has been ended"
