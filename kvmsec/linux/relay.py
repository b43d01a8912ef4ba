"""A child between us and a unix socket whose other side may pass descriptors that block.

The kernel closes a passed descriptor that nobody took in whoever reads or drops the message, and
that close can wait as long as the sender has arranged: for a TCP peer (socket(7), SO_LINGER), or
for its own FUSE server. So on a kernel that can't refuse descriptors it is a child that reads: it
has nothing but the two sockets and is nobody, and only it can be held up.
"""

import contextlib
import functools
import os
import select
import signal
import socket
import time
from typing import Final

from kvmsec.linux.children import fork_worker
from kvmsec.linux.credentials import NOBODY, Credentials
from kvmsec.linux.readiness import is_readable

_BUFFER_BYTES: Final = 64 * 1024
_GO: Final = b"!"
_END_S: Final = 0.015


class RelayedSocket(socket.socket):
    """Our end of a relay, as if it were connected to the other side; closing it ends the relay."""

    _pidfd = -1
    far_inode = 0
    """The inode of the socket that is connected to the other side, for who asks the kernel."""

    def close(self) -> None:
        super().close()
        pidfd, self._pidfd = self._pidfd, -1
        if pidfd >= 0:
            with contextlib.suppress(ProcessLookupError):
                signal.pidfd_send_signal(pidfd, signal.SIGKILL)
            _ending.append(pidfd)
        collect_ended(_END_S)  # Mostly it has ended by then.


_ending: Final[list[int]] = []
"""The pidfds of relays that were killed: one may be held up, and nobody waits for it."""


@functools.cache
def _forget_in_children() -> None:
    """A child is no parent of theirs, and what has these numbers in it may be something else."""
    os.register_at_fork(after_in_child=_ending.clear)


def begin(far: socket.socket) -> RelayedSocket:
    """Fork the relay of a socket that is not connected yet; nothing is read before `let_go`.

    Forked first, so that no failure of a fork leaves a connected socket in our hands. Raises
    OSError and ManyThreads.
    """
    _forget_in_children()
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
    near = RelayedSocket(fileno=ours.detach())
    try:
        near.setblocking(False)
        near.far_inode = os.fstat(far.fileno()).st_ino
        with theirs:
            _, near._pidfd, pipe = fork_worker(
                lambda: _relay(theirs, far),
                Credentials(NOBODY, NOBODY),
                [theirs.fileno(), far.fileno()],
            )
            os.close(pipe)
    except BaseException:
        near.close()
        raise
    return near


def let_go(near: RelayedSocket, far: socket.socket) -> None:
    """Leave a socket that is connected by now to its relay. Raises OSError."""
    near.send(_GO)
    far.close()  # Not the last hold on it, so nothing that waits in there is dropped here.


def collect_ended(timeout_s: float) -> None:
    """Take the zombies of relays that have ended, or do within `timeout_s` seconds."""
    deadline = time.monotonic() + timeout_s
    for pidfd in list(_ending):
        is_readable(pidfd, max(0.0, deadline - time.monotonic()))
        try:
            ended = os.waitid(os.P_PIDFD, pidfd, os.WEXITED | os.WNOHANG)
        except ChildProcessError:
            pass  # Somebody in this process collects every child.
        else:
            if ended is None:
                continue
        _ending.remove(pidfd)
        os.close(pidfd)


def _relay(near: socket.socket, far: socket.socket) -> None:
    """The child's work: until our side hangs up, or the other has and all of its words are told."""
    near.setblocking(True)
    if near.recv(1) != _GO:
        return
    for one in (near, far):
        one.setblocking(False)
    to_near, to_far = bytearray(), bytearray()
    is_far_open = True
    while is_far_open or to_near:
        poll = select.poll()
        poll.register(near, _wanted(to_far, to_near))
        # With nothing to be done there a hang-up would be told again and again.
        if is_far_open and (events := _wanted(to_near, to_far)):
            poll.register(far, events)
        ready = dict(poll.poll())
        if ready.get(near.fileno(), 0) & (select.POLLHUP | select.POLLERR):
            return
        if near.fileno() in ready and not _take(near, to_far):
            return
        if far.fileno() in ready:
            is_far_open = _take(far, to_near)
        if not _give(near, to_near):
            return
        if is_far_open:
            is_far_open = _give(far, to_far)


def _wanted(room: bytearray, waiting: bytearray) -> int:
    reads = select.POLLIN if len(room) < _BUFFER_BYTES else 0
    return reads | (select.POLLOUT if waiting else 0)


def _take(source: socket.socket, buffer: bytearray) -> bool:
    """Read what there is room for; False once the other end of the socket is closed."""
    room = _BUFFER_BYTES - len(buffer)
    if room <= 0:
        return True
    try:
        data = source.recv(room)
    except BlockingIOError:
        return True
    except ConnectionError:
        return False
    buffer += data
    return bool(data)


def _give(target: socket.socket, buffer: bytearray) -> bool:
    """Write what is taken now; False once the other end of the socket is closed."""
    if not buffer:
        return True
    try:
        del buffer[: target.send(buffer)]
    except BlockingIOError:
        return True
    except ConnectionError:
        return False
    return True
