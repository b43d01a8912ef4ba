"""Locks between processes: a file, an flock, and the proof that the path still is that file."""

import contextlib
import fcntl
import os
import time
from pathlib import Path
from types import TracebackType
from typing import Any, Final, Self

from kvmsec.linux.children import Child, fork_worker
from kvmsec.linux.errors import ChildTimedOut, LockBusy

PAUSES_S: Final = (*[0.001] * 5, *[0.002] * 5, *[0.005] * 8, *[0.01] * 25)
"""After each of these a lock is asked for once more, before a child waits for it: most are given
back within a millisecond, and a child takes several to be made. They grow, since many that ask
each millisecond leave its holder no time on a small machine."""


class FileLock:
    """An exclusive lock on a path, for one process at a time.

    The descriptor is close-on-exec, and no child that is made for other work keeps it
    (`children.start_child` and the jail close all but their lists): a lock is only as good as the
    number of its holders. A child that does what the lock is for does keep it: whoever is next
    must wait for that child's end as well.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._descriptor: int | None = None
        self._handed_over: int | None = None

    def try_acquire(self) -> bool:
        """Take the lock if it is free. Raises OSError when the file can't be made."""
        if self._descriptor is not None:
            raise RuntimeError(f"{self.path} is already held by this object")
        if self._handed_over is not None:
            self._descriptor, self._handed_over = self._handed_over, None
            return True
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
        pauses = iter(PAUSES_S)
        while not self.try_acquire():
            remaining_s = deadline - time.monotonic()
            if remaining_s <= 0:
                raise LockBusy(self.path)
            if (pause_s := next(pauses, None)) is not None:
                time.sleep(min(pause_s, remaining_s))
                continue
            with contextlib.suppress(ChildTimedOut):
                self.waiter().collect(remaining_s)

    def waiter(self) -> Child:
        """A child that waits for the lock in the caller's stead: flock(2) has no deadline.

        The lock belongs to the open file, which the two share: once the child has it, so has the
        caller, and the next `try_acquire` says so. Nobody meanwhile finds it held for nothing,
        and each turn costs one child. Where the file was replaced, `try_acquire` decides anew.
        """
        descriptor = _open(self.path)
        try:
            return _Waiter(self, descriptor)
        except BaseException:
            os.close(descriptor)
            raise

    @property
    def is_held(self) -> bool:
        """Whether this object has the lock."""
        return self._descriptor is not None

    def fileno(self) -> int:
        """The descriptor of the lock while it is held: it is free once nobody has this open."""
        if self._descriptor is None:
            raise RuntimeError(f"{self.path} is not held by this object")
        return self._descriptor

    def take_over(self, descriptor: int) -> None:
        """Take the lock that a waiter got, unless the path names another file by now."""
        if self._descriptor is None and self._is_still_the_path(descriptor):
            self._handed_over = descriptor
        else:
            os.close(descriptor)

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
        for descriptor in (self._descriptor, self._handed_over):
            if descriptor is not None:
                os.close(descriptor)
        self._descriptor = self._handed_over = None

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


class _Waiter(Child):
    """What `FileLock.waiter` returns: the lock is passed on with the result, or given back."""

    def __init__(self, lock: FileLock, descriptor: int) -> None:
        def wait() -> None:
            fcntl.flock(descriptor, fcntl.LOCK_EX)

        pid, pidfd, pipe = fork_worker(wait, None, [descriptor])
        super().__init__(pid, pidfd, pipe, f"waiting for {lock.path}")
        self._lock = lock
        self._descriptor = descriptor

    def result(self) -> Any:
        super().result()
        descriptor, self._descriptor = self._descriptor, -1
        self._lock.take_over(descriptor)

    def close(self) -> None:
        super().close()
        if self._descriptor >= 0:
            os.close(self._descriptor)
            self._descriptor = -1


def _open(path: Path) -> int:
    return os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
