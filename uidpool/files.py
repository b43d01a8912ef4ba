"""The files of a uid in the places where anybody may leave some, found and removed.

Links are not followed and mounts not entered. Whoever may write to these places may also try to
keep a scan busy, so that no uid is ever found clean. What each of the bounds lets him do:

- Files and directories of others are not counted, for a count is used up by anybody within a
  second (50,000 files, as it was once). They cost the scan its time, some 4 us each and 20 us a
  directory, and in twenty seconds that is millions: as many as a filesystem has inodes for (the
  tmpfs that systemd mounts at /tmp has one million).
- Nor is depth a bound, which a chain of a few hundred directories would pass. One descriptor is
  held a level, whatever a path's length, and a child that was made for the scan has as many as the
  kernel gives any process (half a million levels).
- The directories that wait for their turn are kept in memory: a million of them, some 100 MiB.

So whoever wants to be in the way must keep millions of files there, which no other user of that
filesystem would overlook, and is named: the answer says whose most of them are. What was not
looked at is never taken for clean, however it came about: a file of the uid's that a neighbour may
execute with the uid's rights (set-uid) would be as good as the uid.
"""

import contextlib
import errno
import os
import resource
import time
from collections import Counter
from collections.abc import Callable, Iterator
from functools import cached_property, partial
from pathlib import Path
from typing import Final

from attrs import define, field, frozen

from kvmsec.linux import syscalls
from kvmsec.linux.ipc import message_queues
from kvmsec.linux.mounts import read_mount_points

PLACES: Final = ("/dev/shm", "/tmp", "/var/tmp", "/run/lock")
QUEUES: Final = "/dev/mqueue"
_SHOWN_FILES: Final = 20
_DESCRIPTORS: Final = 1 << 19
_PATH_MAX: Final = 4096
_FLAGS: Final = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NONBLOCK
_STAY: Final = syscalls.RESOLVE_NO_XDEV | syscalls.RESOLVE_NO_SYMLINKS | syscalls.RESOLVE_BENEATH


@frozen
class Bounds:
    """How far a scan goes before it gives up; None: not bounded by that.

    Seconds, entries that are looked at, directories deep, and directories that wait for their turn.
    """

    seconds: float = 20.0
    entries: int | None = None
    depth: int | None = None
    waiting: int = 1_000_000


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
    """What was spent of the bounds. The clock is read once a directory and every 128 entries."""

    bounds: Bounds
    deadline: float
    entries: int = 0
    waiting: int = 0
    owners: Counter[int | None] = field(factory=Counter)

    def spend_entry(self, path: str) -> None:
        self.entries += 1
        if self.bounds.entries is not None and self.entries > self.bounds.entries:
            raise self._too_much(f"more than {self.bounds.entries} files to look at", path)
        if not self.entries % 128:
            self._check_time(path)

    def hold(self, path: str) -> None:
        self.waiting += 1
        if self.waiting > self.bounds.waiting:
            raise self._too_much(f"more than {self.bounds.waiting} directories wait", path)

    def enter(self, path: str, depth: int) -> None:
        if self.bounds.depth is not None and depth > self.bounds.depth:
            raise self._too_much(f"directories are over {self.bounds.depth} deep", path)
        self._check_time(path)

    def _check_time(self, path: str) -> None:
        if time.monotonic() > self.deadline:
            raise self._too_much(f"the scan took over {self.bounds.seconds:g} s", path)

    def _too_much(self, what: str, path: str) -> _TooMuch:
        said = f"{what}, up to {path[:80]!a}"
        for owner, count in self.owners.most_common(1):
            said += f"; {count} of {self.entries} files looked at are uid {owner}'s"
        return _TooMuch(said)


@frozen
class _Entry:
    """A file or directory of the uid: where it is, and what to call to remove it."""

    path: str
    remove: Callable[[], None]


@define
class _Directory:
    """A directory that is being looked through, and the names of those in it that still wait.

    `path` is cut where it is longer than any that can be named, lest a deep chain's fill the
    memory: it is shown, and told from mount points, which are shorter.
    """

    descriptor: int
    name: str
    path: str
    is_ours: bool = False
    waiting: list[str] = field(factory=list)

    def inner(self, name: str) -> str:
        return f"{self.path}/{name}" if len(self.path) < _PATH_MAX else self.path


def let_look_deep() -> None:
    """Let the calling process, a child that was made for a scan, go as deep as there may be."""
    _, allowed = resource.getrlimit(resource.RLIMIT_NOFILE)
    for count in (min(_DESCRIPTORS, int(Path("/proc/sys/fs/nr_open").read_text())), allowed):
        # Without CAP_SYS_RESOURCE (in a container, a unit) a limit stands that root would not have.
        with contextlib.suppress(OSError, ValueError):
            resource.setrlimit(resource.RLIMIT_NOFILE, (count, max(count, allowed)))
            return


