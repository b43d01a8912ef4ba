"""Work that is done in a child process: as somebody else, or because it may block or be attacked.

The result comes back as JSON over a pipe, so that a child that was taken over can send data but
no objects. The calling process must have one thread (a fork copies only the caller's).
"""

import contextlib
import fcntl
import json
import os
import signal
import time
from collections.abc import Callable, Collection, Sequence
from types import TracebackType
from typing import Any, Final, NoReturn, Self

from kvmsec.linux import processes, syscalls
from kvmsec.linux.credentials import Credentials, become
from kvmsec.linux.errors import ChildFailed, ChildTimedOut
from kvmsec.linux.forking import fork
from kvmsec.linux.readiness import is_readable

RESULT_LIMIT_BYTES: Final = 1 << 20
_DETAIL_LIMIT_CHARS: Final = 4096
_MAX_DESCRIPTOR: Final = 2**31 - 1
_STANDARD: Final = (0, 1, 2)


class Child:
    """A forked child that is at work; `collect` its result once `fileno` is readable."""

    def __init__(self, pid: int, pidfd: int, pipe: int, what: str) -> None:
        self.pid = pid
        self.what = what
        self._pidfd = pidfd
        self._pipe = pipe
        self._received = bytearray()

    def fileno(self) -> int:
        """A descriptor that is readable when there is something to `receive`."""
        return self._pipe

    def receive(self) -> bool:
        """Take what is there without waiting; True once the child has said all.

        Raises ChildFailed for one that says more than 1 MiB, which is ended.
        """
        chunk = os.read(self._pipe, 1 << 16)
        self._received += chunk
        if len(self._received) > RESULT_LIMIT_BYTES:
            self.kill()
            raise ChildFailed(self.what, "OverflowError", "sent more than 1 MiB")
        return not chunk

    def result(self) -> Any:
        """The value that the function returned, once `receive` said True; raises ChildFailed."""
        # It has said all. One that closed its pipe and stays (it was taken over) is ended.
        status = self.kill()
        try:
            answer = json.loads(self._received)
            if "value" in answer:
                return answer["value"]
            kind, detail = str(answer["kind"]), str(answer["detail"])
        except (ValueError, KeyError, TypeError, RecursionError):
            kind, detail = "ChildProcessError", f"the child {status} without a result"
        raise ChildFailed(self.what, kind, detail)

    def collect(self, timeout_s: float) -> Any:
        """Wait at most `timeout_s` seconds for the result; raises ChildFailed, ChildTimedOut."""
        deadline = time.monotonic() + timeout_s
        with self:
            while True:
                remaining = deadline - time.monotonic()
                if remaining <= 0 or not is_readable(self._pipe, remaining):
                    raise ChildTimedOut(self.what, timeout_s)
                if self.receive():
                    return self.result()

    def kill(self) -> str:
        """End the child if it is still there, take its zombie, and say how it ended.

        By its descriptor: in a process that ignores SIGCHLD, or has others wait for any child of
        its, the pid may mean somebody else by now.
        """
        if self._pidfd < 0:
            return "was gone"
        with contextlib.suppress(ProcessLookupError):
            signal.pidfd_send_signal(self._pidfd, signal.SIGKILL)
        try:
            ended = os.waitid(os.P_PIDFD, self._pidfd, os.WEXITED)
        except ChildProcessError:
            return "ended, unseen,"
        finally:
            os.close(self._pidfd)
            self._pidfd = -1
        assert ended is not None  # waitid(2) has none only where it may return at once.
        if ended.si_code == os.CLD_EXITED:
            return f"exited with status {ended.si_status}"
        return f"was ended by signal {ended.si_status}"

    def close(self) -> None:
        """End the child and free what belongs to it."""
        if self._pipe >= 0:
            os.close(self._pipe)
            self._pipe = -1
        self.kill()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()


def end_all(pidfds: Sequence[int]) -> None:
    """Kill children of the caller's, collect them, and close these descriptors of them."""
    for pidfd in pidfds:
        processes.kill(pidfd)
        with contextlib.suppress(ChildProcessError):
            os.waitid(os.P_PIDFD, pidfd, os.WEXITED)
        os.close(pidfd)


