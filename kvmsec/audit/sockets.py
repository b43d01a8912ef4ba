"""Which sockets a process holds: whose network they are in, and who may connect to them.

By the tables that the kernel keeps for each network namespace (proc_pid_net(5)), of the process's
own and of the host's: a socket is in the one that lists its inode.
"""

import contextlib
import ipaddress
import os
import stat
import struct
import time
from collections import deque
from collections.abc import Collection, Iterable, Iterator, Sequence
from typing import Final

from attrs import frozen

from hypervisor.foreign_text import escaped
from kvmsec.audit.facts import Sockets, UnixListener
from kvmsec.audit.held import may_pass_to
from kvmsec.audit.process_files import ProcessFiles, TooMuch, enter_network_of, open_host
from kvmsec.linux import unix_diag
from kvmsec.linux.mounts import read_mounts

_TABLE_BYTES: Final = 16 << 20
_INET: Final = ("tcp", "tcp6", "udp", "udp6", "raw", "raw6", "icmp", "icmp6", "udplite", "udplite6")
_STATE_LISTEN: Final = "0A"  # TCP_LISTEN, linux/include/net/tcp_states.h
_LISTENS: Final = 0x10000  # __SO_ACCEPTCON, linux/include/uapi/linux/net.h
_PATH_CHARS: Final = 120
_SHOWN: Final = 32
_ENTRIES: Final = 50_000
_SEARCH_S: Final = 2.0
_INODE_MASK: Final = 0xFFFFFFFF  # What unix_diag has room for.

FileId = tuple[int, int]
"""A file's device and its inode, of which unix_diag has 32 bits."""


@frozen
class InetSocket:
    """A row of an IP table: its protocol, its local end as people write it, and whether it listens.

    `protocol` is also `packet` or `netlink`, which have no end that anybody connects to.
    """

    protocol: str
    local: str
    listens: bool

    @property
    def is_on_loopback(self) -> bool:
        """Whether nobody beyond this host can connect to it."""
        return self.local.startswith(("127.", "[::1]"))

    def __str__(self) -> str:
        return f"{self.protocol.removesuffix('6')} {self.local}".strip()


@frozen
class UnixSocket:
    """A row of the table of unix sockets; an abstract name begins with `@`."""

    path: bytes
    listens: bool


def read_sockets(
    files: ProcessFiles, inodes: Collection[int], paths: Sequence[str] = ()
) -> Sockets:
    """Find each socket of the process in its own or the host's network namespace.

    `paths` are where files of its listeners may be, beside the name that each was bound to. The
    caller is a child of its own: it ends in the process's network. Raises OSError and TooMuch.
    """
    with open_host() as host:
        is_shared = files.link("ns/net") == host.link("ns/net")
        inet_of_host, unix_of_host = _tables(host)
    inet_own, unix_own = (inet_of_host, unix_of_host) if is_shared else _tables(files)
    held_of_host = {inode: inet_of_host[inode] for inode in inodes if inode in inet_of_host}
    held = {inode: inet_own[inode] for inode in inodes if inode in inet_own} | held_of_host
    known = {*inet_own, *inet_of_host, *unix_own, *unix_of_host}
    listening = [
        inode for inode in inodes if _listens(inode, unix_own) or _listens(inode, unix_of_host)
    ]
    bound_to = _files_of_listeners(files) if listening else {}
    listeners = [
        _describe(
            unix_of_host.get(inode) or unix_own[inode],
            inode in unix_of_host,
            bound_to.get(inode),
            paths,
        )
        for inode in listening
    ]
    tcp = [one for one in held.values() if one.listens]
    return Sockets(
        # What is cut off must be no worse than what is kept.
        tcp_listeners=_shown(sorted(tcp, key=lambda one: one.is_on_loopback)),
        of_host=_shown(held_of_host.values()),
        unix_listeners=tuple(sorted(listeners, key=_is_harmless)[:_SHOWN]),
        unplaced=sum(inode not in known for inode in inodes),
    )


def _shown(sockets: Iterable[InetSocket]) -> tuple[str, ...]:
    return tuple(dict.fromkeys(str(one) for one in sockets))[:_SHOWN]


def _is_harmless(listener: UnixListener) -> tuple[bool, bool]:
    return not listener.is_open, listener.is_open is not None


def _listens(inode: int, table: dict[int, UnixSocket]) -> bool:
    return inode in table and table[inode].listens


def _tables(files: ProcessFiles) -> tuple[dict[int, InetSocket], dict[int, UnixSocket]]:
    inet: dict[int, InetSocket] = {}
    for name in _INET:
        if text := _table(files, name):
            inet |= parse_inet(name, text)
    for name, place in (("packet", 8), ("netlink", 9)):
        if text := _table(files, name):
            inet |= {inode: InetSocket(name, "", False) for inode in _inodes(text, place)}
    return inet, parse_unix(_table(files, "unix"))


def _table(files: ProcessFiles, name: str) -> bytes:
    try:
        return files.read(f"net/{name}", _TABLE_BYTES)
    except FileNotFoundError:
        return b""


# Tables --------------------------------------------------------------------------------------


def parse_inet(protocol: str, table: bytes) -> dict[int, InetSocket]:
    """The rows of /proc/net/tcp and the like, by inode."""
    found = {}
    for line in table.decode(errors="replace").splitlines()[1:]:
        words = line.split()
        if len(words) > 9 and words[9].isdigit():
            listens = protocol.startswith("tcp") and words[3] == _STATE_LISTEN
            found[int(words[9])] = InetSocket(protocol, _endpoint(words[1]), listens)
    return found


