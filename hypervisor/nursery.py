"""A small process beside the launcher that makes the children which become QEMU.

To fork a launcher takes the longer the more it has loaded, and each of its pages that it touches
while the child is there has to be copied first. The nursery is forked off once, before a launcher
has loaded what a start takes; it makes a child within the time that the launcher needs for other
things. The child is the launcher's own (`forking.clone_sibling`), to wait for and to end with.

It knows nothing and decides nothing. It ends with the launcher, and is made anew by the next start
if it was killed.
"""

import contextlib
import gc
import os
import signal
import socket
from pathlib import Path
from typing import Final

from hypervisor.errors import JailFailed
from hypervisor.newborn import Ends, Newborn, live, prepare_decoders
from kvmsec.linux import forking, syscalls
from kvmsec.linux.children import Child, start_child

_LIMIT_BYTES: Final = 4096  # PATH_MAX, linux/limits.h
_NOWHERE: Final = b"-"  # No path of a group: that is absolute.
_NAME: Final = "kvmsec-nursery"  # What ps(1) shows of it, beside the launcher's command line.


class Nursery:
    """The nursery of one launcher, from the first `begin` or birth to `close`."""

    def __init__(self) -> None:
        self._child: Child | None = None
        self._orders: socket.socket | None = None

    def begin(self) -> None:
        """Make the process, where there is none. Raises ManyThreads, and OSError."""
        if self._orders is not None:
            return
        orders, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with theirs:
            try:
                self._child = start_child(
                    lambda: _serve(theirs), what="making children", keep=[theirs.fileno()]
                )
            except BaseException:
                orders.close()
                raise
        self._orders = orders

    def birth(self, group: str | None = None) -> Newborn:
        """Ask for a child, which waits to be told its cell. Raises what `begin` does.

        group: the path of the version 2 control group that it is born in, by the one call that
        needn't wait for the kernel's grace period; None where there is none.
        """
        return Newborn(lambda ends: self._ask(group, ends), cpus=os.sched_getaffinity(0))

    def _ask(self, group: str | None, ends: Ends) -> None:
        order = _NOWHERE if group is None else os.fsencode(group)
        self.begin()
        try:
            self._send(order, ends)
        except (BrokenPipeError, ConnectionResetError):  # It was killed.
            self.close()
            self.begin()
            self._send(order, ends)

    def _send(self, order: bytes, ends: Ends) -> None:
        assert self._child is not None and self._orders is not None
        # The kernel would often wake it where the launcher runs, which then waits for the fork.
        if others := os.sched_getaffinity(0) - {syscalls.current_cpu()}:
            with contextlib.suppress(OSError):  # Gone, or not allowed there any more.
                os.sched_setaffinity(self._child.pid, others)
        socket.send_fds(self._orders, [order], [ends.line.fileno(), ends.report])

    def close(self) -> None:
        """End the process; children of it live on."""
        if self._orders is not None:
            self._orders.close()
        if self._child is not None:
            self._child.close()
        self._orders = self._child = None


def _serve(orders: socket.socket) -> None:
    """Make children until the launcher is gone."""
    gc.disable()  # There is nothing to collect, and to look for it would touch every page.
    os.chdir("/")  # The launcher's directory is not kept busy.
    Path("/proc/self/comm").write_text(_NAME)
    syscalls.reset_signals()  # For the children: to do it there would touch fifty pages.
    prepare_decoders()
    while True:
        order, descriptors, _, _ = socket.recv_fds(orders, _LIMIT_BYTES, 2, socket.MSG_CMSG_CLOEXEC)
        if not order:
            return
        line, report = descriptors
        ends = Ends(socket.socket(fileno=line), report)
        try:
            _make_child(None if order == _NOWHERE else os.fsdecode(order), ends)
        except OSError as error:
            signal.signal(signal.SIGPIPE, signal.SIG_IGN)  # The launcher may be gone.
            ends.tell(JailFailed("fork", error.errno or 0, str(error)))
            signal.signal(signal.SIGPIPE, signal.SIG_DFL)
        finally:
            ends.close()


def _make_child(group: str | None, ends: Ends) -> None:
    pid, pidfd = forking.clone_sibling(group)
    if pid == 0:
        live(ends)
    os.close(pidfd)
