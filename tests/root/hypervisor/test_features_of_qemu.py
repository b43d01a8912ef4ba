"""The host's own QEMU, asked as somebody who can do nothing."""

import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from hypervisor.errors import NotQemu
from hypervisor.features import DEVICES, find_qemu, probe
from kvmsec.linux.credentials import Credentials
from kvmsec.linux.errors import UntrustedPath

NOBODY = Credentials(230001, 230001)

pytestmark = pytest.mark.kvm


def test_the_hosts_qemu_has_what_our_command_lines_name(tmp_path: Path) -> None:
    found = probe(find_qemu(None, None), credentials=NOBODY, cache=tmp_path / "cache")
    assert found.version >= (7, 0, 0)
    assert found.devices == DEVICES
    assert {"pc", "q35", "microvm"} <= set(found.machines)
    assert "tcg" in found.accelerators
    assert found.sandbox
    assert {"host", "max", "qemu64"} <= set(found.cpus)


@pytest.fixture
def bare_directory() -> Iterator[Path]:
    """A directory of root's that everybody may enter: pytest's own are for root alone."""
    path = Path("/run/kvmsec-standin")
    path.mkdir(mode=0o755)
    yield path
    shutil.rmtree(path)


def standin(directory: Path, script: str) -> Path:
    path = directory / "qemu-system-x86_64"
    path.write_text(f"#!/bin/sh\n{script}\n")
    path.chmod(0o755)
    return path


def test_a_program_that_others_may_change_is_not_even_started(bare_directory: Path) -> None:
    path = standin(bare_directory, "touch /run/kvmsec-standin/started")
    path.chmod(0o777)
    with pytest.raises(UntrustedPath):
        probe(path, credentials=NOBODY)
    path.chmod(0o755)
    os.chown(path, NOBODY.uid, NOBODY.gid)
    with pytest.raises(UntrustedPath):
        probe(path, credentials=NOBODY)
    assert not (bare_directory / "started").exists()


def test_the_program_that_is_asked_can_do_nothing(bare_directory: Path) -> None:
    script = "id -u; id -G; cat /proc/net/dev; grep -E 'Cap(Prm|Eff|Bnd)|NoNew' /proc/self/status"
    with pytest.raises(NotQemu) as caught:
        probe(standin(bare_directory, script), credentials=NOBODY)
    said = caught.value.said
    assert said.startswith(r"230001\n230001\n")
    assert "eth" not in said
    for field in ("CapPrm", "CapEff", "CapBnd"):
        assert rf"{field}:\t0000000000000000" in said
    assert r"NoNewPrivs:\t1" in said


def test_nothing_of_a_program_that_never_answers_is_left(bare_directory: Path) -> None:
    script = "setsid sh -c 'exec sleep 4321' & exec sleep 4321"
    with pytest.raises(NotQemu, match="within"):
        probe(standin(bare_directory, script), credentials=NOBODY, timeout_s=0.3)
    lines = [path.read_bytes() for path in Path("/proc").glob("[0-9]*/cmdline")]
    assert b"sleep\x004321\x00" not in lines
