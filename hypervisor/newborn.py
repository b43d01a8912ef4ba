"""The only place that starts QEMU: a child that shuts itself in and is told what to become.

The two talk over channels of the child's own. On the line, a socket, the child says first of all
that it is there, then is told its cell, then its jail and its command line, and at last to go. On
the report, a pipe, it says what failed; that closes as the child becomes QEMU.
"""

import contextlib
import errno
import os
import socket
from collections.abc import Callable, Collection, Sequence
from functools import cache
from typing import Final, NoReturn

import msgspec
from attrs import evolve, frozen

from hypervisor.descriptors import identity_of
from hypervisor.errors import JailFailed
from hypervisor.jail import (
    Cell,
    Jail,
    duplicate_above,
    enter,
    enter_cell,
    execute,
    make_namespaces,
)
from kvmsec.linux import children, forking, passing, processes, syscalls
from kvmsec.linux.processes import ProcessId
from kvmsec.linux.readiness import has_left, is_readable

_ENVIRONMENT: Final = {"PATH": "/usr/bin", "LC_ALL": "C"}
BORN: Final = b"b"
"""What a child says first of all: that it is there."""
_DESCRIPTORS: Final = b"d"
_GO: Final = b"g"
_EXECUTING: Final = b"x"
ALONE: Final = 125
"""The exit status of a child, or a spare, whose launcher is gone."""
_GONE: Final = "the process that was to make a child is gone; the next start makes another"
_KILLED: Final = "the process was killed before it could start QEMU"
_MOST_AT_ONCE: Final = 253  # SCM_MAX_FD, linux/include/net/scm.h
_LIMIT_BYTES: Final = 1 << 18  # The kernel's own is less, unless net.core.wmem_default was raised.
_BIRTH_S: Final = 10.0
_UNCHARGED_BYTES: Final = 64 << 10
"""Of an instance's boot files, where to charge them to its group would cost 3 ms of its start."""


@frozen
class _Order:
    """What a child is to become; `held` are the numbers of the descriptors that come with it."""

    jail: Jail
    program: str
    argv: tuple[str, ...]
    held: tuple[int, ...]


@cache
def _cell_decoder() -> msgspec.msgpack.Decoder[Cell]:
    return msgspec.msgpack.Decoder(Cell)


@cache
def _order_decoder() -> msgspec.msgpack.Decoder[_Order]:
    return msgspec.msgpack.Decoder(_Order)


def prepare_decoders() -> None:
    """Make what reads a cell and an order, which takes a fifth of a millisecond for each."""
    _cell_decoder()
    _order_decoder()


@frozen
class Ends:
    """The child's ends of the channels to its launcher."""

    line: socket.socket
    report: int

    def close(self) -> None:
        """Close them in a process that isn't the child."""
        self.line.close()
        os.close(self.report)

    def tell(self, failure: JailFailed) -> None:
        """Say what failed, to whoever waits for the child to become QEMU."""
        # A path may be no text.
        said = failure.detail[:1024].encode(errors="backslashreplace").decode()
        told = {"step": failure.step, "errno": failure.errno, "detail": said}
        with contextlib.suppress(BrokenPipeError):
            os.write(self.report, msgspec.json.encode(told))


@frozen
class Origin:
    """What a child goes on from: a pidfd of that, and where it tells that the child is there."""

    pidfd: int
    tell: int

    def hold(self) -> set[int]:
        return {self.pidfd, self.tell}

    def close(self) -> None:
        for descriptor in self.hold():
            os.close(descriptor)