def _endpoint(text: str) -> str:
    """`0100007F:170C` as `127.0.0.1:5900`: words of 32 bits in the host's own order."""
    address, _, port = text.partition(":")
    try:
        packed = b"".join(
            struct.pack("=I", int(address[start : start + 8], 16))
            for start in range(0, len(address), 8)
        )
        shown = ipaddress.ip_address(packed)
        return f"[{shown}]:{int(port, 16)}" if shown.version == 6 else f"{shown}:{int(port, 16)}"
    except ValueError:
        return escaped(text, limit_chars=50)


def parse_unix(table: bytes) -> dict[int, UnixSocket]:
    """The rows of /proc/net/unix, by inode. A path may hold anything, a newline too."""
    found: dict[int, UnixSocket] = {}
    for line in table.split(b"\n")[1:]:
        words = line.split(maxsplit=7)
        if len(words) >= 7 and words[6].isdigit() and words[0].endswith(b":"):
            path = words[7] if len(words) == 8 else b""
            found.setdefault(int(words[6]), UnixSocket(path, bool(int(words[3], 16) & _LISTENS)))
    return found


def _inodes(table: bytes, place: int) -> Iterator[int]:
    for line in table.splitlines()[1:]:
        words = line.split()
        if len(words) > place and words[place].isdigit():
            yield int(words[place])


# Who may connect -----------------------------------------------------------------------------


def _files_of_listeners(files: ProcessFiles) -> dict[int, FileId]:
    """By the kernel's word, in the host's network and the process's; none where it has no word."""
    found: dict[int, FileId] = {}
    with open_host() as host:
        for each in (host, files):
            # Who isn't root stays where it is, and may well be in both.
            with contextlib.suppress(OSError):
                enter_network_of(each)
            with contextlib.suppress(OSError):
                found |= unix_diag.listening_files()
    return found


def _describe(
    row: UnixSocket, is_of_host: bool, file: FileId | None, paths: Sequence[str]
) -> UnixListener:
    """A listener and who may connect; an abstract name asks nobody for a permission (unix(7))."""
    shown = escaped(row.path, limit_chars=_PATH_CHARS)
    if not row.path:
        return UnixListener(path="(no name)", mode=0, is_open=False)
    if row.path.startswith(b"@"):
        return UnixListener(path=shown, mode=None, is_open=is_of_host)
    try:
        path = _file_of(file, (os.fsdecode(row.path), *paths))
    except (TooMuch, FileNotFoundError):
        return UnixListener(path=shown, mode=None, is_open=None)
    if path is not None:
        with contextlib.suppress(FileNotFoundError):
            return _at(path)
    # Removed since, or in a tree that the host doesn't show.
    return UnixListener(path=shown, mode=None, is_open=False)


def _at(path: str) -> UnixListener:
    """A listener whose file is there. Raises OSError."""
    mode = stat.S_IMODE(os.lstat(path).st_mode)
    is_open = bool(mode & stat.S_IWOTH) and may_pass_to(path)
    return UnixListener(path=escaped(path, limit_chars=_PATH_CHARS), mode=mode, is_open=is_open)


def _file_of(wanted: FileId | None, paths: Sequence[str]) -> str | None:
    """Where the listener's file is on the host: its name first, else looked for on its filesystem.

    A launcher may have bound it by a name of its own, such as /proc/self/fd/3/qmp.sock. None where
    no path of the host leads to it. Without the kernel's word for which file it is (`wanted`) a
    path of that name has to do: raises FileNotFoundError where there is none. Raises TooMuch.
    """
    if wanted is not None:
        return next((path for path in paths if _is_at(path, wanted)), None) or _search(wanted)
    name = os.path.basename(paths[0])
    for path in paths:
        if os.path.basename(path) == name and _is_socket(path):
            return path
    raise FileNotFoundError(name)


def _is_socket(path: str) -> bool:
    try:
        return os.path.isabs(path) and stat.S_ISSOCK(os.lstat(path).st_mode)
    except OSError:
        return False


def _search(wanted: FileId) -> str | None:
    """Look for a socket's file by its inode, on the host. Raises TooMuch when it gives up."""
    deadline = time.monotonic() + _SEARCH_S
    device = f"{os.major(wanted[0])}:{os.minor(wanted[0])}"
    ahead = deque(mount.path for mount in read_mounts() if mount.device == device)
    seen = 0
    while ahead:
        for entry in _entries_of(ahead.popleft()):
            seen += 1
            if seen > _ENTRIES or time.monotonic() > deadline:
                raise TooMuch("the filesystem that holds a socket has too many entries")
            if entry.is_dir(follow_symlinks=False):
                if _is_on(entry, wanted[0]):
                    ahead.append(entry.path)
            elif entry.inode() & _INODE_MASK == wanted[1] and _is_at(entry.path, wanted):
                return entry.path
    return None


def _entries_of(path: str) -> list[os.DirEntry[str]]:
    try:
        with os.scandir(path) as entries:
            return list(entries)
    except OSError:
        return []


def _is_on(entry: os.DirEntry[str], device: int) -> bool:
    """Whether a directory is of that filesystem, and still there."""
    try:
        return entry.stat(follow_symlinks=False).st_dev == device
    except OSError:
        return False


def _is_at(path: str, wanted: FileId) -> bool:
    """Whether a path leads to that socket's file."""
    try:
        status = os.lstat(path)
    except OSError:
        return False
    found = status.st_dev, status.st_ino & _INODE_MASK
    return found == wanted and stat.S_ISSOCK(status.st_mode)
