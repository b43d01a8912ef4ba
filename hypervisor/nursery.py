"""A small process beside the launcher that makes the children which become QEMU.

To fork a launcher takes the longer the more it has loaded, and each of its pages that it touches
while the child is there has to be copied first. The nursery is forked off once, before a launcher
has loaded what a start takes. Between two starts it has a spare process ready, which waits for an
order in namespaces of its own, after a lull with its memory its own as well: for a network, and to
copy, the kernel takes some milliseconds. With an order the spare goes on as the child: another
process in the instance's control group, in the same memory and where the spare was
(`kvmsec.linux.in_place`).

Both are the launcher's own children, to wait for and to end with. Nursery and spare know nothing
and decide nothing. They end with the launcher, and are made anew by the next start if somebody
killed them.
"""

import contextlib
import errno
import gc
import os
import select
import signal
import socket
import time
from pathlib import Path
from typing import Final, NoReturn

from attrs import frozen

from hypervisor.child import ALONE, BORN, Ends, Origin, live, prepare_decoders
from hypervisor.errors import JailFailed
from hypervisor.jail import kinds_made_before, make_namespaces
from hypervisor.newborn import Newborn
from kvmsec.linux import children, forking, in_place, passing, processes, syscalls
from kvmsec.linux.children import Child, end_all, start_child
from kvmsec.linux.readiness import has_left, is_readable, is_ready

_LIMIT_BYTES: Final = 4096 + 1  # PATH_MAX, linux/limits.h, and a letter
_PREPARE: Final = b"p"
_BIRTH: Final = b"b"
_CHANNELS: Final = 2
_ENDING_S: Final = 1.0
_TAKEN_S: Final = 5.0
_STUCK: Final = "the process that makes children takes no orders; the next start makes another"
_LULL_S: Final = 0.05
"""Without an order, until a spare copies its pages: starts in a row would wait for that."""
_NAME: Final = "kvmsec-nursery"  # What ps(1) shows of it, beside the launcher's command line.


@frozen
class _Spare:
    """A spare that a launcher was told of: its child, used or not."""

    pid: int
    pidfd: int

    def collect(self) -> bool:
        """Whether it has ended; no descriptor of it is left then."""
        try:
            if os.waitid(os.P_PIDFD, self.pidfd, os.WEXITED | os.WNOHANG) is None:
                return False
        except ChildProcessError:  # Collected, by whoever ended it, or since SIGCHLD is ignored.
            pass
        os.close(self.pidfd)
        return True


class Nursery:
    """The nursery of one launcher, from the first `begin` or birth to `close`."""

    def __init__(self) -> None:
        self._child: Child | None = None
        self._orders: socket.socket | None = None
        self._kinds = 0
        self._spares: list[_Spare] = []

    def begin(self, kinds: int | None = None) -> None:
        """Make the process, where there is none. Raises ManyThreads, and OSError.

        kinds: of the namespaces that its children are born in, all that there are for a new one
        if that is not said. One for others is closed before.
        """
        if self._orders is not None and kinds in (None, self._kinds):
            return
        kinds = kinds_made_before() if kinds is None else kinds
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
        self.prepare()

    def birth(self, group: str | None = None, kinds: int | None = None) -> Newborn:
        """Ask for a child, which waits to be told its cell.

        Raises what `begin` does, and JailFailed where orders are not taken any more.

        group: the path of the version 2 control group that it is born in, by the one call that
        needn't wait for the kernel's grace period; None where there is none. kinds: of the
        namespaces that it is born in, all that there are unless a test leaves one out.
        """
        kinds = kinds_made_before() if kinds is None else kinds
        order = _BIRTH + os.fsencode(group or "")
        return Newborn(lambda ends: self._ask(order, ends, kinds))

    def prepare(self) -> None:
        """Have a spare made now, where there is none, while nobody may be waiting for it.

        Where that fails, or there is no nursery, it is made when a child is asked for.
        """
        if self._orders is not None:
            self._hear_of_spares(self._orders)
            with contextlib.suppress(OSError):
                self._orders.send(_PREPARE, socket.MSG_DONTWAIT)

    def _ask(self, order: bytes, ends: Ends, kinds: int) -> None:
        if self._child is not None and is_readable(self._child.fileno(), 0):
            self.close()  # It has ended.
        self.begin(kinds)
        assert self._orders is not None
        self._hear_of_spares(self._orders)
        # Some seventy orders wait there before it is full: many at once wait for each other here.
        if not is_ready(self._orders.fileno(), select.POLLOUT, _TAKEN_S):
            self.close()
            raise JailFailed("fork", errno.EAGAIN, _STUCK)
        # One that was killed just now tells it by its end: the channels close.
        with contextlib.suppress(ConnectionError):
            socket.send_fds(self._orders, [order], [ends.line.fileno(), ends.report])

    def _hear_of_spares(self, orders: socket.socket) -> None:
        with contextlib.suppress(OSError):  # There is nothing more to hear.
            while True:
                # What there is no number for is heard of later.
                said, descriptors = passing.receive(
                    orders, _LIMIT_BYTES, 1, flags=socket.MSG_PEEK | socket.MSG_DONTWAIT
                )
                if not descriptors:
                    break
                self._spares.append(_Spare(int(said), *descriptors))
                orders.recv(_LIMIT_BYTES)
        self._spares = [spare for spare in self._spares if not spare.collect()]

    def close(self) -> None:
        """End the process and its spares; children of it live on."""
        if self._orders is None or self._child is None:
            return
        orders = self._orders.fileno()
        self._orders.shutdown(socket.SHUT_WR)
        deadline = time.monotonic() + _ENDING_S
        # One more may just be made, which has the socket and says first of all that it is there.
        while not has_left(orders) and (left_s := deadline - time.monotonic()) > 0:
            self._end_spares(self._orders)
            is_readable(orders, left_s)
        self._child.close()
        self._end_spares(self._orders)
        self._orders.close()
        self._child = self._orders = None

    def _end_spares(self, orders: socket.socket) -> None:
        """Also one that was used and whose child waits: the child does not need it."""
        self._hear_of_spares(orders)
        end_all([spare.pidfd for spare in self._spares])
        self._spares = []


