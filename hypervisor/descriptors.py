"""What a process holds open that it can't have opened itself: leaks, told apart by the kernel.

A path says little (`/dev/mem` of the node reads like one of the jail's own). What counts is the
mount that a file was opened through, and where a socket was made.
"""

import contextlib
import os
import re
import stat
from collections.abc import Collection, Iterable, Iterator
from typing import Final

from attrs import frozen

from kvmsec.linux.mounts import read_mounts_of

FileIdentity = tuple[int, int]

_ANONYMOUS: Final = re.compile(
    r"anon_inode:(\[(eventfd|eventpoll|signalfd|timerfd|io_uring|userfaultfd)\]"
    r"|kvm-(vm|vcpu(:\d+|-stats:\d+)|vm-stats|device|[a-z0-9-]+))"
)
_MOUNT_ID: Final = re.compile(rb"^mnt_id:\t(\d+)$", re.MULTILINE)
_ROW: Final = re.compile(rb"^\w+: (?:\w+ ){2}(\w+) \w+ \w+ +(\d+)(?: (.*))?$", re.MULTILINE)
_CLOSED, _UNKNOWN = -1, -2  # In place of a mount's number.
_LISTENS: Final = 0x10000  # __SO_ACCEPTCON, linux/include/uapi/linux/net.h
_LIMIT_BYTES: Final = 64 << 20


def identity_of(descriptor: int) -> FileIdentity:
    """What a descriptor of the caller's stands for: the device and inode of its file."""
    status = os.fstat(descriptor)
    return status.st_dev, status.st_ino


def foreign_descriptors(pid: int, granted: Collection[FileIdentity]) -> list[str]:
    """What a process holds that is neither granted nor its own work, in words.

    Its own are files below its root, unix sockets of its network namespace, connections that it
    took on a granted listening socket, and the nameless objects that QEMU makes. Raises
    FileNotFoundError and ProcessLookupError when it is gone.
    """
    ours = _own_identities() - set(granted)
    mounts = {mount.number for mount in read_mounts_of(pid)}
    everything = [one for one in _held_by(pid) if one.identity not in granted]
    sockets = _own_sockets(pid, (one.identity[1] for one in everything if one.is_socket), granted)
    problems = []
    for held in everything:
        if held.is_nameless:
            is_foreign = _ANONYMOUS.fullmatch(held.target) is None
        elif held.identity in ours:
            is_foreign = True
        elif held.is_socket:
            is_foreign = held.identity[1] not in sockets
        elif held.is_pipe or held.is_memory:
            is_foreign = False
        else:
            is_foreign = held.mount_id not in (*mounts, _CLOSED)
        if is_foreign:
            problems.append(f"it holds a descriptor of {held.target}")
    return problems


def _held_by(pid: int) -> Iterator["_Held"]:
    for number in sorted(map(int, os.listdir(f"/proc/{pid}/fd"))):
        with contextlib.suppress(FileNotFoundError):  # Closed since it was listed.
            yield _Held.read(pid, number)


@frozen
class _Held:
    """One descriptor of a process: what it names, and the mount that this was opened through."""

    pid: int
    number: int
    target: str
    identity: FileIdentity
    mode: int
    links: int

    @classmethod
    def read(cls, pid: int, number: int) -> "_Held":
        path = f"/proc/{pid}/fd/{number}"
        target, status = os.readlink(path), os.stat(path)
        identity = status.st_dev, status.st_ino
        return cls(pid, number, target, identity, status.st_mode, status.st_nlink)

    @property
    def mount_id(self) -> int:
        """Read when it is asked for: most of what a QEMU holds has no path. Or `_CLOSED`."""
        try:
            mount = _MOUNT_ID.search(_read(f"/proc/{self.pid}/fdinfo/{self.number}"))
        except FileNotFoundError:
            return _CLOSED
        return int(mount[1]) if mount else _UNKNOWN

    @property
    def is_nameless(self) -> bool:
        """One of the objects that share a single inode (`anon_inode`)."""
        return self.target.startswith("anon_inode:")

    @property
    def is_socket(self) -> bool:
        return stat.S_ISSOCK(self.mode)

    @property
    def is_pipe(self) -> bool:
        return self.target.startswith("pipe:")

    @property
    def is_memory(self) -> bool:
        """Memory with a descriptor (memfd_create(2)): a regular file that no directory names."""
        return self.target.startswith("/memfd:") and stat.S_ISREG(self.mode) and self.links == 0


def _own_sockets(pid: int, held: Iterable[int], granted: Collection[FileIdentity]) -> set[int]:
    """Those of a process's sockets, by inode, that it may have made itself.

    Those of its network namespace, and what it accepted on a granted socket: an accepted unix
    socket belongs to the namespace of who connected, and bears the path that its listener was
    bound to. Sockets of no other family are made by QEMU.
    """
    held = set(held)
    made = {row.inode for row in _unix_sockets(f"/proc/{pid}/net/unix", held)}
    if made == held:  # All of them, or there are none.
        return made
    lent = {inode for _, inode in granted}
    here = _unix_sockets("/proc/self/net/unix", held | lent)
    paths = {row.path for row in here if row.inode in lent and row.listens and row.path}
    return made | {row.inode for row in here if row.path in paths and not row.listens}


@frozen
class _UnixSocket:
    inode: int
    listens: bool
    path: bytes


def _unix_sockets(table: str, inodes: Collection[int]) -> list[_UnixSocket]:
    """The rows of some sockets in a namespace's /proc/net/unix (proc_pid_net(5)).

    Of the others, some for each instance of the node, nothing is made. A path may hold anything, a
    newline too: what then looks like no row is none.
    """
    wanted = {b"%d" % inode for inode in inodes}
    return [
        _UnixSocket(int(inode), bool(int(flags, 16) & _LISTENS), path)
        for flags, inode, path in _ROW.findall(_read(table))
        if inode in wanted
    ]


def _own_identities() -> set[FileIdentity]:
    """What the calling process has open itself, which nobody else can have by chance."""
    found = set()
    for name in os.listdir("/proc/self/fd"):
        try:
            found.add(identity_of(int(name)))
        except OSError:
            continue  # The listing's own.
    return found


def _read(path: str) -> bytes:
    with open(path, "rb") as file:
        return file.read(_LIMIT_BYTES)
