"""Unix sockets between root and an instance: by paths of any length, and nothing but bytes."""

import contextlib
import os
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Final

from kvmsec.linux import relay

_SO_PASSRIGHTS: Final = 83  # linux/include/uapi/asm-generic/socket.h, Linux 6.16


def listen(path: Path) -> socket.socket:
    """Bind a listening socket that only root can connect to, from the moment it is there.

    Raises OSError.
    """
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    before = os.umask(0o177)
    try:
        with _short(path) as address:
            listener.bind(address)
        listener.listen(1)
    except BaseException as error:
        listener.close()
        if isinstance(error, OSError):  # bind(2) fails without naming the path
            raise OSError(error.errno, error.strerror, str(path)) from error
        raise
    finally:
        os.umask(before)
    return listener


def connect(path: Path) -> socket.socket:
    """Connect without waiting; the socket does not block, and takes no descriptor.

    Where the kernel can't refuse descriptors a child of ours is between (see `relay`), for which
    the caller has one thread. Raises BlockingIOError while the other side's queue is full,
    ManyThreads, and OSError.
    """
    client = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    near: relay.RelayedSocket | None = None
    try:
        client.setblocking(False)
        if not _refuse_descriptors(client):
            near = relay.begin(client)
        with _short(path) as address:
            client.connect(address)
        if near is not None:
            relay.let_go(near, client)
    except BaseException:
        if near is not None:
            near.close()
        client.close()
        raise
    return client if near is None else near


def connect_to_own(path: Path) -> socket.socket:
    """Connect to a socket of the caller's own making, without waiting; it does not block.

    Only where the other side can be trusted with what `connect` guards against. Raises
    BlockingIOError while its queue is full, and OSError.
    """
    client = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        client.setblocking(False)
        with _short(path) as address:
            client.connect(address)
    except BaseException:
        client.close()
        raise
    return client


def _refuse_descriptors(client: socket.socket) -> bool:
    """Let nobody pass a descriptor to this socket; False where the kernel can't see to that.

    Nothing here would take one, so the kernel closes it in the midst of our reading; and to close
    a TCP connection of the sender's can wait for as long as that has set (socket(7), SO_LINGER),
    which no deadline of ours ends.
    """
    try:
        client.setsockopt(socket.SOL_SOCKET, _SO_PASSRIGHTS, 0)
    except OSError:
        return False
    return True


@contextlib.contextmanager
def _short(path: Path) -> Iterator[str]:
    """A name of `path` that fits into the 108 bytes that an address has (unix(7))."""
    directory = os.open(path.parent, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        yield f"/proc/self/fd/{directory}/{path.name}"
    finally:
        os.close(directory)
