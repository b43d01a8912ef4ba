"""What a process can reach by path: whose root it has, where it may write, which devices it sees.

Its own tree is walked through /proc/PID/root, no symbolic link followed, as far as a bound. What
it may do there is told from owners and modes; access control lists and security modules are not
asked.
"""

import os
import stat
import time
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Final, Literal

from attrs import frozen

from hypervisor.foreign_text import escaped
from kvmsec.audit.facts import Credentials, Tree
from kvmsec.audit.held import gravest_first, is_notable_device
from kvmsec.audit.process_files import ProcessFiles, open_host
from kvmsec.linux.files import open_without_links
from kvmsec.linux.mounts import Mount, parse_mounts

Kind = Literal["host", "chroot", "own"]

_ENTRIES: Final = 20_000
_WALK_S: Final = 3.0
_SHOWN: Final = 32
_PATH_CHARS: Final = 120
_KERNEL: Final = frozenset(
    ("proc", "sysfs", "cgroup", "cgroup2", "debugfs", "tracefs", "securityfs", "bpf", "configfs")
)
_CLOSED: Final = frozenset(("nosuid", "nodev", "noexec"))
_CAP_DAC_OVERRIDE: Final = 1  # linux/capability.h
# Where others leave files on every host: looked at instead of a walk through all of it.
_SHARED_PLACES: Final = ("/tmp", "/var/tmp", "/dev/shm", "/run/lock", "/var/crash")


class _Walk:
    """A bounded look at what lies below some directories of a process's tree."""

    def __init__(self, root: int, mounts: Sequence[Mount]) -> None:
        self.is_cut = False
        self._root = root
        self._mounts = frozenset(mount.path for mount in mounts)
        self._seen = 0
        self._deadline = time.monotonic() + _WALK_S

    def below(self, top: str) -> Iterator[tuple[str, os.stat_result]]:
        """Each entry of one mount with its status, that of its top first."""
        ahead = deque([top])
        while ahead:
            path = ahead.popleft()
            try:
                directory = self._open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_NONBLOCK)
            except NotADirectoryError:  # A file that something is mounted on.
                yield path, self._status(path)
                continue
            except OSError:
                continue
            try:
                if path == top:
                    yield path, os.stat(directory)
                yield from self._entries(path, directory, ahead)
            finally:
                os.close(directory)
            if self.is_cut:
                return

    def _status(self, path: str) -> os.stat_result:
        descriptor = self._open(path, os.O_PATH)
        try:
            return os.fstat(descriptor)
        finally:
            os.close(descriptor)

    def _open(self, path: str, flags: int) -> int:
        return open_without_links(_relative(path), flags, directory=self._root)

    def _entries(
        self, path: str, directory: int, ahead: deque[str]
    ) -> Iterator[tuple[str, os.stat_result]]:
        with os.scandir(directory) as entries:
            for entry in entries:
                self._seen += 1
                if self._seen > _ENTRIES or time.monotonic() > self._deadline:
                    self.is_cut = True
                    return
                child = f"{path.rstrip('/')}/{entry.name}"
                try:
                    status = entry.stat(follow_symlinks=False)
                except OSError:
                    continue
                if child in self._mounts:
                    continue
                yield child, status
                if stat.S_ISDIR(status.st_mode):
                    ahead.append(child)


def _relative(path: str) -> Path:
    return Path(path.lstrip("/") or ".")


@frozen
class _Rights:
    """What owners and modes let the process do."""

    uids: frozenset[int]
    gids: frozenset[int]
    has_override: bool

    @classmethod
    def of(cls, who: Credentials) -> "_Rights":
        _, permitted, effective, _, ambient = who.capabilities
        has_override = bool((permitted | effective | ambient) >> _CAP_DAC_OVERRIDE & 1)
        return cls(frozenset(who.uids), frozenset((*who.gids, *who.groups)), has_override)

    def may_write(self, status: os.stat_result) -> bool:
        """Whether it may write to it; what it owns it may give itself the mode for."""
        if self.has_override or status.st_uid in self.uids:
            return True
        group = status.st_gid in self.gids and status.st_mode & stat.S_IWGRP
        return bool(group or status.st_mode & stat.S_IWOTH)

    def may_open(self, status: os.stat_result) -> bool:
        """Whether it may read or write a device."""
        if self.may_write(status):
            return True
        group = status.st_gid in self.gids and status.st_mode & stat.S_IRGRP
        return bool(group or status.st_mode & stat.S_IROTH)


