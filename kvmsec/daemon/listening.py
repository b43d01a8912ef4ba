"""The sockets of a node's daemon: the one of this host, and those of the network."""

import contextlib
import errno
import os
import socket
import struct
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Final

from kvmsec.errors import KvmsecError
from kvmsec.linux import unix_sockets
from kvmsec.linux.locks import FileLock
from kvmsec.model.addresses import PORT, Bind, parse_bind

_BACKLOG: Final = 64
_CREDENTIALS: Final = struct.Struct("3i")  # unix(7), struct ucred: pid, uid, gid


class CannotListen(KvmsecError):
    """An address or the socket of this host can't be listened on."""

    def __init__(self, where: str, reason: str, *, hint: str | None = None) -> None:
        super().__init__(f"can't listen on {where}: {reason}", hint=hint)


# This host's -----------------------------------------------------------------------------------


@contextmanager
def local_socket(path: Path) -> Iterator[socket.socket]:
    """The socket that the command line comes through, 0600 before anybody can connect.

    One daemon a root: the lock beside it is held meanwhile, and what an earlier one left is
    replaced. Removed at the end. Raises CannotListen, and OSError.
    """
    lock = FileLock(path.with_name(f"{path.name}.lock"))
    if not lock.try_acquire():
        raise CannotListen(
            str(path),
            "another daemon serves it",
            hint="`systemctl status kvmsec-node` or `ss -xlp` shows which",
        )
    with lock, contextlib.ExitStack() as undo:
        with contextlib.suppress(FileNotFoundError):
            path.unlink()  # With the lock it is nobody's.
        listener = undo.enter_context(unix_sockets.listen(path))
        listener.listen(_BACKLOG)
        ours = os.stat(path).st_ino
        undo.callback(_remove_own, path, ours)
        yield listener


def _remove_own(path: Path, inode: int) -> None:
    with contextlib.suppress(OSError):
        if os.lstat(path).st_ino == inode:
            path.unlink()


def peer_uid(connected: socket.socket) -> int:
    """Whose process it is at the other end of a unix socket: what it was when it connected."""
    raw = connected.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _CREDENTIALS.size)
    uid: int = _CREDENTIALS.unpack(raw)[1]
    return uid


# The network's ---------------------------------------------------------------------------------


def listen_on(binds: Sequence[str]) -> list[socket.socket]:
    """Listening sockets for these addresses; none named: all of the node's. Raises CannotListen."""
    wanted: list[Bind | None] = [_parsed(text) for text in binds]
    made: list[socket.socket] = []
    with contextlib.ExitStack() as undo:
        for one in wanted or [None]:
            listener = _everywhere() if one is None else _bound(one)
            undo.callback(listener.close)
            made.append(listener)
        undo.pop_all()
    return made


def _parsed(text: str) -> Bind:
    try:
        return parse_bind(text)
    except ValueError as error:
        raise CannotListen(repr(text[:80]), str(error)) from error


def _everywhere() -> socket.socket:
    """Both families where the node has them both."""
    if socket.has_dualstack_ipv6():
        try:
            return _bound(Bind("::", PORT), is_dual=True)
        except CannotListen as error:
            cause = error.__cause__
            # A kernel without IPv6 (ipv6.disable) can't make the socket, or can't bind it.
            if getattr(cause, "errno", None) not in (errno.EAFNOSUPPORT, errno.EADDRNOTAVAIL):
                raise
    return _bound(Bind("0.0.0.0", PORT))


def _bound(where: Bind, *, is_dual: bool = False) -> socket.socket:
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(
            where.address,
            where.port,
            type=socket.SOCK_STREAM,
            flags=socket.AI_NUMERICHOST | socket.AI_NUMERICSERV | socket.AI_PASSIVE,
        )[0]
        listener = socket.socket(family, kind, protocol)
        try:
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            if family == socket.AF_INET6:
                listener.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, not is_dual)
            listener.bind(address)
            listener.listen(_BACKLOG)
        except BaseException:
            listener.close()
            raise
    except OSError as error:
        hint = None
        if error.errno == errno.EADDRINUSE:
            hint = f"`ss -tlnp sport = :{where.port}` shows who has it; choose another with --bind"
        elif error.errno == errno.EADDRNOTAVAIL:
            hint = "the node has no such address: `ip address` shows those it has"
        raise CannotListen(str(where), error.strerror or str(error), hint=hint) from error
    return listener
