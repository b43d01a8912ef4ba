"""A machine and what was opened for it, as QEMU's argument list: a pure function.

No host path is in the list: disks, taps and sockets are descriptors, the rest is where the jail
has it. Every value goes in as JSON or with its commas doubled, so that none can add an option.
"""

import json
from collections.abc import Iterator, Sequence
from difflib import get_close_matches
from pathlib import PurePosixPath
from typing import Final, Literal

from attrs import frozen

from hypervisor.errors import Unsupported
from hypervisor.extra_arguments import check_extra_arguments
from hypervisor.features import Features
from hypervisor.machine import HUGE_PAGES_MIB, Disk, HugePages, ImageFormat, Machine, Nic

SANDBOX: Final = "on,obsolete=deny,elevateprivileges=deny,spawn=deny,resourcecontrol=deny"
_DISKS_PER_BUS: Final = {"pc": 2, "q35": 1}
"""Disks on one IDE bus: master and slave on the PIIX, one on an AHCI port."""


@frozen
class ImageGrant:
    """An image that was opened: its descriptor inside QEMU, and whether it is a block device.

    The access mode must match the definition: the first image of a written disk read-write, every
    other one read-only.
    """

    descriptor: int
    is_block_device: bool = False


@frozen
class NicGrant:
    """A tap's descriptor inside QEMU, and one of /dev/vhost-net where the NIC uses it."""

    tap: int
    vhost: int | None = None


@frozen
class Grants:
    """What was opened or put into the jail for one start of one machine.

    qmp, serial: listening unix sockets. serial_log: a file in the jail that gets what the guest
    prints. disks: for each disk its chain, the definition's own image first. firmware, kernel,
    initrd: paths in the jail.
    """

    qmp: int
    serial: int | None = None
    serial_log: PurePosixPath | None = None
    disks: tuple[tuple[ImageGrant, ...], ...] = ()
    nics: tuple[NicGrant, ...] = ()
    firmware: PurePosixPath | None = None
    kernel: PurePosixPath | None = None
    initrd: PurePosixPath | None = None


def build(
    machine: Machine,
    features: Features,
    grants: Grants,
    *,
    accelerator: Literal["kvm", "tcg"],
    extra: Sequence[str] = (),
) -> tuple[str, ...]:
    """The arguments (without the program's name) that start a machine, stopped, behind QMP.

    `accelerator` is what "auto" came to. Raises Unsupported where this QEMU lacks what is asked
    for, ForbiddenArguments for `extra`, and ValueError for grants that don't fit the machine.
    """
    _require(machine, features, accelerator)
    _require_grants(machine, grants)
    return (
        *_process(machine),
        *_board(machine, accelerator),
        *_boot(machine, grants),
        *_monitor(grants),
        *_serial(grants),
        *_disks(machine, grants),
        *_nics(machine, grants),
        *check_extra_arguments(extra),
    )


def _require(machine: Machine, features: Features, accelerator: str) -> None:
    def lacks(what: str, hint: str | None = None) -> Unsupported:
        return Unsupported(what, features.version_text, hint=hint)

    if not features.sandbox:
        raise lacks("was built without seccomp", "install a QEMU whose -sandbox works")
    if accelerator not in features.accelerators:
        raise lacks(f"was built without {accelerator}")
    if machine.machine not in features.machines:
        boards = ", ".join(n for n in ("pc", "q35", "microvm") if n in features.machines)
        raise lacks(f"has no machine type {machine.machine}", f"it has {boards}, among others")
    if machine.cpu == "host" and accelerator != "kvm":
        raise lacks("has the CPU model host under KVM only", "take cpu = max")
    if machine.cpu is not None and machine.cpu not in features.cpus:
        raise lacks(f"has no CPU model {machine.cpu}", _near(machine.cpu, features.cpus))
    for model in sorted({name for name in _models(machine) if name not in features.devices}):
        raise lacks(f"has no device {model}")


def _near(model: str, known: Sequence[str]) -> str:
    similar = get_close_matches(model, known) or [name for name in ("host", "max") if name in known]
    return f"it has {', '.join(similar)}, among others (QEMU's `-cpu help` lists them)"