# The nursery ---------------------------------------------------------------------------------


@frozen
class _Order:
    """What a launcher wants: a child, in this group and with these ends; or a spare, without."""

    group: str | None = None
    ends: Ends | None = None


def _serve(orders: socket.socket, kinds: int) -> None:
    """Have spares, one after the other, until the launcher is gone.

    Whoever waits for an order takes it: the spare, or the nursery while no spare does.
    """
    gc.disable()  # There is nothing to collect, and to look for it would touch every page.
    os.chdir("/")  # The launcher's directory is not kept busy.
    Path("/proc/self/comm").write_text(_NAME)
    syscalls.reset_signals()  # For the children, which have no time for it.
    prepare_decoders()
    in_place.is_possible()
    while (order := _hear(orders)) is not None:
        _have_spare(orders, order, kinds)


def _hear(orders: socket.socket) -> _Order | None:
    """The next order; None when the launcher is gone.

    Raises OSError where its channels have no numbers any more: the launcher sees them closed.
    """
    said, descriptors = passing.receive(orders, _LIMIT_BYTES, _CHANNELS)
    if not said:
        return None
    if said == _PREPARE:
        return _Order()
    if len(descriptors) < _CHANNELS:
        raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))
    line, report = descriptors
    group = os.fsdecode(said.removeprefix(_BIRTH)) or None
    return _Order(group, Ends(socket.socket(fileno=line), report))


def _have_spare(orders: socket.socket, order: _Order, kinds: int) -> None:
    """Make a spare; return once it has made a child that is there, or will make none."""
    if order.ends is not None and has_left(order.ends.line.fileno()):
        order.ends.close()  # Nobody waits for that child any more.
        return
    told, tell = os.pipe2(os.O_CLOEXEC)
    with contextlib.ExitStack() as ours:
        ours.callback(os.close, told)
        with contextlib.ExitStack() as theirs:
            theirs.callback(os.close, tell)
            if order.ends is not None:
                theirs.callback(order.ends.close)
            try:
                pid, pidfd = forking.clone_sibling()
            except OSError as error:
                _refuse(order.ends, error)
                return
            if pid == 0:
                _wait(orders, tell, order, kinds)
            ours.callback(os.close, pidfd)
        if os.read(told, len(BORN)) != BORN:
            processes.kill(pidfd)  # Its child has ended before it could tell what it came from.


def _refuse(ends: Ends | None, error: OSError | JailFailed) -> None:
    """Tell whoever asked for a child that there is none, and why."""
    if ends is None:
        return
    if not isinstance(error, JailFailed):
        error = JailFailed("fork", error.errno or 0, str(error))
    signal.signal(signal.SIGPIPE, signal.SIG_IGN)  # It may not wait any more.
    ends.tell(error)
    signal.signal(signal.SIGPIPE, signal.SIG_DFL)


# The spare -----------------------------------------------------------------------------------


def _wait(orders: socket.socket, tell: int, order: _Order, kinds: int) -> NoReturn:
    """The spare's whole life, and the child's, which goes on where the spare was."""
    try:
        ends = order.ends
        channels = set() if ends is None else {ends.line.fileno(), ends.report}
        children.close_all_but({0, 1, 2, orders.fileno(), tell, *channels})
        syscalls.end_with_parent()
        if has_left(orders.fileno()):  # It was gone before.
            os._exit(ALONE)
        origin = Origin(os.pidfd_open(os.getpid()), tell)
        socket.send_fds(orders, [b"%d" % os.getpid()], [origin.pidfd])
        lacking = kinds
        with contextlib.suppress(JailFailed):  # Who asks for a child is told why there is none.
            make_namespaces(kinds)
            lacking = 0
        is_copied = not in_place.is_possible()  # The child has a copy of everything then.
        while order.ends is None:
            if not is_copied and not is_readable(orders.fileno(), _LULL_S):
                in_place.copy_shared_pages()
                is_copied = True
            heard = _hear(orders)
            if heard is None:
                os._exit(ALONE)
            order = heard
        orders.close()  # It is the nursery's from now on.
        if has_left(order.ends.line.fileno()):  # Nobody waits any more, or would collect a child.
            os._exit(ALONE)
        try:
            if lacking:
                make_namespaces(lacking)
            forking.become_sibling_init(order.group)
        except (OSError, JailFailed) as error:
            _refuse(order.ends, error)
            os._exit(0)
        live(order.ends, origin=origin)
    except ConnectionError:
        os._exit(ALONE)
    finally:
        os._exit(1)
