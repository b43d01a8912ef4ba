"""The launcher's side of the only place that starts QEMU: a child that is told what to become.

The other side, and what the two say, is `hypervisor.child`.
"""

import contextlib
import errno
import os
import socket
from collections.abc import Callable, Sequence
from typing import Final

import msgspec

from hypervisor.child import (
    BORN,
    DESCRIPTORS,
    EXECUTING,
    GO,
    LIMIT_BYTES,
    MOST_AT_ONCE,
    Ends,
    Order,
    live,
)
from hypervisor.descriptors import identity_of
from hypervisor.errors import JailFailed
from hypervisor.jail import Cell, Jail
from kvmsec.linux import forking, passing, processes
from kvmsec.linux.children import end_all
from kvmsec.linux.processes import ProcessId
from kvmsec.linux.readiness import is_readable

_GONE: Final = "the process that was to make a child is gone; the next start makes another"
_KILLED: Final = "the process was killed before it could start QEMU"
_BIRTH_S: Final = 10.0
_UNCHARGED_BYTES: Final = 64 << 10
"""Of an instance's boot files, where to charge them to its group would cost 3 ms of its start."""


class Newborn:
    """A child that waits, shut in more and more, until it is released and becomes QEMU.

    It is asked for, told its cell, heard of, told what to become, and released, in this order.
    Before the last the launcher writes down whose process it is. Should the launcher die before,
    the kernel ends the child with it: no unknown QEMU can be left behind.
    """

    def __init__(self, ask: Callable[[Ends], None]) -> None:
        """`ask` has a child made that goes through `live`; raises what that raises."""
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
        self._words = b""
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
            raise self._failure() or JailFailed("fork", 0, _GONE)
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
            raise self._failure() or ProcessLookupError(
                "/proc does not show the new process: is it mounted?"
            )
        self.pidfd, self.process = pidfd, process
        self._origin = origin[0] if origin else -1

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
        order = msgspec.msgpack.encode(Order(jail, program, tuple(argv), held))
        try:
            if len(order) > LIMIT_BYTES:
                raise OSError(errno.EMSGSIZE, os.strerror(errno.EMSGSIZE))
            self._tell(order, held)
        except OSError as error:
            if error.errno != errno.EMSGSIZE:
                raise
            detail = f"the command line is too long: {len(order)} bytes with the jail's own"
            raise JailFailed("order", errno.EMSGSIZE, detail) from None

    def _tell(self, order: bytes, descriptors: Sequence[int]) -> None:
        try:
            for start in range(0, len(descriptors), MOST_AT_ONCE):
                some = descriptors[start : start + MOST_AT_ONCE]
                socket.send_fds(self.line, [DESCRIPTORS], some)
            self.line.send(order)
        except (BrokenPipeError, ConnectionResetError):
            pass  # It failed already: `executed` says where.

    def release(self) -> None:
        """Let it execute QEMU once its jail stands. If it failed before, `executed` says where."""
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):
            self.line.send(GO)

    def fileno(self) -> int:
        """A descriptor that is readable when `has_said_all` has something to take."""
        return self._report

    def has_said_all(self) -> bool:
        """Take what it said meanwhile, without waiting: all, once it is QEMU or has failed.

        It has not while it, or the process that it came from, is held up between its last word and
        QEMU: by somebody who stopped it, or by the disk that QEMU is on.
        """
        while is_readable(self._report, 0):
            chunk = os.read(self._report, 4096)
            if not chunk:
                return True
            self._words += chunk
        return False

    def executed(self) -> None:
        """Return when the child has become QEMU; raises JailFailed with what went wrong.

        Who must not wait for that without a limit asks `has_said_all` first. What QEMU does from
        then on, its end included, is another question.
        """
        while not self.has_said_all():
            is_readable(self._report, _BIRTH_S)
        if self._words != EXECUTING:
            raise self._failure() or JailFailed("exec", 0, _KILLED)

    def _failure(self) -> JailFailed | None:
        """What failed, in the child's words; None when it has said nothing of the kind."""
        self.has_said_all()
        try:
            failure = msgspec.json.decode(self._words.removeprefix(EXECUTING))
            step, number, detail = failure["step"], failure["errno"], failure["detail"]
        except (ValueError, TypeError, KeyError):
            return None
        return JailFailed(str(step), int(number), str(detail))

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
