"""The rules of a machine's fields, each at its edge."""

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from hypervisor.errors import SpecError
from hypervisor.machine import (
    MAX_BACKING_FILES,
    MAX_DISKS,
    MAX_KERNEL_LINE_BYTES,
    MAX_MEMORY_MIB,
    MAX_NICS,
    MAX_QUOTA,
    MAX_VCPUS,
    Backing,
    Disk,
    Limits,
    Machine,
    Nic,
    mac_address,
)

IMAGE = Path("/srv/image")


def problems_of(make: Callable[[], object]) -> list[str]:
    with pytest.raises(SpecError) as caught:
        make()
    return [str(problem) for problem in caught.value.problems]


@pytest.mark.parametrize("name", ["a", "0", "web1", "a.b-c", "a" * 63, "a-", "a..b"])
def test_a_name_within_the_pattern_is_taken(name: str) -> None:
    assert Machine(name=name).name == name


@pytest.mark.parametrize(
    "name",
    ["", "../x", "-x", ".x", "A", "a\n", "a,b", "a b", "ä", "٣", "a/b", "a" * 64, "a" * 4096],
)
def test_a_name_outside_the_pattern_is_refused(name: str) -> None:
    (problem,) = problems_of(lambda: Machine(name=name))
    assert problem.startswith("name: ")
    assert "\n" not in problem
    assert len(problem) < 200


@pytest.mark.parametrize(
    ("field", "good", "bad"),
    [
        ("memory_mib", (1, MAX_MEMORY_MIB), (0, -1, MAX_MEMORY_MIB + 1)),
        ("vcpus", (1, MAX_VCPUS), (0, -1, MAX_VCPUS + 1)),
        ("machine", ("pc", "q35", "microvm", "pc-q35-7.2"), ("none", "help", "pc,accel=tcg", "")),
        ("cpu", ("host", "max", "EPYC-Milan-v2", "486"), ("help", "max,-vmx", "?", "", "-x")),
        ("accelerator", ("kvm", "tcg", "auto"), ("xen", "kvm:tcg", "")),
        ("firmware", (Path("/fw.bin"),), (Path("fw.bin"), Path("/a\nb"), Path("/" + "a" * 4095))),
    ],
)
def test_a_field_is_taken_up_to_its_bounds(
    field: str, good: tuple[Any, ...], bad: tuple[Any, ...]
) -> None:
    for value in good:
        assert getattr(Machine(name="a", **{field: value}), field) == value
    for value in bad:
        (problem,) = problems_of(functools.partial(Machine, name="a", **{field: value}))
        assert problem.startswith(f"{field}: ")


def test_a_kernel_line_is_bounded_and_needs_a_kernel() -> None:
    kernel = Path("/vmlinuz")
    line = "x" * MAX_KERNEL_LINE_BYTES
    assert Machine(name="a", kernel=kernel, append=line).append == line
    assert problems_of(lambda: Machine(name="a", kernel=kernel, append=line + "x"))
    assert problems_of(lambda: Machine(name="a", kernel=kernel, append="a\nb"))
    assert problems_of(lambda: Machine(name="a", append="quiet", initrd=IMAGE)) == [
        "initrd: has no meaning without a kernel",
        "append: has no meaning without a kernel",
    ]


def test_the_hosts_cpu_model_is_refused_without_kvm() -> None:
    assert problems_of(lambda: Machine(name="a", cpu="host", accelerator="tcg"))
    assert Machine(name="a", cpu="host", accelerator="auto").cpu == "host"


@pytest.mark.parametrize(
    ("machine", "family"),
    [
        ("pc", "pc"),
        ("pc-i440fx-7.2", "pc"),
        ("q35", "q35"),
        ("pc-q35-rhel9.2.0", "q35"),
        ("microvm", "microvm"),
    ],
)
def test_a_machine_type_belongs_to_a_board(machine: str, family: str) -> None:
    assert Machine(name="a", machine=machine).family == family


def test_what_a_raw_image_can_not_have() -> None:
    assert problems_of(lambda: Disk(IMAGE, backing=(Backing(Path("/base")),)))
    assert problems_of(
        lambda: Disk(
            IMAGE, format="qcow2", backing=(Backing(Path("/a")), Backing(Path("/b"), "qcow2"))
        )
    )
    assert Disk(
        IMAGE, format="qcow2", backing=(Backing(Path("/a"), "qcow2"), Backing(Path("/b")))
    ).is_written


def test_an_image_is_in_a_chain_once() -> None:
    assert problems_of(lambda: Disk(IMAGE, format="qcow2", backing=(Backing(IMAGE),)))


def test_a_chain_is_bounded() -> None:
    chain = tuple(Backing(Path(f"/{n}"), "qcow2") for n in range(MAX_BACKING_FILES + 1))
    assert Disk(IMAGE, format="qcow2", backing=chain[:-1])
    assert problems_of(lambda: Disk(IMAGE, format="qcow2", backing=chain))


def test_a_cdrom_is_never_written_and_an_ide_disk_always() -> None:
    assert not Disk(IMAGE, device="cdrom").is_written
    assert not Disk(IMAGE, readonly=True).is_written
    assert problems_of(lambda: Disk(IMAGE, device="ide", readonly=True))


