"""A small process beside the launcher that makes the children which become QEMU.

To fork a launcher takes the longer the more it has loaded, and each of its pages that it touches
while the child is there has to be copied first. The nursery is forked off once, before a launcher
has loaded what a start takes; it makes a child within the time that the launcher needs for other
things. The child is the launcher's own (`forking.clone_sibling`), to wait for and to end with.

A child is born into namespaces that were made ahead for it, where that can be (`_Rooms`). The
nursery knows nothing and decides nothing. It ends with the launcher, and is made anew by the next
start if it was killed.
"""

import contextlib
import gc
import os
import signal
import socket
from pathlib import Path
from typing import Final

from hypervisor.errors import JailFailed
from hypervisor.jail import kinds_made_before, make_namespaces
from hypervisor.newborn import Ends, Newborn, live, prepare_decoders
from kvmsec.linux import forking, namespaces, syscalls
from kvmsec.linux.children import Child, start_child

_LIMIT_BYTES: Final = 4096 + 32  # PATH_MAX, linux/limits.h, and a number
_NAMES: Final = {
    namespaces.CLONE_NEWNET: "net",
    namespaces.CLONE_NEWIPC: "ipc",
    namespaces.CLONE_NEWUTS: "uts",
}
_PREPARE: Final = b"prepare"
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

    def birth(self, group: str | None = None, kinds: int | None = None) -> Newborn:
        """Ask for a child, which waits to be told its cell. Raises what `begin` does.

        group: the path of the version 2 control group that it is born in, by the one call that
        needn't wait for the kernel's grace period; None where there is none. kinds: those of
        `hypervisor.jail.kinds_made_before`, where a test leaves one out.
        """
        kinds = kinds_made_before() if kinds is None else kinds
        order = b"%d %s" % (kinds, os.fsencode(group or ""))
        return Newborn(lambda ends: self._ask(order, ends), cpus=os.sched_getaffinity(0))

    def prepare(self) -> None:
        """Have the next child's namespaces made now, while nobody may be waiting for them.

        Where that fails, or there is no nursery, they are made when the child is asked for.
        """
        if self._orders is not None:
            with contextlib.suppress(OSError):
                self._orders.send(_PREPARE, socket.MSG_DONTWAIT)

    def _ask(self, order: bytes, ends: Ends) -> None:
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
    rooms = _Rooms()
    rooms.try_to_prepare(kinds_made_before())
    while True:
        order, descriptors, _, _ = socket.recv_fds(orders, _LIMIT_BYTES, 2, socket.MSG_CMSG_CLOEXEC)
        if not order:
            return
        if order == _PREPARE:
            rooms.try_to_prepare(kinds_made_before())
            continue
        kinds, _, group = order.partition(b" ")
        line, report = descriptors  # Were there fewer, it would end: the next start has another.
        ends = Ends(socket.socket(fileno=line), report)
        try:
            rooms.prepare(int(kinds))
            _make_child(os.fsdecode(group) or None, ends)
        except (OSError, JailFailed) as error:
            signal.signal(signal.SIGPIPE, signal.SIG_IGN)  # The launcher may be gone.
            ends.tell(_failure_of(error))
            signal.signal(signal.SIGPIPE, signal.SIG_DFL)
        finally:
            # In this order: the launcher sees the report closed, and so QEMU started, no sooner
            # than nobody but the child is there.
            rooms.leave()
            ends.close()


def _make_child(group: str | None, ends: Ends) -> None:
    pid, pidfd = forking.clone_sibling(group)
    if pid == 0:
        live(ends)
    os.close(pidfd)


def _failure_of(error: OSError | JailFailed) -> JailFailed:
    if isinstance(error, JailFailed):
        return error
    return JailFailed("fork", error.errno or 0, str(error))


class _Rooms:
    """The nursery's own namespaces, and those that it goes to for the next child to be born in.

    Each is for one child: the nursery has left it before that becomes QEMU.
    """

    def __init__(self) -> None:
        self._own = {
            kind: os.open(f"/proc/self/ns/{name}", os.O_RDONLY | os.O_CLOEXEC)
            for kind, name in _NAMES.items()
        }
        self._prepared = 0

    def prepare(self, kinds: int) -> None:
        """Be in new ones of these kinds. Raises JailFailed, and OSError."""
        if self._prepared == kinds:
            return
        self.leave()
        make_namespaces(kinds)
        self._prepared = kinds

    def try_to_prepare(self, kinds: int) -> None:
        with contextlib.suppress(JailFailed):  # A birth that wants them tells why there are none.
            self.prepare(kinds)

    def leave(self) -> None:
        """Go back to its own. A nursery that can't ends: it would share what is a child's."""
        for kind, own in self._own.items():
            if self._prepared & kind:
                syscalls.setns(own, kind)
        self._prepared = 0
