"""Locks between processes: a file, an flock, and the proof that the path still is that file."""

import contextlib
import fcntl
import os
import select
import signal
import time
from pathlib import Path
from types import TracebackType
from typing import Self

from kvmsec.linux.errors import LockBusy


class FileLock:
    """An exclusive lock on a path, for one process at a time.

    The descriptor is close-on-exec, and a child made for other work must not keep it (the jail
    closes all but its list): a lock is only as good as the number of its holders.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._descriptor: int | None = None

    @property
    def is_held(self) -> bool:
        return self._descriptor is not None

    def acquire(self, timeout_s: float | None = None) -> None:
        """Take the lock, waiting at most `timeout_s` seconds (None: for ever; 0: not at all).

        Raises LockBusy when somebody else keeps it, and OSError when the file can't be made.
        """
        if self._descriptor is not None:
            raise RuntimeError(f"{self.path} is already held by this object")
        deadline = None if timeout_s is None else time.monotonic() + timeout_s
        while True:
            descriptor = os.open(
                self.path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600
            )
            try:
                self._lock(descriptor, deadline)
                if self._is_still_the_path(descriptor):
                    self._descriptor = descriptor
                    return
            except BaseException:
                os.close(descriptor)
                raise
            os.close(descriptor)

    def _lock(self, descriptor: int, deadline: float | None) -> None:
        if deadline is None:
            fcntl.flock(descriptor, fcntl.LOCK_EX)
            return
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            remaining = deadline - time.monotonic()
            if remaining <= 0 or not _lock_in_child(descriptor, remaining):
                raise LockBusy(self.path) from None

    def _is_still_the_path(self, descriptor: int) -> bool:
        """Whether the path still names the file that was locked, and not a later one."""
        ours = os.fstat(descriptor)
        try:
            theirs = os.stat(self.path, follow_symlinks=False)
        except FileNotFoundError:
            return False
        return (ours.st_dev, ours.st_ino) == (theirs.st_dev, theirs.st_ino)

    def release(self) -> None:
        """Give the lock back; the file stays, so that its inode keeps its meaning."""
        if self._descriptor is not None:
            descriptor, self._descriptor = self._descriptor, None
            os.close(descriptor)

    def discard(self) -> None:
        """Remove the file, then give the lock back: whoever waited for it finds a new file."""
        if self._descriptor is not None:
            with contextlib.suppress(FileNotFoundError):
                self.path.unlink()
            self.release()

    def __enter__(self) -> Self:
        if self._descriptor is None:
            self.acquire()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.release()


def _lock_in_child(descriptor: int, timeout_s: float) -> bool:
    """Wait for an flock with a deadline and without polling.

    The lock belongs to the open file, which a forked child shares: the child blocks in flock(2),
    and once it has ended well the lock is the parent's too.
    """
    child = os.fork()
    if child == 0:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX)
            os._exit(0)
        except BaseException:
            os._exit(1)
    watch = os.pidfd_open(child)
    try:
        select.select([watch], [], [], timeout_s)
        with contextlib.suppress(ProcessLookupError):
            signal.pidfd_send_signal(watch, signal.SIGKILL)
        _, status = os.waitpid(child, 0)
    finally:
        os.close(watch)
    return os.waitstatus_to_exitcode(status) == 0