def test_native_aio_wants_a_cache_without_the_hosts_pages() -> None:
    assert problems_of(lambda: Disk(IMAGE, aio="native"))
    assert Disk(IMAGE, aio="native", cache="none").aio == "native"


def test_zeroes_are_unmapped_only_where_discard_is() -> None:
    assert problems_of(lambda: Disk(IMAGE, discard="ignore", detect_zeroes="unmap"))


@pytest.mark.parametrize("serial", ["", "a b", "a,b", "x" * 21, "ä"])
def test_a_serial_number_is_short_and_plain(serial: str) -> None:
    assert problems_of(lambda: Disk(IMAGE, serial=serial))
    assert Disk(IMAGE, serial="x" * 20).serial == "x" * 20


def test_a_nic_has_a_tap_or_a_bridge() -> None:
    assert problems_of(lambda: Nic())
    assert problems_of(lambda: Nic(tap="t0", bridge="br0"))
    assert Nic(tap="t0").bridge is None


@pytest.mark.parametrize("name", ["", "a" * 16, "../x", "a b", "a:1", "-x", ".", "..", "a%d"])
def test_an_interface_name_is_one_of_the_kernels(name: str) -> None:
    assert problems_of(lambda: Nic(tap=name))
    assert problems_of(lambda: Nic(bridge=name))


@pytest.mark.parametrize(
    "mac", ["", "52:54:00:12:34", "52:54:00:12:34:5g", "53:54:00:00:00:01", "00:00:00:00:00:00"]
)
def test_a_mac_address_is_of_one_card(mac: str) -> None:
    assert problems_of(lambda: Nic(tap="t0", mac=mac))


def test_vhost_serves_virtio_only() -> None:
    assert problems_of(lambda: Nic(tap="t0", model="e1000", vhost=True))


def test_a_machine_keeps_its_addresses_and_no_two_are_alike() -> None:
    machine = Machine(name="web1", nics=(Nic(bridge="br0"), Nic(bridge="br0")))
    assert machine.mac(0) == mac_address("web1", 0) == "52:54:00:ee:1d:7e"
    assert machine.mac(0) != machine.mac(1)
    assert Machine(name="web2", nics=machine.nics).mac(0) != machine.mac(0)


def test_an_address_or_a_tap_is_given_once() -> None:
    mac = "52:54:00:00:00:01"
    assert problems_of(
        lambda: Machine(name="a", nics=(Nic(tap="t0", mac=mac), Nic(tap="t0", mac=mac)))
    ) == [
        "nics[1].mac: is the address of nics[0] as well",
        "nics[1].tap: is the tap of nics[0] as well",
    ]


def test_what_a_board_has_no_room_for_is_refused() -> None:
    disks = tuple(Disk(Path(f"/{n}"), device="ide") for n in range(7))
    assert Machine(name="a", disks=disks[:4])
    assert problems_of(lambda: Machine(name="a", disks=disks[:5]))
    assert Machine(name="a", machine="q35", disks=disks[:6])
    assert problems_of(lambda: Machine(name="a", machine="q35", disks=disks))
    many = tuple(Disk(Path(f"/{n}")) for n in range(MAX_DISKS + 1))
    assert Machine(name="a", disks=many[:-1])
    assert problems_of(lambda: Machine(name="a", disks=many))
    nics = tuple(Nic(tap=f"t{n}") for n in range(MAX_NICS + 1))
    assert Machine(name="a", nics=nics[:-1])
    assert problems_of(lambda: Machine(name="a", nics=nics))


def test_a_microvm_has_virtio_devices_only_and_few() -> None:
    def microvm(*disks: Disk, nics: tuple[Nic, ...] = ()) -> Machine:
        return Machine(name="a", machine="microvm", disks=disks, nics=nics)

    virtio = [Disk(Path(f"/{n}")) for n in range(8)]
    assert microvm(*virtio)
    assert problems_of(lambda: microvm(*virtio, nics=(Nic(tap="t0"),)))
    assert problems_of(lambda: microvm(Disk(IMAGE, device="ide")))
    assert problems_of(lambda: microvm(nics=(Nic(tap="t0", model="e1000"),)))


@pytest.mark.parametrize(
    ("field", "good", "bad"),
    [
        ("cpu_weight", (None, 1, 10_000), (0, -1, 10_001)),
        ("io_weight", (None, 1, 10_000), (0, -1, 10_001)),
        ("cpu_quota_percent", (None, 1, MAX_QUOTA), (0, -1, MAX_QUOTA + 1)),
        ("oom_score_adjust", (None, -1000, 0, 1000), (-1001, 1001)),
    ],
)
def test_the_limits_have_the_ranges_that_systemd_has(
    field: str, good: tuple[Any, ...], bad: tuple[Any, ...]
) -> None:
    for value in good:
        assert getattr(Limits(**{field: value}), field) == value
    for value in bad:
        (problem,) = problems_of(functools.partial(Limits, **{field: value}))
        assert problem.startswith(f"{field}: {value} is not between")
