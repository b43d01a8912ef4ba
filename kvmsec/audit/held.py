"""What a process holds open: files, devices, KVM's machine, and the inodes of its sockets."""

import os
import re
import stat
from collections.abc import Iterable
from typing import Final

from attrs import frozen

from hypervisor.foreign_text import escaped
from kvmsec.audit.facts import Descriptors, File
from kvmsec.audit.process_files import ProcessFiles, TooMuch

_DESCRIPTORS: Final = 8192
_SHOWN: Final = 32
_SECTOR_BYTES: Final = 512
_PATH_CHARS: Final = 120
_FLAGS: Final = re.compile(rb"^flags:\t(0[0-7]*)$", re.MULTILINE)
_SOCKET: Final = re.compile(r"socket:\[(\d+)\]", re.ASCII)
_KVM_MACHINE: Final = "anon_inode:kvm-vm"

# Linux Documentation/admin-guide/devices.txt. `null`, `zero`, `full`, `random`, `urandom`; `tty`,
# `ptmx`; `kvm` is what a machine is made with.
HARMLESS: Final = frozenset(
    {(1, 3), (1, 5), (1, 7), (1, 8), (1, 9), (5, 0), (5, 2), (10, 232), (10, 242)}
)
# The tap and the offloads that a guest's own network goes through, as descriptors: grants.
_GRANTED: Final = frozenset({(10, 200), (10, 238), (10, 241)})  # net/tun, vhost-net, vhost-vsock

GRAVE: Final = (
    *("/dev/mem", "/dev/kmem", "/dev/port", "/dev/sd", "/dev/vd", "/dev/xvd", "/dev/nvme"),
    *("/dev/dm-", "/dev/loop", "/dev/md", "/dev/mapper", "/dev/sg", "/dev/fuse", "/dev/uinput"),
    *("/dev/ipmi", "/dev/mtd", "/dev/rbd", "/dev/zd", "/dev/drbd", "/dev/userfaultfd"),
)
"""Devices by which a process has the host, or the storage of other guests."""


@frozen
class Held:
    """What is known of the descriptors, and which sockets are among them."""

    descriptors: Descriptors
    socket_inodes: frozenset[int]


def read_held(files: ProcessFiles) -> Held:
    """Look at each descriptor, without opening what it leads to. Raises OSError and TooMuch."""
    numbers = files.entries("fd")
    if len(numbers) > _DESCRIPTORS:
        raise TooMuch(f"it holds more than {_DESCRIPTORS} descriptors")
    found: list[File] = []
    devices: dict[str, None] = {}
    sockets = set()
    has_kvm_machine = False
    for number in numbers:
        try:
            target = files.link(f"fd/{number}")
            if match := _SOCKET.fullmatch(target):
                sockets.add(int(match[1]))
                continue
            has_kvm_machine = has_kvm_machine or target == _KVM_MACHINE
            if not target.startswith("/") or target.startswith("/memfd:"):
                continue
            status = files.status_of(f"fd/{number}")
            if is_notable_device(status) and not _is_grant(status):
                devices[escaped(target, limit_chars=_PATH_CHARS)] = None
            elif _is_image(status):
                found.append(_describe(files, number, target, status))
        except (FileNotFoundError, ProcessLookupError):
            continue  # Closed since it was listed.
    descriptors = Descriptors(
        has_kvm_machine=has_kvm_machine,
        files=tuple(sorted(found, key=_is_open_to_others, reverse=True)[:_SHOWN]),
        devices=tuple(gravest_first(devices)[:_SHOWN]),
    )
    return Held(descriptors, frozenset(sockets))


def _is_open_to_others(file: File) -> tuple[bool, int]:
    """Sorts by what is judged of it: what is cut off must be no worse than what is kept."""
    by_others = bool(file.mode & stat.S_IWOTH) * 2 + bool(file.mode & stat.S_IROTH)
    return file.is_written and file.is_reachable, by_others


def gravest_first(devices: Iterable[str]) -> list[str]:
    """Those by which a process has the host before all others."""
    return sorted(devices, key=lambda path: not path.startswith(GRAVE))


def is_notable_device(status: os.stat_result) -> bool:
    """A character device beyond the harmless ones."""
    numbers = os.major(status.st_rdev), os.minor(status.st_rdev)
    is_terminal = 136 <= numbers[0] <= 143
    return stat.S_ISCHR(status.st_mode) and numbers not in HARMLESS and not is_terminal


def _is_grant(status: os.stat_result) -> bool:
    return (os.major(status.st_rdev), os.minor(status.st_rdev)) in _GRANTED


def _is_image(status: os.stat_result) -> bool:
    """A block device, or a file that is there under a name: what a disk may be.

    What doesn't fill a sector is none: libvirt has its QEMUs hold their locked pid files.
    """
    is_file = stat.S_ISREG(status.st_mode) and status.st_nlink > 0
    is_file = is_file and status.st_size >= _SECTOR_BYTES
    return is_file or stat.S_ISBLK(status.st_mode)


def _describe(files: ProcessFiles, number: str, target: str, status: os.stat_result) -> File:
    flags = _FLAGS.search(files.read(f"fdinfo/{number}", 1 << 16))
    access = int(flags[1], 8) & os.O_ACCMODE if flags else os.O_RDWR
    return File(
        path=escaped(target, limit_chars=_PATH_CHARS),
        mode=stat.S_IMODE(status.st_mode),
        uid=status.st_uid,
        is_written=access != os.O_RDONLY,
        is_block_device=stat.S_ISBLK(status.st_mode),
        is_reachable=_is_reachable(target, status),
    )


def _is_reachable(target: str, status: os.stat_result) -> bool:
    """Whether anybody may pass every directory above; a file that isn't where it says may be."""
    try:
        if not os.path.samestat(os.lstat(target), status):
            return True
        return may_pass_to(target)
    except OSError:
        return True


def may_pass_to(path: str) -> bool:
    """Whether every directory above a path of the host lets others pass. Raises OSError."""
    above = os.path.dirname(path)
    while True:
        if not os.stat(above).st_mode & stat.S_IXOTH:
            return False
        if above == "/":
            return True
        above = os.path.dirname(above)
