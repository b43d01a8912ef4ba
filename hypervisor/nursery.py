"""A small process beside the launcher that makes the children which become QEMU.

To fork a launcher takes the longer the more it has loaded, and each of its pages that it touches
while the child is there has to be copied first. The nursery is forked off once, before a launcher
has loaded what a start takes. It has a spare process ready at any time, which waits for an order in
namespaces of its own, with all its memory its own already: for a network, and to copy, the kernel
takes some milliseconds. With an order the spare goes on as the child: another process, in the
instance's control group, in the same memory and where the spare was (`kvmsec.linux.in_place`).

Both are the launcher's own children, to wait for and to end with. Nursery and spare know nothing
and decide nothing. They end with the launcher, and are made anew by the next start if somebody
killed them.
"""

import contextlib
import errno
import gc
import os
import signal
import socket
from pathlib import Path
from typing import Final, NoReturn

from hypervisor.errors import JailFailed
from hypervisor.jail import kinds_made_before, make_namespaces
from hypervisor.newborn import ALONE, Ends, Newborn, live, prepare_decoders
from kvmsec.linux import children, forking, in_place, passing, syscalls
from kvmsec.linux.children import Child, start_child
from kvmsec.linux.readiness import is_readable

_LIMIT_BYTES: Final = 4096 + 1  # PATH_MAX, linux/limits.h, and a letter
_PREPARE: Final = b"p"
_BIRTH: Final = b"b"
_CHANNELS: Final = 2
_USED: Final = b"u"
_ENDING_S: Final = 1.0
_NAME: Final = "kvmsec-nursery"  # What ps(1) shows of it, beside the launcher's command line.


class Nursery:
    """The nursery of one launcher, from the first `begin` or birth to `close`."""

    def __init__(self) -> None:
        self._child: Child | None = None
        self._orders: socket.socket | None = None
        self._kinds = 0
        self._spares: list[int] = []
        self._is_used = False

    def begin(self, kinds: int | None = None) -> None:
        """Make the process, where there is none. Raises ManyThreads, and OSError.

        kinds: of the namespaces that its children are born in; those of
        `hypervisor.jail.kinds_made_before`, where a test does not leave one out.
        """
        kinds = kinds_made_before() if kinds is None else kinds
        if self._orders is not None and self._kinds == kinds:
            return
        self.close()
        orders, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with theirs:
            try:
                self._child = start_child(
                    lambda: _serve(theirs, kinds), what="making children", keep=[theirs.fileno()]
                )
            except BaseException:
                orders.close()
                raise
        self._orders, self._kinds = orders, kinds
        self._send_prepare(orders)

    def birth(self, group: str | None = None, kinds: int | None = None) -> Newborn:
        """Ask for a child, which waits to be told its cell. Raises what `begin` does.

        group: the path of the version 2 control group that it is born in, by the one call that
        needn't wait for the kernel's grace period; None where there is none. kinds: see `begin`.
        """
        order = _BIRTH + os.fsencode(group or "")
        return Newborn(lambda ends: self._ask(order, ends, kinds), cpus=os.sched_getaffinity(0))

    def dismiss(self) -> None:
        """Kill the spares that children came from, once those have become QEMU, or failed to.

        No sooner than it must be: to take their memory apart holds up a QEMU that is about to
        start. It is `prepare` that waits for their end.
        """
        if self._orders is not None and self._is_used:
            self._hear_of_spares(self._orders)
            for pid in self._spares:
                os.kill(pid, signal.SIGKILL)

    def prepare(self) -> None:
        """Have a spare made now, while nobody may be waiting for it, where the last was used.

        For each birth, once it is over, whatever came of it. Where no spare can be made, or there
        is no nursery, it is made when a child is asked for.
        """
        if self._orders is not None and self._is_used:
            self._end_spares(self._orders)
            self._send_prepare(self._orders)

    def _send_prepare(self, orders: socket.socket) -> None:
        self._is_used = False
        with contextlib.suppress(OSError):
            orders.send(_PREPARE, socket.MSG_DONTWAIT)

    def _ask(self, order: bytes, ends: Ends, kinds: int | None) -> None:
        if self._child is not None and is_readable(self._child.fileno(), 0):
            self.close()  # It was killed.
        self.begin(kinds)
        assert self._orders is not None
        self._hear_of_spares(self._orders)
        # The kernel would often wake it where the launcher runs, which then waits for the birth.
        if others := os.sched_getaffinity(0) - {syscalls.current_cpu()}:
            for pid in self._spares[-1:]:
                with contextlib.suppress(OSError):  # Gone, or not allowed there any more.
                    os.sched_setaffinity(pid, others)
        self._is_used = True
        with contextlib.suppress(ConnectionError):  # Killed just now: its channels tell it.
            socket.send_fds(self._orders, [order], [ends.line.fileno(), ends.report])

    def _hear_of_spares(self, orders: socket.socket) -> None:
        with contextlib.suppress(OSError):  # There is nothing more to hear.
            while said := orders.recv(_LIMIT_BYTES, socket.MSG_DONTWAIT):
                self._spares.append(int(said))
        self._spares = [pid for pid in self._spares if not _has_ended(pid)]

    def _end_spares(self, orders: socket.socket) -> None:
        """Also one that was used and whose child waits: the child does not need it."""
        self._hear_of_spares(orders)
        for pid in self._spares:
            os.kill(pid, signal.SIGKILL)
            with contextlib.suppress(ChildProcessError):
                os.waitid(os.P_PID, pid, os.WEXITED)
        self._spares.clear()

    def close(self) -> None:
        """End the process and its spares; children of it live on."""
        if self._orders is None or self._child is None:
            return
        self._orders.shutdown(socket.SHUT_WR)
        self._end_spares(self._orders)
        is_readable(self._child.fileno(), _ENDING_S)  # It may just have made one more.
        self._child.close()
        self._end_spares(self._orders)
        self._orders.close()
        self._child = self._orders = None


