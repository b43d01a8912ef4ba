"""64-bit Linux guests under real KVM: each kind of machine, disk, network, two that talk."""

import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.kvm.accelerator import runs_64_bit_guests
from tests.kvm.wire import BRIDGE, GUEST, NODE, OTHER_GUEST, PEER, Line, Wire, laid_wire, send_as

pytestmark = pytest.mark.kvm

IMAGES = Path(__file__).parents[2] / "vm-images" / "linux" / ".build"
SECTOR = 512


@pytest.fixture
def wire() -> Iterator[Wire]:
    with laid_wire() as laid:
        yield laid


@pytest.fixture(scope="module")
def linux() -> dict[str, object]:
    """The keys of a machine that boots the Linux guest under KVM, with the host's own CPU."""
    if not (IMAGES / "initrd.cpio.gz").exists():
        pytest.skip("run vm-images/linux/build first")
    if not runs_64_bit_guests(IMAGES):
        pytest.skip("this machine's /dev/kvm runs no 64-bit guests; ./dev test nested does")
    return {
        **{"memory_mib": 128, "accelerator": "kvm", "cpu": "host", "firmware": None},
        **{"kernel": str(IMAGES / "vmlinuz"), "initrd": str(IMAGES / "initrd.cpio.gz")},
        "append": "console=ttyS0 quiet panic=-1",
    }


@pytest.mark.parametrize("machine", ["pc", "q35", "microvm"])
def test_each_kind_of_machine_boots_under_kvm(
    machine: str, make_lab: Callable[..., Any], linux: dict[str, object]
) -> None:
    lab = make_lab()
    info = lab.start(machine=machine, **linux)
    assert info.accelerator == "kvm"
    assert info.uid in lab.pool
    line = Line(lab.paths.instance("web").serial_socket)
    assert line.ask("run uname -m") == "x86_64"
    line.close()
    lab.stop()
    assert not lab.leftovers()


def test_a_guest_has_its_disk_and_its_network_while_its_uid_has_neither(
    wire: Wire, make_lab: Callable[..., Any], linux: dict[str, object]
) -> None:
    lab = make_lab()
    disk = lab.disk()
    with disk.open("r+b") as file:
        file.write(b"SECTOR-000000000".ljust(SECTOR, b"."))
    info = lab.start(nics=[{"bridge": BRIDGE}], disks=[{"path": str(disk)}], **linux)
    line = Line(lab.paths.instance("web").serial_socket)
    assert line.ask("disk read 0").startswith("READ vda 0 SECTOR-000000000 ")
    assert line.ask("disk write 3 from the guest").startswith("WROTE vda 3 ")
    assert disk.read_bytes()[3 * SECTOR :][:14] == b"from the guest"
    assert os.stat(disk).st_uid == 0
    assert f"{GUEST}/24" in line.ask(f"ip {GUEST}/24")
    assert line.ask(f"ping {PEER}") == f"PING {PEER} answered"
    assert send_as(info.uid) == 1, "EPERM"
    assert send_as(246099) is None, "and nobody else is kept from sending"
    assert wire.heard() == (b"from the node", NODE), "the guest's uid sent nothing before"
    line.close()
    lab.stop()
    assert not lab.leftovers()


def test_two_guests_of_two_uids_reach_each_other_over_their_bridge(
    wire: Wire, make_lab: Callable[..., Any], linux: dict[str, object]
) -> None:
    lab = make_lab()
    uids = {lab.start(name, nics=[{"bridge": BRIDGE}], **linux).uid for name in ("web", "db")}
    assert len(uids) == 2
    web, db = (Line(lab.paths.instance(name).serial_socket) for name in ("web", "db"))
    web.ask(f"ip {GUEST}/24")
    db.ask(f"ip {OTHER_GUEST}/24")
    assert web.ask(f"ping {OTHER_GUEST}") == f"PING {OTHER_GUEST} answered"
    assert db.ask(f"ping {GUEST}") == f"PING {GUEST} answered"
    for name, line in (("web", web), ("db", db)):
        line.close()
        lab.stop(name)
    assert not lab.leftovers()
