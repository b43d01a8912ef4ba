"""Locks between processes: a file, an flock, and the proof that the path still is that file."""

import contextlib
import fcntl
import os
import time
from pathlib import Path
from types import TracebackType
from typing import Self

from kvmsec.linux.children import Child, start_child
from kvmsec.linux.errors import ChildTimedOut, LockBusy


class FileLock:
    """An exclusive lock on a path, for one process at a time.

    The descriptor is close-on-exec, and no child that is made for other work keeps it
    (`children.start_child` and the jail close all but their lists): a lock is only as good as the
    number of its holders.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._descriptor: int | None = None

    @property
    def is_held(self) -> bool:
        return self._descriptor is not None

    def try_acquire(self) -> bool:
        """Take the lock if it is free. Raises OSError when the file can't be made."""
        if self._descriptor is not None:
            raise RuntimeError(f"{self.path} is already held by this object")
        while True:
            descriptor = _open(self.path)
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                if self._is_still_the_path(descriptor):
                    self._descriptor = descriptor
                    return True
            except BlockingIOError:
                os.close(descriptor)
                return False
            except BaseException:
                os.close(descriptor)
                raise
            os.close(descriptor)

    def acquire(self, timeout_s: float = 60.0) -> None:
        """Take the lock, waiting at most `timeout_s` seconds (0: not at all).

        Raises LockBusy when somebody else keeps it, and OSError when the file can't be made.
        """
        deadline = time.monotonic() + timeout_s
        while not self.try_acquire():
            remaining = deadline - time.monotonic()
            if remaining <= 0:
                raise LockBusy(self.path)
            with contextlib.suppress(ChildTimedOut):
                self.waiter().collect(remaining)

    def waiter(self) -> Child:
        """A child that ends once the lock was free: flock(2) has no deadline of its own.

        Another may have been quicker by then, so that `try_acquire` still decides.
        """
        return start_child(self._wait, what=f"waiting for {self.path}")

    def _wait(self) -> None:
        fcntl.flock(_open(self.path), fcntl.LOCK_EX)

    def _is_still_the_path(self, descriptor: int) -> bool:
        """Whether the path still names the file that was locked, and not a later one."""
        ours = os.fstat(descriptor)
        try:
            theirs = self.path.lstat()
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


def _open(path: Path) -> int:
    return os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
