"""Making one group in one hierarchy: the groups above it, what they hand down, and its bounds."""

import contextlib
import errno
import os
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Final

from attrs import frozen

from hypervisor.cgroup_limits import Setting
from hypervisor.cgroup_mounts import Mount, lines_of
from hypervisor.cgroup_tree import remove_tree

DEFAULT_PARENT: Final = "kvmsec"
# Each try is lost only to another instance's end that took a shared parent away meanwhile.
_TRIES: Final = 64
_GONE: Final = (errno.ENOENT, errno.ENODEV)  # Not there, or no more since it was opened.
_DELEGATED: Final = ("trusted.delegate", "user.delegate")


@frozen
class Place:
    """Where an instance's group is to be in one hierarchy, and which controllers it is to have.

    `parent` is a path below the hierarchy's root; None for one of kvmsec's own there.
    """

    mount: Mount
    parent: str | None
    tag: str
    controllers: frozenset[str]


def relative(tag: str, parent: str | None) -> str:
    """Where a tag's groups lie below a hierarchy's root. Raises OSError if not below it."""
    path = f"{(parent or DEFAULT_PARENT).strip('/')}/{tag}"
    if any(step in ("", ".", "..") for step in path.split("/")):
        raise OSError(errno.EINVAL, "is no path below the control groups' root", path)
    return path


def make_group(place: Place, name: str) -> tuple[str, Mapping[str, str]]:
    """Make one group below parents that another instance's end may be taking away.

    Returns its path, and for each controller that it didn't get why. Raises OSError, EBUSY when
    processes of an earlier start are still in it.
    """
    below = relative(place.tag, place.parent)
    path = f"{place.mount.path}/{below}/{name}"
    for is_last in (*[False] * (_TRIES - 1), True):
        try:
            refusals = _make_parents(place, below)
            _make_empty(path)
        except OSError as error:
            if is_last or error.errno not in _GONE:
                raise
            continue
        # A parent that another start has made anew meanwhile may hand down less.
        withheld = _withheld(place, path, refusals)
        if is_last or not withheld:
            return path, withheld
    raise AssertionError("the last try returns or raises")


def _make_empty(path: str) -> None:
    try:
        os.mkdir(path, 0o755)
    except FileExistsError:  # Of an earlier start, with its counts and bounds.
        if not remove_tree(path, emptying_s=0):
            raise OSError(
                errno.EBUSY, "processes of an earlier start are still in it", path
            ) from None
        os.mkdir(path, 0o755)


def _withheld(place: Place, path: str, refusals: Mapping[str, str]) -> Mapping[str, str]:
    if place.mount.version == 1:
        return {}
    given = " ".join(lines_of(f"{path}/cgroup.controllers")).split()
    unsaid = f"{os.path.dirname(path)}: hands it down to no group below"
    return {name: refusals.get(name, unsaid) for name in place.controllers if name not in given}


def _make_parents(place: Place, below: str) -> dict[str, str]:
    """Make each parent, and in version 2 let it hand the controllers down (cgroups(7)).

    Returns why one doesn't, by controller.
    """
    groups = [place.mount.path]
    for step in below.split("/"):
        groups.append(f"{groups[-1]}/{step}")
    for group in groups[1:]:
        if not os.path.isdir(group):
            with contextlib.suppress(FileExistsError):
                os.mkdir(group, 0o755)
    refusals: dict[str, str] = {}
    if place.mount.version == 2 and place.controllers:
        for group in groups[_first_that_is_ours(groups) :]:
            _delegate(group, place.controllers, refusals)
    return refusals


def _first_that_is_ours(groups: Sequence[str]) -> int:
    """The deepest group that systemd says it has delegated, with this mark; else the root.

    What is above such a one is systemd's to change alone (https://systemd.io/CGROUP_DELEGATION).
    """
    for index in reversed(range(len(groups))):
        for mark in _DELEGATED:
            with contextlib.suppress(OSError):
                if os.getxattr(groups[index], mark) == b"1":
                    return index
    return 0


def _delegate(path: str, controllers: Collection[str], refusals: dict[str, str]) -> None:
    """Enable controllers for a group's children; `refusals` gets the first reason for each."""
    control = f"{path}/cgroup.subtree_control"
    enabled = Path(control).read_text().split()
    given = Path(path, "cgroup.controllers").read_text().split()
    for name in sorted(set(controllers) - set(enabled) - refusals.keys()):
        if name not in given:
            refusals[name] = f"{path}: the group has no {name} controller to hand down"
            continue
        try:
            _write(control, f"+{name}")
        except OSError as error:
            if error.errno in _GONE:
                raise
            why = "processes are in it" if error.errno == errno.EBUSY else error.strerror
            refusals[name] = f"{path}: can't hand the {name} controller down: {why}"


def write_bounds(
    path: str, settings: Collection[Setting]
) -> tuple[list[tuple[str, Setting]], dict[str, str]]:
    """Write a group's settings; returns what was written, and by controller what could not be."""
    written: list[tuple[str, Setting]] = []
    refusals: dict[str, str] = {}
    for setting in settings:
        file = f"{path}/{setting.file}"
        try:
            _write(file, setting.value)
        except FileNotFoundError as error:
            if not setting.is_optional:
                refusals.setdefault(setting.controller, f"{file}: {error.strerror}")
        except OSError as error:
            refusals.setdefault(setting.controller, f"{file}: {error.strerror}")
        else:
            written.append((file, setting))
    bounded = {setting.controller for _, setting in written} | refusals.keys()
    for setting in settings:
        if setting.controller not in bounded:
            refusals[setting.controller] = f"{path}: this kernel has none of the files for it"
    return written, refusals


def _write(path: str, text: str) -> None:
    """Write to a file of the kernel's, which is there or is not: nothing is created."""
    descriptor = os.open(path, os.O_WRONLY | os.O_CLOEXEC)
    try:
        os.write(descriptor, text.encode())
    finally:
        os.close(descriptor)