def _require_grants(machine: Machine, grants: Grants) -> None:
    chains = [1 + len(disk.backing) for disk in machine.disks]
    if [len(chain) for chain in grants.disks] != chains:
        raise ValueError("each image of each disk needs a descriptor")
    if [nic.vhost is not None for nic in grants.nics] != [nic.vhost for nic in machine.nics]:
        raise ValueError("each NIC needs a tap, and one of /dev/vhost-net where it has vhost")
    for name in ("firmware", "kernel", "initrd"):
        if (getattr(machine, name) is None) != (getattr(grants, name) is None):
            raise ValueError(f"the jail needs the {name} of the definition, and no other")
    if machine.serial != (grants.serial is not None):
        raise ValueError("a serial console needs a socket, and no console none")


def _models(machine: Machine) -> Iterator[str]:
    if any(disk.device == "scsi" for disk in machine.disks):
        yield "virtio-scsi-pci"
    for disk in machine.disks:
        yield _disk_model(machine, disk)
    for nic in machine.nics:
        yield _nic_model(machine, nic)


def _disk_model(machine: Machine, disk: Disk) -> str:
    virtio = "virtio-blk-device" if machine.family == "microvm" else "virtio-blk-pci"
    return {"virtio": virtio, "scsi": "scsi-hd", "ide": "ide-hd", "cdrom": "ide-cd"}[disk.device]


def _nic_model(machine: Machine, nic: Nic) -> str:
    if nic.model == "virtio":
        return "virtio-net-device" if machine.family == "microvm" else "virtio-net-pci"
    return nic.model


def _process(machine: Machine) -> Iterator[str]:
    yield from ("-name", _options(guest=machine.name))
    yield from ("-nodefaults", "-no-user-config", "-display", "none")
    yield "-S"  # no guest instruction before what the kernel says of this process was checked
    yield from ("-sandbox", SANDBOX)
    yield from ("-msg", "timestamp=on", "-rtc", "base=utc")


def _board(machine: Machine, accelerator: str) -> Iterator[str]:
    # No core file holds guest memory, and KSM, which tells by its timing what a neighbour's
    # pages hold, merges none of it.
    board = {"usb": "off", "dump_guest_core": "off", "mem_merge": "off"}
    if machine.hugepages is not None:
        yield from ("-object", _json(**_huge_memory(machine.memory_mib, machine.hugepages)))
        board["memory_backend"] = "memory"
    yield from ("-machine", _options(type=machine.machine, **board))
    yield from ("-accel", accelerator)
    if machine.cpu is not None:
        yield from ("-cpu", machine.cpu)
    yield from ("-m", _options(size=f"{machine.memory_mib}M"))
    yield from ("-smp", _options(cpus=str(machine.vcpus)))


def _huge_memory(memory_mib: int, hugepages: HugePages) -> dict[str, object]:
    """Memory that no path leads to: a file of hugetlbfs would need one, and a place in the jail."""
    return {
        "qom-type": "memory-backend-memfd",
        "id": "memory",
        "size": memory_mib << 20,
        "hugetlb": True,
        "hugetlbsize": HUGE_PAGES_MIB[hugepages] << 20,
        "dump": False,
        "merge": False,
    }


def _boot(machine: Machine, grants: Grants) -> Iterator[str]:
    if grants.firmware is not None:
        yield from ("-bios", str(grants.firmware))
    if grants.kernel is not None:
        yield from ("-kernel", str(grants.kernel))
    if grants.initrd is not None:
        yield from ("-initrd", str(grants.initrd))
    if machine.append is not None:
        yield from ("-append", machine.append)


def _monitor(grants: Grants) -> Iterator[str]:
    yield from ("-chardev", _options("socket", id="qmp", fd=grants.qmp, server="on", wait="off"))
    yield from ("-mon", _options(chardev="qmp", mode="control"))


def _serial(grants: Grants) -> Iterator[str]:
    if grants.serial is None:
        return
    log = {}
    if grants.serial_log is not None:
        log = {"logfile": str(grants.serial_log), "logappend": "on"}
    socket = _options("socket", id="serial0", fd=grants.serial, server="on", wait="off", **log)
    yield from ("-chardev", socket, "-serial", "chardev:serial0")


