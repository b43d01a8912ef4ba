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
from collections.abc import Collection
from pathlib import Path
from typing import Final

import msgspec
from attrs import evolve

from hypervisor.errors import JailFailed
from hypervisor.jail import Cell
from hypervisor.newborn import Ends, Newborn, live, order_decoder
from kvmsec.linux import forking, syscalls
from kvmsec.linux.children import Child, start_child

_LIMIT_BYTES: Final = 1 << 18
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
        cpus = os.sched_getaffinity(0)  # Before `_send` changes the nursery's own.
        orders, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with theirs:
            try:
                self._child = start_child(
                    lambda: _serve(theirs, cpus), what="making children", keep=[theirs.fileno()]
                )
            except BaseException:
                orders.close()
                raise
        self._orders = orders

    def birth(self, cell: Cell) -> Newborn:
        """Ask for a child, which begins at once to shut itself in. Raises what `begin` does."""
        return Newborn(lambda ends: self._ask(cell, ends))

    def _ask(self, cell: Cell, ends: Ends) -> None:
        order = msgspec.msgpack.encode(cell)
        self.begin()
        try:
            self._send(order, cell.tree, ends)
        except (BrokenPipeError, ConnectionResetError):  # It was killed.
            self.close()
            self.begin()
            self._send(order, cell.tree, ends)

    def _send(self, order: bytes, tree: int, ends: Ends) -> None:
        assert self._child is not None and self._orders is not None
        # The kernel would often wake it where the launcher runs, which then waits for the fork.
        if others := os.sched_getaffinity(0) - {syscalls.current_cpu()}:
            with contextlib.suppress(OSError):  # Gone, or not allowed there any more.
                os.sched_setaffinity(self._child.pid, others)
        socket.send_fds(self._orders, [order], [tree, ends.line, ends.report])

    def close(self) -> None:
        """End the process; children of it live on."""
        if self._orders is not None:
            self._orders.close()
        if self._child is not None:
            self._child.close()
        self._orders = self._child = None


def _serve(orders: socket.socket, cpus: Collection[int]) -> None:
    """Make children, which run on these processors, until the launcher is gone."""
    gc.disable()  # There is nothing to collect, and to look for it would touch every page.
    os.chdir("/")  # The launcher's directory is not kept busy.
    Path("/proc/self/comm").write_text(_NAME)
    syscalls.reset_signals()
    signal.signal(signal.SIGPIPE, signal.SIG_IGN)  # A launcher may be gone when it is told.
    cells = msgspec.msgpack.Decoder(Cell)
    order_decoder()  # Here, for all children.
    while True:
        order, descriptors, _, _ = socket.recv_fds(orders, _LIMIT_BYTES, 3, socket.MSG_CMSG_CLOEXEC)
        if not order:
            return
        tree, line, report = descriptors
        cell, ends = cells.decode(order), Ends(line, report)
        try:
            _make_child(evolve(cell, tree=tree), ends, cpus)
        except OSError as error:
            ends.tell(JailFailed("fork", error.errno or 0, str(error)))
        finally:
            os.close(tree)
            ends.close()


def _make_child(cell: Cell, ends: Ends, cpus: Collection[int]) -> None:
    pid, pidfd = forking.clone_sibling(cell.born_in)
    if pid == 0:
        signal.signal(signal.SIGPIPE, signal.SIG_DFL)
        with contextlib.suppress(OSError):  # None of them is left: it stays where it may be.
            os.sched_setaffinity(0, cpus)
        live(cell, ends)
    os.close(pidfd)
