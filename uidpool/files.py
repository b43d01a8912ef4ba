"""The files of a uid in the places where anybody may leave some, found and removed.

Links are not followed and mounts not entered. Everything is bounded, since the owner of the files,
or a neighbour, may have made them to keep a scan busy.
"""

import contextlib
import errno
import os
import time
from collections.abc import Callable, Iterator
from functools import partial
from typing import Final

from attrs import define, frozen

from kvmsec.linux import syscalls
from kvmsec.linux.ipc import message_queues
from kvmsec.linux.mounts import read_mount_points

PLACES: Final = ("/dev/shm", "/tmp", "/var/tmp", "/run/lock")
QUEUES: Final = "/dev/mqueue"
_SHOWN_FILES: Final = 20
_FLAGS: Final = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NONBLOCK
_STAY: Final = syscalls.RESOLVE_NO_XDEV | syscalls.RESOLVE_NO_SYMLINKS | syscalls.RESOLVE_BENEATH


@frozen
class Bounds:
    """How far a scan goes before it gives up: entries looked at, seconds, directories deep."""

    entries: int = 50_000
    seconds: float = 1.0
    depth: int = 64


@define
class Found:
    """What a scan met: some paths (the first twenty), how many, and why it stopped early."""

    paths: list[str]
    count: int = 0
    incomplete: str | None = None

    def note(self, entry: "_Entry") -> None:
        self.count += 1
        if len(self.paths) < _SHOWN_FILES:
            self.paths.append(entry.path)


class _TooMuch(Exception):
    """A bound was passed."""


@define
class _Budget:
    """What is left of the bounds. The clock is read once a directory and every 512 entries."""

    bounds: Bounds
    deadline: float
    left: int

    def spend_entry(self, path: str) -> None:
        self.left -= 1
        if self.left < 0:
            raise _TooMuch(f"more than {self.bounds.entries} files to look at, up to {path[:80]!a}")
        if not self.left % 512:
            self.check_time(path)

    def enter(self, path: str, depth: int) -> None:
        if depth > self.bounds.depth:
            raise _TooMuch(f"directories are over {self.bounds.depth} deep: {path[:80]!a}")
        self.check_time(path)

    def check_time(self, path: str) -> None:
        if time.monotonic() > self.deadline:
            raise _TooMuch(f"the scan took over {self.bounds.seconds:g} s, up to {path[:80]!a}")


@frozen
class _Entry:
    """A file or directory of the uid: where it is, and what to call to remove it."""

    path: str
    remove: Callable[[], None]


def find_files(uid: int, *, bounds: Bounds | None = None) -> Found:
    """The files of a uid in the shared places and among the message queues.

    What can't be looked at makes the answer `incomplete`; nothing is raised for it.
    """
    found = Found([])
    with _noting_why_incomplete(found):
        for entry in _entries(uid, bounds or Bounds()):
            found.note(entry)
    return found


def remove_files(uid: int, *, bounds: Bounds | None = None) -> Found:
    """Remove them; the answer holds those that could not be removed.

    A name is removed relative to a descriptor of its directory, after a look at the owner. Whoever
    could swap the name in between could as well have removed what it then stands for. Of a file
    with several names those in these places go; a directory of the uid's that holds somebody
    else's files stays, and so do they.
    """
    left = Found([])
    with _noting_why_incomplete(left):
        for entry in _entries(uid, bounds or Bounds(entries=500_000, seconds=5.0)):
            try:
                entry.remove()
            except FileNotFoundError:
                continue
            except OSError:
                left.note(entry)
    return left


@contextlib.contextmanager
def _noting_why_incomplete(found: Found) -> Iterator[None]:
    try:
        yield
    except _TooMuch as error:
        found.incomplete = str(error)
    except OSError as error:
        found.incomplete = f"{error.filename or QUEUES}: {error.strerror}"


def _entries(uid: int, bounds: Bounds) -> Iterator[_Entry]:
    budget = _Budget(bounds, time.monotonic() + bounds.seconds, bounds.entries)
    mounts = read_mount_points()
    for place in dict.fromkeys(os.path.realpath(place) for place in PLACES):
        try:
            directory = os.open(place, _FLAGS)
        except FileNotFoundError:
            continue
        try:
            yield from _walk(directory, place, uid, budget, mounts)
        finally:
            os.close(directory)
    with message_queues() as queues:
        if queues is not None:
            yield from _walk(queues, QUEUES, uid, budget, frozenset())


def _walk(
    directory: int, path: str, uid: int, budget: _Budget, mounts: frozenset[str], depth: int = 1
) -> Iterator[_Entry]:
    """What the uid owns below a directory, contents before the directory that holds them."""
    budget.enter(path, depth)
    with os.scandir(directory) as entries:
        for entry in entries:
            budget.spend_entry(path)
            inner = f"{path}/{entry.name}"
            if entry.is_dir(follow_symlinks=False):
                opened = _enter(directory, entry.name)
                if opened is None:
                    continue
                try:
                    owner = os.fstat(opened).st_uid
                    yield from _walk(opened, inner, uid, budget, mounts, depth + 1)
                finally:
                    os.close(opened)
                if owner == uid:
                    yield _Entry(inner, partial(os.rmdir, entry.name, dir_fd=directory))
            elif inner not in mounts and _owner(entry) == uid:
                yield _Entry(inner, partial(os.unlink, entry.name, dir_fd=directory))


def _enter(directory: int, name: str) -> int | None:
    """Open a directory below another; None for a mount point and for what is none any more.

    A mount point is refused before the mounted filesystem is asked anything: it may be a FUSE one
    whose server never answers.
    """
    try:
        return syscalls.openat2(directory, name, _FLAGS, resolve=_STAY)
    except OSError as error:
        if error.errno in (errno.EXDEV, errno.ENOENT, errno.ENOTDIR, errno.ELOOP):
            return None
        raise


def _owner(entry: os.DirEntry[str]) -> int | None:
    try:
        return entry.stat(follow_symlinks=False).st_uid
    except FileNotFoundError:
        return None
