"""Control groups of its own for each instance: bounded, counted and ended as one (cgroups(7)).

Groups lie at `<parent>/<tag>/vm-<name>` in the hierarchies that are used. `tag` names the root of
files that an instance was started from, so that two of them on one host never touch each other's.
Dots in a name become underscores, which no instance's name has: the kernel's own files in a group
(`memory.max`) and systemd's units (`ssh.service`) are told apart from others by their dots.

Which version is used is decided for each controller: whichever has it, and the kernel lets only
one have it. Version 2 is used wherever it is mounted, with controllers or without, since it alone
ends a group at once and tells when it is empty. What can't be had is a `Lack` of the result;
whether an instance may start in spite of it is its caller's to decide.
"""

import os
import time
from collections.abc import Collection
from typing import Final, Self

from attrs import frozen

from hypervisor.cgroup_delegation import (
    DEFAULT_PARENT,
    Place,
    make_group,
    relative,
    write_bounds,
)
from hypervisor.cgroup_limits import ALWAYS, CONTROLLERS, GroupLimits, Setting, settings_for
from hypervisor.cgroup_mounts import Mount, lines_of, mounted
from hypervisor.cgroup_tree import kill_all, pids_below, remove_one, remove_tree, subgroups
from hypervisor.errors import HypervisorError

_MEMORY_COUNTS: Final = ("memory.events", "memory.oom_control")  # Version 2, version 1.
_PREFIX: Final = "vm-"


class CgroupBusy(HypervisorError):
    """A control group can't be removed: something still runs in it."""

    def __init__(self, path: str, pids: Collection[int]) -> None:
        inside = f"processes {', '.join(map(str, sorted(pids)))}" if pids else "something"
        super().__init__(
            f"the control group {path} still holds {inside}",
            hint="see what they are with `ps`, end them, then run the command again",
        )
        self.path = path
        self.pids = tuple(sorted(pids))


@frozen
class Lack:
    """A piece of what an instance's groups are for that can't be had here, and why.

    `piece` is `cgroup-` and a controller's name, or `cgroup`: there is no group at all, or none of
    version 2 where that is mounted, by which all of it is ended at once.
    """

    piece: str
    problem: str

    @classmethod
    def of(cls, controller: str, problem: str) -> Self:
        return cls(f"cgroup-{controller}", problem)

    def __str__(self) -> str:
        return f"{self.piece}: {self.problem}"


@frozen
class InstanceCgroup:
    """One instance's groups, a path in each hierarchy used; none where there is no usable one.

    Made anew from its paths it ends and counts the same: they are all that a record has to keep.
    `held` is what was written: for each file its path, and the setting.
    """

    paths: tuple[str, ...] = ()
    lacks: tuple[Lack, ...] = ()
    held: tuple[tuple[str, Setting], ...] = ()

    @property
    def problem(self) -> str | None:
        """Everything that can't be had, in words; None where nothing is missing."""
        return "; ".join(map(str, self.lacks)) or None

    @property
    def unified(self) -> str | None:
        """The path of its version 2 group; None without one."""
        found = (path for path in self.paths if os.path.exists(f"{path}/cgroup.events"))
        return next(found, None)

    @property
    def tasks_files(self) -> tuple[str, ...]:
        """The version 1 files to which a process with one thread writes "0" to join.

        `tasks`, since moving the calling thread takes no global lock, where `cgroup.procs` waits
        for an RCU grace period (0.1 against 5 to 10 ms, Linux 6.18).
        """
        return tuple(f"{path}/tasks" for path in self.paths if os.path.exists(f"{path}/tasks"))

    def problems_of(self, pid: int) -> list[str]:
        """What the kernel shows otherwise than it was asked for: a bound, or who is in it."""
        found = []
        for path, setting in self.held:
            read = "; ".join(lines_of(path))
            if not setting.agrees_with(read):
                found.append(f"{path} holds {read or 'nothing'!r}, wanted {setting.value!r}")
        for path in self.paths:
            if str(pid) not in lines_of(f"{path}/cgroup.procs"):
                found.append(f"it is not in the control group {path}")
        return found

    def oom_kills(self) -> int:
        """How many of its processes the kernel killed for want of memory; 0 if none counts."""
        for path in self.paths:
            for name in _MEMORY_COUNTS:
                counts = dict(line.partition(" ")[::2] for line in lines_of(f"{path}/{name}"))
                if "oom_kill" in counts:
                    return int(counts["oom_kill"])
        return 0

    def kill(self, timeout_s: float) -> bool:
        """SIGKILL everything in it until it is empty; False when something outlives that.

        Safe to repeat, and at once done where it is gone. Raises OSError.
        """
        deadline = time.monotonic() + timeout_s
        # Version 2 first: it ends all of it with one write, and no fork outruns that.
        ordered = sorted(self.paths, key=lambda path: path != self.unified)
        emptied = [kill_all(path, deadline) for path in ordered]
        return all(emptied)

    def remove(self) -> None:
        """Remove it, and parents of our making that are empty then. A missing one is fine.

        Raises CgroupBusy, after trying all, when something still runs in it; OSError.
        """
        busy = [path for path in self.paths if not remove_tree(path)]
        for path in self.paths:
            _remove_empty_parents(path)
        if busy:
            raise CgroupBusy(busy[0], pids_below(busy[0]))