class Newborn:
    """A child that waits, shut in more and more, until it is released and becomes QEMU.

    It is asked for, told its cell and what to become, and released, in this order. Some time before
    the last it is heard of, and the launcher writes down whose process it is. Should the launcher
    die before, the kernel ends the child with it: no unknown QEMU can be left behind.
    """

    def __init__(self, ask: Callable[[Ends], None], cpus: Collection[int] = ()) -> None:
        """`ask` has a child made that goes through `live`; raises what that raises.

        cpus: the processors that it is to run on, should it be born to fewer.
        """
        with contextlib.ExitStack() as undo, contextlib.ExitStack() as theirs:
            self.line, line = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
            undo.callback(self.line.close)
            theirs.callback(line.close)
            self._report, report = os.pipe2(os.O_CLOEXEC)
            undo.callback(os.close, self._report)
            theirs.callback(os.close, report)
            # Kept for its word: a child that is there must be heard of, whatever else is open.
            self._places = [os.dup(self._report)]
            undo.callback(self._free_places)
            self._places.append(os.dup(self._report))
            ask(Ends(line, report))
            undo.pop_all()
        self._cpus = cpus
        self.pidfd = -1
        self._origin = -1
        self.process: ProcessId

    @property
    def is_known(self) -> bool:
        """Whether it was heard of: its end, and its pidfd, are the caller's affair from then on."""
        return self.pidfd >= 0

    def hear(self) -> None:
        """Take its first word, once the line is readable, and know `process` and `pidfd`.

        Raises JailFailed where there is no child, ProcessLookupError where /proc shows none, and
        OSError; no child is left then.
        """
        word = self._first_word()
        if not word:
            raise _failure(_words(self._report)) or JailFailed("fork", 0, _GONE)
        pidfd, *origin = word
        process = None
        try:
            pid = processes.pid_of(pidfd)
            process = None if pid is None else processes.identify(pid)
        finally:
            if process is None:
                end_all(word)
        if process is None:
            # Ended already, and not kept for us: SIGCHLD is ignored.
            raise _failure(_words(self._report)) or ProcessLookupError(
                "/proc does not show the new process: is it mounted?"
            )
        self.pidfd, self.process = pidfd, process
        self._origin = origin[0] if origin else -1
        if self._cpus:
            with contextlib.suppress(OSError):  # None of them is left: it stays where it may be.
                os.sched_setaffinity(process.pid, self._cpus)

    def _first_word(self) -> list[int]:
        """Pidfds of the child and of what it came from; none when the line closes first."""
        self._free_places()
        with contextlib.suppress(ConnectionResetError):
            said, descriptors = passing.receive(self.line, len(BORN), 2)
            if said and not descriptors:
                raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))
            return descriptors
        return []

    def _free_places(self) -> None:
        while self._places:
            os.close(self._places.pop())

    def leave_origin(self) -> None:
        """Kill the process that it came from, which only sleeps: it runs nothing any more then.

        No sooner than it must be, since to take its memory apart holds up a QEMU that starts.
        `close` waits for its end.
        """
        if self._origin >= 0:
            processes.kill(self._origin)

    def _end_origin(self) -> None:
        if self._origin >= 0:
            end_all([self._origin])
            self._origin = -1

    def enter(self, cell: Cell) -> None:
        """Have it take the first steps, and wait for the rest. Raises OSError."""
        self._tell(msgspec.msgpack.encode(cell), (cell.tree,))

    def become(self, jail: Jail, program: str, argv: Sequence[str]) -> None:
        """Have it shut itself in, with these descriptors and no other, and wait for `release`.

        It was heard of, and told the jail's cell, before. Raises JailFailed for what no message
        holds, and OSError; the child is there then.
        """
        self.jail = jail
        if sum(file.size_bytes for file in jail.boot_files) > _UNCHARGED_BYTES:
            self._end_origin()  # The copies would be charged to it.
        # Looked up now: the launcher closes its own copies before QEMU's are checked.
        self.granted = frozenset(map(identity_of, (*jail.descriptors.values(), jail.log)))
        held = jail.held
        order = msgspec.msgpack.encode(_Order(jail, program, tuple(argv), held))
        try:
            if len(order) > _LIMIT_BYTES:
                raise OSError(errno.EMSGSIZE, os.strerror(errno.EMSGSIZE))
            self._tell(order, held)
        except OSError as error:
            if error.errno != errno.EMSGSIZE:
                raise
            detail = f"the command line is too long: {len(order)} bytes with the jail's own"
            raise JailFailed("order", errno.EMSGSIZE, detail) from None

    def _tell(self, order: bytes, descriptors: Sequence[int]) -> None:
        try:
            for start in range(0, len(descriptors), _MOST_AT_ONCE):
                some = descriptors[start : start + _MOST_AT_ONCE]
                socket.send_fds(self.line, [_DESCRIPTORS], some)
            self.line.send(order)
        except (BrokenPipeError, ConnectionResetError):
            pass  # It failed already: `executed` says where.

    def release(self) -> None:
        """Let it execute QEMU once its jail stands. If it failed before, `executed` says where."""
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):
            self.line.send(_GO)

    def fileno(self) -> int:
        """A descriptor that is readable once the child has become QEMU, or failed to."""
        return self._report

    def executed(self) -> None:
        """Return when the child has become QEMU; raises JailFailed with what went wrong.

        What QEMU does from then on, its end included, is another question.
        """
        _require_executed(self._report)

    def close(self) -> None:
        """Free the channels, and end the process that the child came from.

        A child that was heard of is not touched; any other is ended.
        """
        if self._report < 0:
            return
        if not self.is_known and is_readable(self.line.fileno(), _BIRTH_S):
            end_all(self._first_word())
        self._end_origin()
        self._free_places()
        self.line.close()
        os.close(self._report)
        self._report = -1


def _require_executed(report: int) -> None:
    words = _words(report)
    if words != _EXECUTING:
        raise _failure(words) or JailFailed("exec", 0, _KILLED)


def _words(report: int) -> bytes:
    """All that a child says until it has become QEMU, or is gone."""
    words = b""
    while chunk := os.read(report, 4096):
        words += chunk
    return words


def _failure(words: bytes) -> JailFailed | None:
    """What failed, in a child's words; None when it said nothing of the kind."""
    try:
        failure = msgspec.json.decode(words.removeprefix(_EXECUTING))
        step, number, detail = failure["step"], failure["errno"], failure["detail"]
    except (ValueError, TypeError, KeyError):
        return None
    return JailFailed(str(step), int(number), str(detail))


