"""What a process's control groups bound (cgroups(7)): version 1 and 2, up to the top of each."""

import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Final

from attrs import frozen

from hypervisor.foreign_text import escaped
from kvmsec.audit.facts import ControlGroup
from kvmsec.audit.process_files import ProcessFiles
from kvmsec.linux.mounts import Mount, read_mounts

_LINE_BYTES: Final = 64
_PROCS_BYTES: Final = 1 << 20
_STEPS: Final = 64
_PATH_CHARS: Final = 120
_DEFAULT_SHARE: Final = {"cpu.weight": 100, "cpu.shares": 1024}


@frozen
class Membership:
    """A line of /proc/PID/cgroup: its controllers (none for version 2) and the group's path."""

    controllers: frozenset[str]
    path: str


def parse_memberships(text: bytes) -> list[Membership]:
    """The lines of a /proc/PID/cgroup."""
    found = []
    for line in text.split(b"\n"):
        number, _, rest = line.partition(b":")
        names, separator, path = rest.partition(b":")
        if separator and number.isdigit():
            controllers = frozenset(os.fsdecode(name) for name in names.split(b",") if name)
            found.append(Membership(controllers, os.fsdecode(path)))
    return found


def read_control_group(files: ProcessFiles) -> ControlGroup:
    """Each limit that holds for the process. Raises OSError and TooMuch."""
    memberships = parse_memberships(files.read("cgroup"))
    hierarchies = [mount for mount in read_mounts() if mount.kind in ("cgroup", "cgroup2")]
    places = list(_places(memberships, hierarchies))
    memory = [*_numbers(places, "memory.max"), *_numbers(places, "memory.limit_in_bytes")]
    cpus = [*_quotas_v1(places), *_quotas_v2(places)]
    paths = dict.fromkeys(one.path for one in memberships if one.path != "/")
    return ControlGroup(
        paths=tuple(escaped(path, limit_chars=_PATH_CHARS) for path in list(paths)[:8]),
        memory_bytes=min((one for one in memory if one < _host_memory_bytes()), default=None),
        pids=min(_numbers(places, "pids.max"), default=None),
        cpus=min(cpus, default=None),
        has_cpu_share=any(
            number != default
            for name, default in _DEFAULT_SHARE.items()
            for place in places
            for number in _number(place.directory / name)
        ),
        others=max((_others(place, files.pid) for place in places), default=0),
    )


def _host_memory_bytes() -> int:
    """A limit above that is none; so is the huge number that version 1 has where there is none."""
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


@frozen
class _Place:
    """A process's group in one hierarchy, and every group from there up to the top."""

    directory: Path
    upwards: tuple[Path, ...]


def _places(memberships: Sequence[Membership], hierarchies: Sequence[Mount]) -> Iterator[_Place]:
    for one in memberships:
        for mount in hierarchies:
            is_it = (
                mount.kind == "cgroup" and one.controllers & mount.super_options
                if one.controllers
                else mount.kind == "cgroup2"
            )
            if is_it:
                yield _place(Path(mount.path), one.path)
                break


def _place(top: Path, path: str) -> _Place:
    """A path that leads upwards is that of a group outside of what this host shows."""
    steps = [step for step in path.split("/") if step]
    if ".." in steps or len(steps) > _STEPS:
        raise ValueError("its control group lies outside of what is mounted here")
    directories = [top]
    for step in steps:
        directories.append(directories[-1] / step)
    return _Place(directories[-1], tuple(reversed(directories)))


def _numbers(places: Sequence[_Place], name: str) -> list[int]:
    return [
        number
        for place in places
        for directory in place.upwards
        for number in _number(directory / name)
    ]


def _number(path: Path) -> Iterator[int]:
    """The number in a file; nothing where there is none, or it says `max`."""
    for word in _words(path)[:1]:
        if word.isdigit():
            yield int(word)


def _words(path: Path) -> list[str]:
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except (FileNotFoundError, NotADirectoryError):
        return []
    try:
        return os.read(descriptor, _LINE_BYTES).decode(errors="replace").split()
    finally:
        os.close(descriptor)


def _quotas_v2(places: Sequence[_Place]) -> Iterator[float]:
    for place in places:
        for directory in place.upwards:
            words = _words(directory / "cpu.max")
            if len(words) == 2 and all(word.isdigit() for word in words):
                yield int(words[0]) / max(int(words[1]), 1)


def _quotas_v1(places: Sequence[_Place]) -> Iterator[float]:
    for place in places:
        for directory in place.upwards:
            quota = list(_number(directory / "cpu.cfs_quota_us"))
            period = list(_number(directory / "cpu.cfs_period_us"))
            if quota and period:
                yield quota[0] / max(period[0], 1)


def _others(place: _Place, pid: int) -> int:
    """Further processes in the very group, where it is one below the top."""
    if len(place.upwards) == 1:
        return 0
    try:
        with open(place.directory / "cgroup.procs", "rb") as file:
            return sum(int(word) != pid for word in file.read(_PROCS_BYTES).split())
    except OSError:  # A threaded group has none (EOPNOTSUPP).
        return 0