def _disks(machine: Machine, grants: Grants) -> Iterator[str]:
    if any(disk.device == "scsi" for disk in machine.disks):
        yield from ("-device", _json(driver="virtio-scsi-pci", id="scsi"))
    ports = iter(range(len(machine.disks)))
    for index, (disk, chain) in enumerate(zip(machine.disks, grants.disks, strict=True)):
        yield from _images(index, disk, chain)
        device: dict[str, object] = {
            "driver": _disk_model(machine, disk),
            "id": f"disk{index}",
            "drive": _node(index, 0),
            "bootindex": index + 1,
        }
        if disk.device in ("ide", "cdrom"):
            port, slots = next(ports), _DISKS_PER_BUS[machine.family]
            device |= {"bus": f"ide.{port // slots}", "unit": port % slots}
        elif disk.device == "scsi":
            device |= {"bus": "scsi.0", "scsi-id": index, "lun": 0}
        if disk.device != "cdrom":
            device["write-cache"] = _on(disk.cache in ("writeback", "none", "unsafe"))
        if disk.serial is not None:
            device["serial"] = disk.serial
        yield from ("-device", _json(**device))


def _images(index: int, disk: Disk, chain: Sequence[ImageGrant]) -> Iterator[str]:
    """One disk's chain, the deepest image first, since a node names the one below it."""
    formats: list[ImageFormat] = [disk.format, *(image.format for image in disk.backing)]
    for depth in reversed(range(len(chain))):
        grant = chain[depth]
        is_read_only = depth > 0 or not disk.is_written
        below = _node(index, depth + 1) if depth + 1 < len(chain) else None
        common: dict[str, object] = {
            "read-only": is_read_only,
            # Without it QEMU would try the other access mode, which the descriptor doesn't have.
            "auto-read-only": False,
            "discard": "ignore" if is_read_only else disk.discard,
            "cache": {
                "direct": disk.is_direct,
                "no-flush": disk.cache == "unsafe",
            },
        }
        file = {
            "driver": "host_device" if grant.is_block_device else "file",
            "node-name": f"{_node(index, depth)}-file",
            "filename": _set_path(grant.descriptor),
            "aio": disk.aio,
            "locking": "off",  # it is locked already, and QEMU may not lock: see `images.locks`
            **common,
        }
        image = {
            "driver": formats[depth],
            "node-name": _node(index, depth),
            "file": f"{_node(index, depth)}-file",
            "detect-zeroes": "off" if is_read_only else disk.detect_zeroes,
            **common,
        }
        if formats[depth] == "qcow2":
            # Spelled out, or QEMU would open whatever the image's header names.
            image["backing"] = below
        yield from _descriptor(grant.descriptor)
        yield from ("-blockdev", _json(**file), "-blockdev", _json(**image))


def _nics(machine: Machine, grants: Grants) -> Iterator[str]:
    for index, (nic, grant) in enumerate(zip(machine.nics, grants.nics, strict=True)):
        vhost: dict[str, str | int] = {}
        if grant.vhost is not None:
            vhost = {"vhost": "on", "vhostfd": grant.vhost}
        yield from ("-netdev", _options("tap", id=f"net{index}", fd=grant.tap, **vhost))
        device: dict[str, object] = {
            "driver": _nic_model(machine, nic),
            "id": f"nic{index}",
            "netdev": f"net{index}",
            "mac": machine.mac(index),
        }
        if machine.family != "microvm":
            device["romfile"] = ""  # booting over a network is not offered: one ROM less to parse
        yield from ("-device", _json(**device))


def _descriptor(number: int) -> Iterator[str]:
    yield from ("-add-fd", _options(fd=number, set=number))


def _set_path(number: int) -> str:
    return f"/dev/fdset/{number}"


def _node(index: int, depth: int) -> str:
    return f"image{index}-{depth}"


def _on(value: bool) -> str:
    return "on" if value else "off"


def _json(**members: object) -> str:
    return json.dumps(members, separators=(",", ":"))


def _options(first: str | None = None, /, **pairs: str | int) -> str:
    """QEMU's KEY=VALUE list (docs: Invocation); an underscore in a key here is a hyphen there."""
    parts = [f"{key.replace('_', '-')}={_escaped(str(value))}" for key, value in pairs.items()]
    return ",".join(parts if first is None else [first, *parts])


def _escaped(value: str) -> str:
    return value.replace(",", ",,")