def start_child(
    function: Callable[[], Any],
    *,
    what: str,
    credentials: Credentials | None = None,
    keep: Collection[int] = (),
) -> Child:
    """Fork a child that becomes `credentials` (where given) and runs `function`.

    `what` names the work in errors ("reading the header of disk.qcow2"). The child has nothing of
    the parent's (a lock, a socket, a terminal) but the descriptors in `keep`, and ends with it.
    """
    return Child(*fork_worker(function, credentials, keep), what)


def fork_worker(
    function: Callable[[], Any], credentials: Credentials | None, keep: Collection[int]
) -> tuple[int, int, int]:
    """Fork the child of `start_child`; returns its pid, its pidfd and the pipe of its result."""
    with contextlib.ExitStack() as undo:
        reader, writer = os.pipe2(os.O_CLOEXEC)
        undo.callback(os.close, reader)
        parent = os.getpid()
        try:
            pid = fork()
            if pid == 0:
                _work(function, credentials, writer, keep, parent)
        finally:
            os.close(writer)
        pidfd = adopt(pid)
        undo.pop_all()
    return pid, pidfd, reader


def adopt(pid: int) -> int:
    """The pidfd of a child that was forked just now; without one (EMFILE) the child is ended.

    -1 where it has ended already and nobody will ever see how, since SIGCHLD is ignored.
    """
    try:
        pidfd = processes.pidfd_of(pid)
        return -1 if pidfd is None else pidfd
    except BaseException:
        with contextlib.suppress(ProcessLookupError, ChildProcessError):
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)
        raise


def run_in_child(
    function: Callable[[], Any],
    *,
    what: str,
    timeout_s: float,
    credentials: Credentials | None = None,
    keep: Collection[int] = (),
) -> Any:
    """Run `function` in a child process and return its JSON-able result.

    Raises ChildFailed with the name and text of what the function raised, and ChildTimedOut after
    `timeout_s` seconds (the child is killed). No zombie is left either way.
    """
    child = start_child(function, what=what, credentials=credentials, keep=keep)
    return child.collect(timeout_s)


def _work(
    function: Callable[[], Any],
    credentials: Credentials | None,
    writer: int,
    keep: Collection[int],
    parent: int,
) -> NoReturn:
    """The child's whole life; it must never return into the parent's code."""
    status = 1
    try:
        signal.signal(signal.SIGPIPE, signal.SIG_IGN)  # As everywhere in Python: an error instead.
        os.setsid()
        writer = _keep_only(writer, keep)
        answer = _answer(function, credentials, parent)
        with contextlib.suppress(BrokenPipeError):
            while answer:
                answer = answer[os.write(writer, answer) :]
        status = 0
    finally:
        os._exit(status)


def _keep_only(writer: int, keep: Collection[int]) -> int:
    """Close what isn't in `keep`; returns the pipe's number then.

    No terminal either: whoever takes the child over could read and type there.
    """
    writer = fcntl.fcntl(writer, fcntl.F_DUPFD_CLOEXEC, len(_STANDARD))
    null = os.open("/dev/null", os.O_RDWR | os.O_CLOEXEC)
    for number in _STANDARD:
        if number not in keep:
            os.dup2(null, number)
    close_all_but({*_STANDARD, writer, *keep})
    return writer


def _answer(
    function: Callable[[], Any], credentials: Credentials | None, parent: int
) -> memoryview:
    try:
        # Before as well: what becomes a uid when its parent is gone comes after all that the next
        # command does to have nothing left of that uid, and leaves keyrings of its own.
        _end_with(parent)
        if credentials is not None:
            become(credentials)
            _end_with(parent)
        answer = json.dumps({"value": function()})
    except BaseException as error:
        detail = str(error)[:_DETAIL_LIMIT_CHARS]
        answer = json.dumps({"kind": type(error).__name__, "detail": detail})
    return memoryview(answer.encode())


def _end_with(parent: int) -> None:
    """Have the kernel end this process with its parent; a change of credentials forgets that."""
    syscalls.end_with_parent()
    if os.getppid() != parent:
        os._exit(1)


def close_all_but(keep: Collection[int]) -> None:
    """Close every descriptor of the calling process that is not in `keep`."""
    start = 0
    for descriptor in sorted(keep):
        # An empty range that starts at 0 would close everything: 0 - 1 wraps around.
        if start < descriptor:
            os.closerange(start, descriptor)
        start = descriptor + 1
    os.closerange(start, _MAX_DESCRIPTOR)
