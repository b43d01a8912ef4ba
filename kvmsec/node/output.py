"""What an instance says: a sized filesystem that it may fill, shown as what it is, untrusted.

QEMU's own words and the serial line go to files on a tmpfs of the instance's, so that it can fill
neither /run nor /var. The instance could rewrite what it said; kvmsec's own lines are in a log
that it never holds (`kvmsec.node.journal`).
"""

import os
import stat
from pathlib import Path
from typing import Final

from kvmsec.linux import namespaces, syscalls
from kvmsec.linux.credentials import Credentials
from kvmsec.linux.files import open_without_links, read_bounded, replace_atomically

QEMU_LOG: Final = "qemu.log"
SERIAL_LOG: Final = "serial.log"
_RESERVED_BYTES: Final = 16 * 1024  # Memory that each instance takes up, used or not.
_MAX_FILES: Final = 8


def mount(directory: Path, owner: Credentials, size_kib: int) -> int:
    """Mount the instance's filesystem, and return a descriptor for QEMU's own words.

    Room for QEMU's words is set aside, so that a chatty serial line can't crowd out why QEMU
    ended. Raises OSError.
    """
    flags = namespaces.MS_NOSUID | namespaces.MS_NODEV | namespaces.MS_NOEXEC
    owned = f"uid={owner.uid},gid={owner.gid},mode=0700"
    data = f"size={room_bytes(size_kib)},nr_inodes={_MAX_FILES},{owned}"
    namespaces.mount("kvmsec-output", str(directory), "tmpfs", flags, data)
    create = os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_APPEND | os.O_CLOEXEC
    descriptor = os.open(directory / QEMU_LOG, create, 0o600)
    syscalls.reserve_space(descriptor, _RESERVED_BYTES)
    return descriptor


def room_bytes(size_kib: int) -> int:
    """How much an instance may say in all, with `size_kib` for its serial line."""
    return size_kib * 1024 + _RESERVED_BYTES


def unmount(directory: Path) -> None:
    """Take the instance's filesystem away, with everything in it; none is fine.

    Lazily: a process that still looks at it keeps its own view until it ends.
    """
    while is_mounted(directory):
        flags = namespaces.MNT_DETACH | namespaces.UMOUNT_NOFOLLOW
        namespaces.umount(str(directory), flags)


def is_mounted(directory: Path) -> bool:
    """Whether a filesystem is mounted on this directory."""
    try:
        return directory.lstat().st_dev != directory.parent.lstat().st_dev
    except FileNotFoundError:
        return False


def read(directory: Path, name: str, limit_bytes: int | None = None) -> bytes:
    """The end of one of an instance's files; empty when there is none that can be read.

    `limit_bytes` is as much as its filesystem holds, unless less is asked for. The instance owns
    the directory: whatever stands in the file's place but a plain file is passed over, and no link
    is followed.
    """
    try:
        opened = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    except FileNotFoundError:
        return b""
    try:
        flags = os.O_RDONLY | os.O_NONBLOCK | os.O_NOCTTY
        file = open_without_links(Path(name), flags, directory=opened)
    except OSError:
        return b""
    finally:
        os.close(opened)
    try:
        status = os.fstat(file)
        if not stat.S_ISREG(status.st_mode):
            return b""
        room = os.fstatvfs(file)
        wanted = limit_bytes or room.f_blocks * room.f_frsize
        return os.pread(file, wanted, max(0, status.st_size - wanted))
    finally:
        os.close(file)


def keep(directory: Path, target: Path) -> None:
    """Copy what an instance said to a file of kvmsec's, no larger than the room that it had."""
    words = read(directory, QEMU_LOG, _RESERVED_BYTES)
    serial = read(directory, SERIAL_LOG)
    replace_atomically(target, b"%d\n%s%s" % (len(words), words, serial))


def recall(kept: Path) -> tuple[bytes, bytes]:
    """QEMU's words and the serial line of an instance's last run; empty without one."""
    try:
        length, _, said = read_bounded(kept, 1 << 31).partition(b"\n")
        return said[: int(length)], said[int(length) :]
    except (FileNotFoundError, ValueError):
        return b"", b""