def _has_ended(pid: int) -> bool:
    """Whether a child of the caller's has ended; it is collected, and its pid is free then."""
    try:
        return os.waitid(os.P_PID, pid, os.WEXITED | os.WNOHANG) is not None
    except ChildProcessError:  # Somebody waits for any child, or SIGCHLD is ignored.
        return True


# The nursery ---------------------------------------------------------------------------------


def _serve(orders: socket.socket, kinds: int) -> None:
    """Have spares, one after the other, until the launcher is gone.

    Orders are for the spare to read. The nursery looks for one only while there is none.
    """
    gc.disable()  # There is nothing to collect, and to look for it would touch every page.
    os.chdir("/")  # The launcher's directory is not kept busy.
    Path("/proc/self/comm").write_text(_NAME)
    syscalls.reset_signals()  # For the children, which have no time for it.
    prepare_decoders()
    in_place.prepare()
    while order := orders.recv(_LIMIT_BYTES, socket.MSG_PEEK):
        is_asked = order != _PREPARE
        if not is_asked:
            orders.recv(_LIMIT_BYTES)
        try:
            is_used = _have_spare(orders, kinds, is_asked=is_asked)
        except OSError as error:
            if is_asked:
                _refuse(orders, error)
        else:
            if is_asked and not is_used:
                _refuse(orders, JailFailed("fork", 0, "the process for it was killed"))


def _have_spare(orders: socket.socket, kinds: int, *, is_asked: bool) -> bool:
    """Make a spare, and wait for its end; says whether it took an order before. Raises OSError."""
    # The spare has the end to read from as well: nobody is killed for having written there.
    told, tell = os.pipe2(os.O_CLOEXEC)
    with contextlib.ExitStack() as undo:
        undo.callback(os.close, told)
        with contextlib.ExitStack() as theirs:
            theirs.callback(os.close, tell)
            if forking.clone_sibling() == 0:
                children.close_all_but({0, 1, 2, orders.fileno(), told, tell})
                _wait(orders, tell, kinds, is_asked=is_asked)
        return os.read(told, len(_USED)) == _USED


def _refuse(orders: socket.socket, error: OSError | JailFailed) -> None:
    """Tell whoever asked for a child that there is none, and why."""
    ends = _take(orders)
    if isinstance(error, JailFailed):
        ends.tell(error)
    else:
        ends.tell(JailFailed("fork", error.errno or 0, str(error)))
    ends.close()


def _look(orders: socket.socket) -> bytes:
    """The next order, which stays there; b"" when the launcher is gone.

    Raises OSError where its channels have no numbers any more: a child would end for that, and be
    nobody's, since it could not say that it was there.
    """
    order, descriptors = passing.receive(orders, _LIMIT_BYTES, _CHANNELS, flags=socket.MSG_PEEK)
    for descriptor in descriptors:
        os.close(descriptor)
    if order.startswith(_BIRTH) and len(descriptors) < _CHANNELS:
        raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))
    return order


def _take(orders: socket.socket) -> Ends:
    """Take an order that was looked at, with the child's ends of its channels."""
    _, (line, report) = passing.receive(orders, _LIMIT_BYTES, _CHANNELS)
    return Ends(socket.socket(fileno=line), report)


# The spare -----------------------------------------------------------------------------------


def _wait(orders: socket.socket, tell: int, kinds: int, *, is_asked: bool) -> NoReturn:
    """The spare's whole life, and the child's, which goes on where the spare was."""
    try:
        syscalls.end_with_parent()
        orders.send(b"%d" % os.getpid())
        lacking = kinds
        with contextlib.suppress(JailFailed):  # Who asks for a child is told why there is none.
            make_namespaces(kinds)
            lacking = 0
        if not is_asked:
            in_place.copy_shared_pages()
        while (order := _look(orders)) == _PREPARE:
            orders.recv(_LIMIT_BYTES)  # It is prepared.
        if not order:
            os._exit(ALONE)
        try:
            if lacking:
                make_namespaces(lacking)
            forking.become_sibling_init(os.fsdecode(order.removeprefix(_BIRTH)) or None)
        except (OSError, JailFailed) as error:
            _refuse(orders, error)
            os.write(tell, _USED)
            os._exit(0)
        # The child alone has the channels: its report closes as it becomes QEMU.
        ends = _take(orders)
        os.write(tell, _USED)
        live(ends)
    except ConnectionError:
        os._exit(ALONE)
    finally:
        os._exit(1)
