"""What a QEMU needs at most: above what was measured, and no more than a few times that."""

from pathlib import Path
from typing import Any

import pytest

from hypervisor import footprint
from hypervisor.machine import Backing, Disk, Machine, Nic


def machine(**keys: Any) -> Machine:
    return Machine(name="guest", **keys)


def disks(count: int, **keys: Any) -> tuple[Disk, ...]:
    return tuple(Disk(path=Path(f"/srv/{number}"), **keys) for number in range(count))


def nics(count: int, **keys: Any) -> tuple[Nic, ...]:
    return tuple(Nic(tap=f"tap{number}", **keys) for number in range(count))


MEASURED = [
    # The machine, and the peak of its group in MiB less the guest's memory: QEMU 7.2, Linux 6.18.
    ({"memory_mib": 1}, 17.2),
    ({"memory_mib": 128}, 18.6),
    ({"memory_mib": 1024}, 22.3),
    ({"memory_mib": 4096}, 35.5),
    ({"memory_mib": 8192}, 54.2),
    ({"vcpus": 16}, 20.6),
    ({"vcpus": 64}, 29.6),
    ({"vcpus": 255}, 62.4),
    ({"disks": disks(16)}, 32.4),
    ({"disks": disks(16, format="qcow2")}, 34.2),
    ({"disks": disks(16), "vcpus": 64}, 54.8),
    ({"nics": nics(8)}, 24.7),
    ({"nics": nics(8), "vcpus": 64}, 33.9),
]


@pytest.mark.parametrize(("keys", "peak_mib"), MEASURED)
def test_memory_is_bounded_above_what_was_measured(keys: dict[str, Any], peak_mib: float) -> None:
    guest = machine(**keys)
    overhead_mib = footprint.memory_mib(guest, "kvm", files_bytes=0) - guest.memory_mib
    assert 2.4 * peak_mib <= overhead_mib


def test_what_the_jail_and_emulation_take_is_added() -> None:
    plain = footprint.memory_mib(machine(), "kvm", files_bytes=0)
    assert footprint.memory_mib(machine(), "kvm", files_bytes=(5 << 20) + 1) == plain + 6
    assert footprint.memory_mib(machine(), "tcg", files_bytes=0) == plain + 1024


def test_a_plain_guest_has_no_more_than_a_modest_surplus() -> None:
    guest = machine(memory_mib=1024, vcpus=2, disks=disks(1), nics=nics(1))
    assert footprint.memory_mib(guest, "kvm", files_bytes=0) == 1024 + 64 + 26 + 2 + 16 + 1 + 4


def test_every_image_of_a_chain_has_a_cache() -> None:
    backing = (Backing(Path("/srv/a"), "qcow2"), Backing(Path("/srv/b"), "raw"))
    chained = machine(disks=(Disk(path=Path("/srv/top"), format="qcow2", backing=backing),))
    plain = machine(disks=disks(1))
    kvm = [footprint.memory_mib(one, "kvm", files_bytes=0) for one in (chained, plain)]
    assert kvm[0] - kvm[1] == 2 * 48


def test_threads_are_those_of_vcpus_io_and_vhost() -> None:
    assert footprint.tasks(machine()) == 1 + 64 + 32
    assert footprint.tasks(machine(vcpus=255)) == 255 + 64 + 32
    assert footprint.tasks(machine(disks=disks(16))) == 1 + 64 + 32, "they share one pool"
    assert footprint.tasks(machine(nics=nics(2, vhost=True))) == 1 + 64 + 4 + 32


def test_descriptors_grow_with_the_queues_of_a_large_machine() -> None:
    assert footprint.descriptors(machine()) == 1024
    large = machine(vcpus=255, disks=disks(16), nics=nics(8))
    queues = 255 * 17
    assert footprint.descriptors(large) > 266 + 2 * queues


def test_the_largest_file_is_an_image_or_what_the_jail_itself_writes() -> None:
    assert footprint.largest_file_bytes([], files=[5, 9]) == 9
    assert footprint.largest_file_bytes([100, 7], files=[5]) == 100
    assert footprint.largest_file_bytes([], files=[]) == 0