def read_tree(files: ProcessFiles, who: Credentials) -> Tree:
    """Look at the process's tree. Raises OSError and TooMuch."""
    mounts = list(parse_mounts(files.read("mountinfo")))
    root = files.open_root()
    try:
        kind = _kind(files, root)
        walk = _Walk(root, mounts)
        rights = _Rights.of(who)
        if kind == "own":
            return _own_tree(walk, mounts, rights)
        return _host_tree(walk, mounts, rights, kind)
    finally:
        os.close(root)


def _kind(files: ProcessFiles, root: int) -> Kind:
    """By the directory itself: a mount namespace of its own may well show all of the host."""
    with open_host() as host:
        if os.path.samestat(os.fstat(root), host.status_of("root")):
            return "host"
        return "chroot" if files.link("ns/mnt") == host.link("ns/mnt") else "own"


def _own_tree(walk: _Walk, mounts: Sequence[Mount], rights: _Rights) -> Tree:
    writable: list[str] = []
    sized: list[str] = []
    for mount in filter(_is_writable, mounts):
        found = _first_written(walk, mount, rights)
        (sized if _is_sized_scratch(mount) else writable).extend(found)
    return Tree(
        kind="own",
        writable=_shown(writable),
        sized=_shown(sized),
        devices=_shown(gravest_first(_devices(walk, mounts, rights))),
        set_uid=_shown(_set_uid(walk, mounts)),
        kernel=_shown(mount.path for mount in mounts if mount.kind in _KERNEL),
        is_cut=walk.is_cut,
    )


def _host_tree(walk: _Walk, mounts: Sequence[Mount], rights: _Rights, kind: Kind) -> Tree:
    """The host's: what is there is known, so that only the places that all share are looked at."""
    writable = [place for place in _SHARED_PLACES if _is_open_place(walk, mounts, rights, place)]
    if rights.has_override or 0 in rights.uids:
        writable.insert(0, "/")
    return Tree(
        kind=kind,
        writable=tuple(writable),
        devices=_shown(gravest_first(_devices_below(walk, "/dev", rights))),
        set_uid=("/usr",) if kind == "host" else (),
        kernel=_shown(mount.path for mount in mounts if mount.kind in _KERNEL),
        is_cut=walk.is_cut,
    )


def _is_open_place(walk: _Walk, mounts: Sequence[Mount], rights: _Rights, place: str) -> bool:
    above = [mount for mount in mounts if place == mount.path or _is_below(place, mount.path)]
    deepest = max(above, key=lambda mount: len(mount.path), default=None)
    status = next((found for path, found in walk.below(place) if path == place), None)
    return (
        status is not None
        and rights.may_write(status)
        and (deepest is None or _is_writable(deepest))
    )


def _is_below(path: str, top: str) -> bool:
    return path.startswith(f"{top.rstrip('/')}/")


def _is_writable(mount: Mount) -> bool:
    is_rw = "ro" not in mount.options and "ro" not in mount.super_options
    return is_rw and mount.kind not in _KERNEL


def _is_sized_scratch(mount: Mount) -> bool:
    """A tmpfs of limited size that nothing can be executed from: what an instance may fill."""
    has_size = any(option.startswith("size=") for option in mount.super_options)
    return mount.kind == "tmpfs" and has_size and mount.options >= _CLOSED


def _first_written(walk: _Walk, mount: Mount, rights: _Rights) -> list[str]:
    """The top of what may be written on a mount: one path says it all for what lies below."""
    for path, status in walk.below(mount.path):
        is_lasting = not (stat.S_ISLNK(status.st_mode) or stat.S_ISCHR(status.st_mode))
        if is_lasting and rights.may_write(status):
            return [path]
    return []


def _devices(walk: _Walk, mounts: Sequence[Mount], rights: _Rights) -> Iterator[str]:
    for mount in mounts:
        if "nodev" not in mount.options and mount.kind not in _KERNEL:
            yield from _devices_below(walk, mount.path, rights)


def _devices_below(walk: _Walk, top: str, rights: _Rights) -> Iterator[str]:
    for path, status in walk.below(top):
        is_device = is_notable_device(status) or stat.S_ISBLK(status.st_mode)
        if is_device and rights.may_open(status):
            yield path


def _set_uid(walk: _Walk, mounts: Sequence[Mount]) -> Iterator[str]:
    for mount in mounts:
        if mount.options.isdisjoint(("nosuid", "noexec")) and mount.kind not in _KERNEL:
            for path, status in walk.below(mount.path):
                is_set = status.st_mode & (stat.S_ISUID | stat.S_ISGID)
                if is_set and stat.S_ISREG(status.st_mode):
                    yield path


def _shown(paths: Iterable[str]) -> tuple[str, ...]:
    """The first of them, escaped; the walk goes no further than that."""
    return tuple(escaped(path, limit_chars=_PATH_CHARS) for path in islice(paths, _SHOWN))