@frozen
class _Group:
    """One group, and the controllers that it has."""

    path: str
    version: int
    controllers: frozenset[str]


@frozen
class UnboundCgroup:
    """One instance's groups as they are made: a process can be born in them before their bounds
    are known. `lacks` is what can't be had so far.
    """

    groups: tuple[_Group, ...]
    lacks: tuple[Lack, ...]

    @property
    def paths(self) -> tuple[str, ...]:
        return tuple(group.path for group in self.groups)

    @property
    def unified(self) -> str | None:
        """The path of its version 2 group; None without one."""
        return next((group.path for group in self.groups if group.version == 2), None)

    def bound(self, limits: GroupLimits) -> InstanceCgroup:
        """Bound them by what they were made for. What can't be had is said: nothing is raised."""
        lacks = list(self.lacks)
        held: list[tuple[str, Setting]] = []
        for group in self.groups:
            settings = settings_for(limits, group.controllers, group.version)
            written, unwritten = write_bounds(group.path, settings)
            held += written
            lacks += [Lack.of(*one) for one in sorted(unwritten.items())]
        return InstanceCgroup(self.paths, tuple(lacks), tuple(held))


@frozen
class Hierarchy:
    """The control group hierarchies of this host that instances use."""

    mounts: tuple[Mount, ...]

    @classmethod
    def detect(cls) -> Self:
        """What this host has mounted, from /proc (proc_pid_mountinfo(5)). Raises nothing."""
        return cls.of(mounted())

    @classmethod
    def of(cls, found: Collection[Mount]) -> Self:
        """Choose among what is mounted: version 2, and what has a controller that may be wanted.

        Without either any other will do: there, an instance is at least counted and ended as one.
        """
        ordered = sorted(found, key=lambda mount: -mount.version)
        useful = [mount for mount in ordered if mount.version == 2 or mount.offers(CONTROLLERS)]
        return cls(tuple(useful or ordered[:1]))

    @property
    def layout(self) -> str:
        """What is used, for people: `v2 at /sys/fs/cgroup (memory, pids)`."""
        return ", ".join(
            f"v{mount.version} at {mount.path} ({_listed(mount) or 'no controller'})"
            for mount in self.mounts
        )

    def lacks(self, controllers: Collection[str] = ALWAYS) -> tuple[Lack, ...]:
        """Which of the `controllers` are mounted nowhere, or that nothing is."""
        reason = "no control group hierarchy is mounted that can be written to"
        found = [] if self.mounts else [Lack("cgroup", reason)]
        for name in controllers:
            if not any(mount.offers([name]) for mount in self.mounts):
                found.append(Lack.of(name, f"no hierarchy with the {name} controller is mounted"))
        return tuple(found)

    def make(
        self,
        tag: str,
        instance: str,
        parent: str | None = None,
        controllers: Collection[str] = ALWAYS,
    ) -> UnboundCgroup:
        """Make an instance's groups, empty and with fresh counts; parents as needed.

        `parent` is a path below each hierarchy's root (None: `kvmsec`), never the caller's own
        group; nothing is changed above one that systemd has delegated. A group that exists and
        still has processes is not taken over, nor waited for (see `leftover`). What can't be made
        is left out, and `lacks` of the result says so: nothing is raised.
        """
        lacks, failures, of_version_2 = list(self.lacks(controllers)), [], []
        groups: list[_Group] = []
        useful = [mount for mount in self.mounts if mount.version == 2 or mount.offers(controllers)]
        for mount in useful or self.mounts:
            offered = mount.offers(controllers)
            place = Place(mount, parent, tag, offered)
            try:
                path, withheld = make_group(place, _PREFIX + _escape(instance))
            except OSError as error:
                failures.append(f"{error.filename or mount.path}: {error.strerror}")
                lacks += [Lack.of(name, failures[-1]) for name in sorted(offered)]
                of_version_2 += failures[-1:] if mount.version == 2 else []
                continue
            groups.append(_Group(path, mount.version, offered - withheld.keys()))
            lacks += [Lack.of(*one) for one in sorted(withheld.items())]
        if whole := of_version_2 if groups else failures:
            lacks.insert(0, Lack("cgroup", "; ".join(dict.fromkeys(whole))))
        return UnboundCgroup(tuple(groups), tuple(lacks))

    def create(
        self,
        tag: str,
        instance: str,
        parent: str | None = None,
        limits: GroupLimits | None = None,
    ) -> InstanceCgroup:
        """Make an instance's groups and bound them at once: see `make`."""
        limits = limits or GroupLimits()
        return self.make(tag, instance, parent, limits.controllers).bound(limits)

    def leftover(self, tag: str, instance: str, parent: str | None = None) -> InstanceCgroup:
        """The groups that are there before an instance's are made, for their removal."""
        try:
            below = f"{relative(tag, parent)}/{_PREFIX}{_escape(instance)}"
        except OSError:
            return InstanceCgroup()  # No path of one; `create` says why.
        paths = (f"{mount.path}/{below}" for mount in self.mounts)
        return InstanceCgroup(tuple(path for path in paths if os.path.isdir(path)))

    def remove_empty_parents(self, tag: str, parent: str | None = None) -> None:
        """Remove what was made to hold a tag's groups, wherever there is none in it.

        A start that is about to make one there makes it again. Raises OSError.
        """
        for mount in self.mounts:
            _remove_empty_parents(f"{mount.path}/{relative(tag, parent)}/{_PREFIX}")

    def leaked(
        self, tag: str, known: Collection[str], parent: str | None = None
    ) -> dict[str, InstanceCgroup]:
        """The groups of this tag whose instance is not among the `known`, by instance."""
        found: dict[str, list[str]] = {}
        for mount in self.mounts:
            for path in subgroups(f"{mount.path}/{relative(tag, parent)}"):
                name = os.path.basename(path)
                if name.startswith(_PREFIX):
                    found.setdefault(_unescape(name.removeprefix(_PREFIX)), []).append(path)
        return {
            instance: InstanceCgroup(tuple(paths))
            for instance, paths in sorted(found.items())
            if instance not in known
        }


def _escape(instance: str) -> str:
    return instance.replace(".", "_")


def _unescape(name: str) -> str:
    return name.replace("_", ".")


def _listed(mount: Mount) -> str:
    offered = mount.offers(CONTROLLERS)
    return ", ".join(name for name in CONTROLLERS if name in offered)


def _remove_empty_parents(path: str) -> None:
    """Remove the tag's group, and `kvmsec` at the root: a configured parent isn't ours."""
    tag = os.path.dirname(path)
    top = os.path.dirname(tag)
    if not remove_one(tag):
        return
    if os.path.basename(top) == DEFAULT_PARENT and os.path.ismount(os.path.dirname(top)):
        remove_one(top)
