"""Work that is done in a child process: as somebody else, or because it may block or be attacked.

The result comes back as JSON over a pipe, so that a child that was taken over can send data but
no objects. The calling process must have one thread (a fork copies only the caller's).
"""

import contextlib
import json
import os
import select
import signal
import time
from collections.abc import Callable, Collection
from types import TracebackType
from typing import Any, Final, NoReturn, Self

from kvmsec.linux.credentials import Credentials, become
from kvmsec.linux.errors import ChildFailed, ChildTimedOut

RESULT_LIMIT_BYTES: Final = 1 << 20
_MAX_DESCRIPTOR: Final = 2**31 - 1


class Child:
    """A forked child that is at work; `collect` its result once `fileno` is readable."""

    def __init__(self, pid: int, pipe: int, what: str) -> None:
        self.pid = pid
        self.what = what
        self._pipe = pipe
        self._received = bytearray()
        self._is_reaped = False

    def fileno(self) -> int:
        """A descriptor that is readable when there is something to `receive`."""
        return self._pipe

    def receive(self) -> bool:
        """Take what is there without waiting; True once the child has said all."""
        chunk = os.read(self._pipe, 1 << 16)
        self._received += chunk
        if len(self._received) > RESULT_LIMIT_BYTES:
            self.kill()
            raise ChildFailed(self.what, "OverflowError", "sent more than 1 MiB")
        return not chunk

    def result(self) -> Any:
        """The value that the function returned, once `receive` said True; raises ChildFailed."""
        status = self._reap()
        try:
            answer = json.loads(self._received)
            if "value" in answer:
                return answer["value"]
            kind, detail = str(answer["kind"]), str(answer["detail"])
        except (ValueError, KeyError, TypeError):
            kind, detail = "ChildProcessError", f"the child ended with status {status}"
        raise ChildFailed(self.what, kind, detail)

    def collect(self, timeout_s: float) -> Any:
        """Wait at most `timeout_s` seconds for the result; raises ChildFailed, ChildTimedOut."""
        deadline = time.monotonic() + timeout_s
        with self:
            while True:
                remaining = deadline - time.monotonic()
                if remaining <= 0 or not select.select([self._pipe], [], [], remaining)[0]:
                    raise ChildTimedOut(self.what, timeout_s)
                if self.receive():
                    return self.result()

    def kill(self) -> None:
        """End the child if it is still there, and take its zombie."""
        if not self._is_reaped:
            # Our own unreaped child: its pid can't have become somebody else's.
            os.kill(self.pid, signal.SIGKILL)
            self._reap()

    def _reap(self) -> int:
        if self._is_reaped:
            return 0
        _, status = os.waitpid(self.pid, 0)
        self._is_reaped = True
        return os.waitstatus_to_exitcode(status)

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


def start_child(
    function: Callable[[], Any],
    *,
    what: str,
    credentials: Credentials | None = None,
    keep: Collection[int] = (),
) -> Child:
    """Fork a child that becomes `credentials` (where given) and runs `function`.

    `what` names the work in errors ("reading the header of disk.qcow2"). The child has no
    descriptor of the parent's (a lock, a socket) but 0, 1, 2 and those in `keep`.
    """
    reader, writer = os.pipe2(os.O_CLOEXEC)
    try:
        pid = os.fork()
    except BaseException:
        os.close(reader)
        os.close(writer)
        raise
    if pid == 0:
        os.close(reader)
        _work(function, credentials, writer, keep)
    os.close(writer)
    return Child(pid, reader, what)


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
) -> NoReturn:
    """The child's whole life; it must never return into the parent's code."""
    status = 1
    try:
        _reset_signals()
        close_all_but({0, 1, 2, writer, *keep})
        try:
            if credentials is not None:
                become(credentials)
            answer: dict[str, Any] = {"value": function()}
            status = 0
        except BaseException as error:
            answer = {"kind": type(error).__name__, "detail": str(error)}
        data = memoryview(json.dumps(answer).encode())
        with contextlib.suppress(BrokenPipeError):
            while data:
                data = data[os.write(writer, data) :]
    finally:
        os._exit(status)


def close_all_but(keep: Collection[int]) -> None:
    """Close every descriptor of the calling process that is not in `keep`."""
    start = 0
    for descriptor in sorted(keep):
        # An empty range that starts at 0 would close everything: 0 - 1 wraps around.
        if start < descriptor:
            os.closerange(start, descriptor)
        start = descriptor + 1
    os.closerange(start, _MAX_DESCRIPTOR)


def _reset_signals() -> None:
    """Give the signals that an event loop may have taken back to the kernel's defaults."""
    signal.set_wakeup_fd(-1)
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGCHLD, signal.SIGHUP):
        signal.signal(number, signal.SIG_DFL)