def find_files(uid: int, *, bounds: Bounds | None = None) -> Found:
    """The files of a uid in the shared places and among the message queues.

    What can't be looked at makes the answer `incomplete`; nothing is raised for it.
    """
    found = Found([])
    with _noting_why_incomplete(found):
        for entry in _Scan(uid, bounds or Bounds()).entries():
            found.note(entry)
    return found


def remove_files(uid: int) -> Found:
    """Remove them; the answer holds those that could not be removed.

    A name is removed relative to a descriptor of its directory, after a look at the owner. Whoever
    could swap the name in between could as well have removed what it then stands for. Of a file
    with several names those in these places go; a directory of the uid's that holds somebody
    else's files stays, and so do they.
    """
    left = Found([])
    with _noting_why_incomplete(left):
        for entry in _Scan(uid, Bounds()).entries():
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
        if error.errno == errno.EMFILE:
            found.incomplete = "directories are deeper than this process may open files"
            return
        found.incomplete = f"{str(error.filename or QUEUES)[:80]!a}: {error.strerror}"


class _Scan:
    """One scan of all the places, within its bounds."""

    def __init__(self, uid: int, bounds: Bounds) -> None:
        self._uid = uid
        self._budget = _Budget(bounds, time.monotonic() + bounds.seconds)
        self._places = dict.fromkeys(map(os.path.realpath, PLACES))

    @cached_property
    def _mounted(self) -> frozenset[str]:
        """Looked up once there is a file that may be a mount point, and mostly there is none."""
        return read_mount_points(self._places)

    def entries(self) -> Iterator[_Entry]:
        """What the uid owns, contents before the directory that holds them."""
        for place in self._places:
            try:
                descriptor = os.open(place, _FLAGS)
            except FileNotFoundError:
                continue
            yield from self._below(descriptor, place)
        with message_queues() as queues:
            if queues is not None:
                yield from self._below(os.dup(queues), QUEUES)

    def _below(self, top: int, path: str) -> Iterator[_Entry]:
        """What the uid owns below a directory, which is closed then."""
        stack = [_Directory(top, "", path)]
        try:
            yield from self._look_through(stack)
            while stack:
                directory = stack[-1]
                if directory.waiting:
                    self._budget.waiting -= 1
                    if self._enter(stack, directory.waiting.pop()):
                        yield from self._look_through(stack)
                    continue
                os.close(stack.pop().descriptor)
                if directory.is_ours:
                    rmdir = partial(os.rmdir, directory.name, dir_fd=stack[-1].descriptor)
                    yield _Entry(directory.path, rmdir)
        finally:
            for directory in stack:
                os.close(directory.descriptor)

    def _look_through(self, stack: list[_Directory]) -> Iterator[_Entry]:
        """The uid's files right in the directory on top; directories in there wait."""
        directory = stack[-1]
        self._budget.enter(directory.path, len(stack))
        with os.scandir(directory.descriptor) as entries:
            for entry in entries:
                self._budget.spend_entry(directory.path)
                if entry.is_dir(follow_symlinks=False):
                    self._budget.hold(directory.path)
                    directory.waiting.append(entry.name)
                elif directory.inner(entry.name) not in self._mounted:
                    owner = _owner(entry)
                    if owner == self._uid:
                        unlink = partial(os.unlink, entry.name, dir_fd=directory.descriptor)
                        yield _Entry(directory.inner(entry.name), unlink)
                    else:
                        self._budget.owners[owner] += 1

    def _enter(self, stack: list[_Directory], name: str) -> bool:
        """Put a directory on top; not a mount point, and not what is no directory any more.

        A mount point is refused before the mounted filesystem is asked anything: it may be a FUSE
        one whose server never answers.
        """
        above = stack[-1]
        try:
            descriptor = syscalls.openat2(above.descriptor, name, _FLAGS, resolve=_STAY)
        except OSError as error:
            if error.errno in (errno.EXDEV, errno.ENOENT, errno.ENOTDIR, errno.ELOOP):
                return False
            raise
        stack.append(_Directory(descriptor, name, above.inner(name)))
        owner = os.fstat(descriptor).st_uid
        stack[-1].is_ours = owner == self._uid
        if owner != self._uid:
            self._budget.owners[owner] += 1
        return True


def _owner(entry: os.DirEntry[str]) -> int | None:
    try:
        return entry.stat(follow_symlinks=False).st_uid
    except FileNotFoundError:
        return None
