"""The right to act on an instance among the processes of this node: a lock for each name."""

from collections.abc import Iterator
from contextlib import contextmanager

from kvmsec.linux.locks import FileLock
from kvmsec.paths import Paths


@contextmanager
def try_turn(paths: Paths, name: str) -> Iterator[bool]:
    """Whether nobody else acts on an instance; if so, nobody will meanwhile.

    Raises BadName and OSError.
    """
    lock = FileLock(paths.instance_lock(name))
    try:
        yield lock.try_acquire()
    finally:
        give_back(paths, name, lock)


def give_back(paths: Paths, name: str, lock: FileLock) -> None:
    """Release an instance's lock; of an instance that is gone, no lock file stays either."""
    if paths.instance(name).directory.exists():
        lock.release()
    else:
        lock.discard()