def end_all(pidfds: Sequence[int]) -> None:
    """Kill children of the caller's, collect them, and close these descriptors of them."""
    for pidfd in pidfds:
        processes.kill(pidfd)
        with contextlib.suppress(ChildProcessError):
            os.waitid(os.P_PIDFD, pidfd, os.WEXITED)
        os.close(pidfd)


def spawn(jail: Jail, program: str, argv: Sequence[str]) -> Newborn:
    """A child of the calling process's own forking that is to become `program`, up to `release`.

    Raises ManyThreads when the calling process has more than one, OSError when it can't fork, and
    JailFailed; no process and no descriptor is left then.
    """

    def fork(ends: Ends) -> None:
        pid, pidfd = forking.clone_init()
        if pid == 0:
            live(ends, jail.cell.kinds_made_before)
        os.close(pidfd)

    newborn = Newborn(fork)
    try:
        if not is_readable(newborn.line.fileno(), _BIRTH_S):
            raise JailFailed("fork", 0, _GONE)
        newborn.hear()
        newborn.enter(jail.cell)
        newborn.become(jail, program, argv)
    except BaseException:
        if newborn.is_known:
            end_all([newborn.pidfd])
        newborn.close()
        raise
    return newborn


# The child -----------------------------------------------------------------------------------


def live(ends: Ends, lacking: int = 0, origin: Origin | None = None) -> NoReturn:
    """The child's whole life as Python; it must never return into the code that forked it.

    lacking: the kinds of namespaces that it was to be born in, and was not. origin: what it came
    from, which is the launcher's to end.
    """
    try:
        try:
            if lacking:
                make_namespaces(lacking)
            line = ends.line.fileno()
            held = origin.hold() if origin else set()
            children.close_all_but({0, 1, 2, line, ends.report, *held})
            _end_with_launcher(line)
            _say_that_it_lives(ends.line, origin)
            _enter_cell(ends.line)
            order = _receive_order(ends.line)
            # Above every number that the jail hands out, so that neither is overwritten.
            above = max(order.jail.descriptors, default=2) + 1
            ends = evolve(ends, report=duplicate_above(ends.report, above))
            _become(order, duplicate_above(line, above), ends.report)
        except ConnectionError:
            os._exit(ALONE)
        except JailFailed as error:
            ends.tell(error)
        except OSError as error:
            ends.tell(JailFailed("exec", error.errno or 0, str(error)))
        except BaseException as error:
            ends.tell(JailFailed("jail", 0, repr(error)))
    finally:
        os._exit(126)


def _end_with_launcher(line: int) -> None:
    """Be ended as soon as the launcher is; said again whenever ids change, which undoes it.

    Once its launcher is gone another command may clean the uid and lease it anew: the child must
    not take it after that.
    """
    syscalls.end_with_parent()
    if has_left(line):  # It was gone before; the first process of a namespace sees no parent.
        os._exit(ALONE)


def _say_that_it_lives(line: socket.socket, origin: Origin | None) -> None:
    """By a descriptor of this very process: its pid here is another than the launcher's for it."""
    pidfd = os.pidfd_open(os.getpid())
    socket.send_fds(line, [BORN], [pidfd] if origin is None else [pidfd, origin.pidfd])
    os.close(pidfd)
    if origin is not None:
        with contextlib.suppress(BrokenPipeError):  # The nursery is gone.
            os.write(origin.tell, BORN)
        origin.close()


def _enter_cell(line: socket.socket) -> None:
    said, received = _hear(line)
    _require_all(received, 1)
    (tree,) = received
    enter_cell(evolve(_cell_decoder().decode(said), tree=tree))
    os.close(tree)


def _receive_order(line: socket.socket) -> _Order:
    """What the launcher wants, with the descriptors by the numbers that they have here."""
    said, received = _hear(line)
    order = _order_decoder().decode(said)
    _require_all(received, len(order.held))
    jail = order.jail.renumbered(dict(zip(order.held, received, strict=True)))
    return evolve(order, jail=jail)


def _hear(line: socket.socket) -> tuple[bytes, list[int]]:
    """One thing that the launcher says, and the descriptors that it sent before."""
    received: list[int] = []
    while True:
        said, descriptors = passing.receive(line, _LIMIT_BYTES, _MOST_AT_ONCE)
        if not said:
            os._exit(ALONE)
        received += descriptors
        if said != _DESCRIPTORS:
            return said, received


def _require_all(received: Collection[int], wanted: int) -> None:
    if len(received) < wanted:  # The kernel leaves out what has no number any more.
        detail = f"{wanted} are granted: too many for its limit of open files"
        raise JailFailed("descriptors", errno.EMFILE, detail)


def _become(order: _Order, line: int, report: int) -> None:
    _end_with_launcher(line)  # Before it takes the uid, and after.
    enter(order.jail)
    _end_with_launcher(line)
    if os.read(line, len(_GO)) != _GO:
        os._exit(ALONE)
    syscalls.outlive_parent()
    os.write(report, _EXECUTING)
    execute(order.jail, order.program, order.argv, _ENVIRONMENT)
