"""A control group of its own for each instance: counted as one, ended as one (cgroups(7)).

Groups lie at `<parent>/<tag>/vm-<name>` in the hierarchies that are used. `tag` names the root of
files that an instance was started from, so that two of them on one host never touch each other's.
Dots in a name become underscores, which no instance's name has: the kernel's own files in a group
(`memory.max`) and systemd's units (`ssh.service`) are told apart from others by their dots.

Nothing in here limits an instance. Where no group can be made `InstanceCgroup.problem` says why;
whether an instance may start without one is its caller's to decide.
"""

import errno
import os
import select
import time
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Final, Self

from attrs import frozen

from hypervisor.cgroup_mounts import Mount, lines_of, mounted
from hypervisor.errors import HypervisorError
from kvmsec.linux import processes
from kvmsec.linux.readiness import is_readable, is_ready

DEFAULT_PARENT: Final = "kvmsec"
# `memory` counts out-of-memory kills; `pids` is one that nearly every kernel has.
_CONTROLLERS: Final = ("memory", "pids")
_MEMORY_COUNTS: Final = ("memory.events", "memory.oom_control")  # Version 2, version 1.
_PREFIX: Final = "vm-"
_EMPTYING_S: Final = 1.0  # What has just ended may still be leaving its group.
# Each try is lost only to another instance's end that took a shared parent away meanwhile.
_TRIES: Final = 16


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
class InstanceCgroup:
    """One instance's groups, a path in each hierarchy used; none where there is no usable one.

    Made anew from its paths it does the same: the paths are all that a record has to keep.
    """

    paths: tuple[str, ...] = ()
    problem: str | None = None

    @property
    def procs_files(self) -> tuple[str, ...]:
        """The files to which a process with one thread writes "0" to join.

        In version 1 that is `tasks`: moving the calling thread takes no global lock, where
        `cgroup.procs` waits for an RCU grace period (0.1 against 5 to 10 ms, Linux 6.18).
        """
        return tuple(
            f"{path}/{'tasks' if os.path.exists(f'{path}/tasks') else 'cgroup.procs'}"
            for path in self.paths
        )

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
        emptied = [_kill_all(path, deadline) for path in self.paths]
        return all(emptied)

    def remove(self) -> None:
        """Remove it, and parents of our making that are empty then. A missing one is fine.

        Raises CgroupBusy, after trying all, when something still runs in it; OSError.
        """
        busy = [path for path in self.paths if not _remove_tree(path)]
        for path in self.paths:
            _remove_empty_parents(path)
        if busy:
            raise CgroupBusy(busy[0], _pids_below(busy[0]))


@frozen
class Hierarchy:
    """The control group hierarchies of this host that instances use.

    `problem` says why there is none, or what the ones that there are can't do.
    """

    mounts: tuple[Mount, ...]
    problem: str | None = None

    @classmethod
    def detect(cls) -> Self:
        """What this host has mounted, from /proc (proc_pid_mountinfo(5)). Raises nothing."""
        return cls.of(mounted())

    @classmethod
    def of(cls, found: Collection[Mount]) -> Self:
        """Choose among what is mounted: whatever has a controller that is wanted.

        A version 2 without controllers beside a version 1 that has them is left alone: joining
        it would cost each start an RCU grace period and give nothing.
        """
        useful = [mount for mount in found if mount.controllers & set(_CONTROLLERS)]
        chosen = useful or sorted(found, key=lambda mount: -mount.version)[:1]
        if not chosen:
            return cls((), "no control group hierarchy is mounted that can be written to")
        if not any("memory" in mount.controllers for mount in chosen):
            return cls(tuple(chosen), "no memory controller: out-of-memory kills are not counted")
        return cls(tuple(chosen))

    @property
    def layout(self) -> str:
        """What is used, for people: `v2 at /sys/fs/cgroup (memory, pids)`."""
        return ", ".join(
            f"v{mount.version} at {mount.path} ({', '.join(_wanted(mount)) or 'no controller'})"
            for mount in self.mounts
        )

    def create(self, tag: str, instance: str, parent: str | None = None) -> InstanceCgroup:
        """Make an instance's groups, empty and with fresh counts; parents are made as needed.

        `parent` is a path below each hierarchy's root (None: `kvmsec`), never the caller's own
        group. A group that exists and still has processes is not taken over. What can't be made
        is left out, and `problem` of the result says so: nothing is raised.
        """
        paths, problems = [], [self.problem] if self.problem else []
        for mount in self.mounts:
            try:
                path = _create(mount, _relative(tag, parent), _PREFIX + _escape(instance))
            except OSError as error:
                problems.append(f"{error.filename or mount.path}: {error.strerror}")
                continue
            paths.append(path)
            if "memory" in mount.controllers and not _counts_memory(path):
                problems.append(f"{path}: the memory controller is not handed down to it")
        return InstanceCgroup(tuple(paths), "; ".join(problems) or None)

    def leaked(
        self, tag: str, known: Collection[str], parent: str | None = None
    ) -> dict[str, InstanceCgroup]:
        """The groups of this tag whose instance is not among the `known`, by instance."""
        found: dict[str, list[str]] = {}
        for mount in self.mounts:
            for path in _subgroups(f"{mount.path}/{_relative(tag, parent)}"):
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


def _relative(tag: str, parent: str | None) -> str:
    """Where a tag's groups lie below a hierarchy's root. Raises OSError if not below it."""
    path = f"{(parent or DEFAULT_PARENT).strip('/')}/{tag}"
    if any(step in ("", ".", "..") for step in path.split("/")):
        raise OSError(errno.EINVAL, "is no path below the control groups' root", path)
    return path


def _counts_memory(path: str) -> bool:
    return any(os.path.exists(f"{path}/{name}") for name in _MEMORY_COUNTS)


def _wanted(mount: Mount) -> list[str]:
    return [name for name in _CONTROLLERS if name in mount.controllers]


def _create(mount: Mount, below: str, name: str) -> str:
    """Make one group below parents that another instance's end may be taking away."""
    path = f"{mount.path}/{below}/{name}"
    for attempt in range(_TRIES):
        try:
            _make_parents(mount, below)
            if not _remove_tree(path):
                raise OSError(errno.EBUSY, "processes of an earlier start are still in it", path)
            os.mkdir(path, 0o755)
        except FileNotFoundError:
            if attempt == _TRIES - 1:
                raise
        else:
            return path
    raise AssertionError("the last try returns or raises")


def _make_parents(mount: Mount, below: str) -> None:
    """Make each parent, and in version 2 let it hand the controllers down (cgroups(7))."""
    path = mount.path
    for step in below.split("/"):
        if mount.version == 2:
            _delegate(path, _wanted(mount))
        path = f"{path}/{step}"
        if not os.path.isdir(path):
            try:
                os.mkdir(path, 0o755)
            except FileExistsError:
                continue
    if mount.version == 2:
        _delegate(path, _wanted(mount))


def _delegate(path: str, controllers: list[str]) -> None:
    """Enable controllers for a group's children, as far as it may: without, only counts miss."""
    control = f"{path}/cgroup.subtree_control"
    enabled = " ".join(lines_of(control)).split()
    for name in controllers:
        if name not in enabled:
            try:
                Path(control).write_text(f"+{name}")
            except FileNotFoundError:
                raise
            except OSError:
                continue


def _subgroups(path: str) -> list[str]:
    try:
        with os.scandir(path) as entries:
            return [entry.path for entry in entries if entry.is_dir(follow_symlinks=False)]
    except (FileNotFoundError, NotADirectoryError):
        return []


def _tree(path: str) -> Iterator[str]:
    """A group and all below it, the deepest first."""
    for child in _subgroups(path):
        yield from _tree(child)
    yield path


def _pids_below(path: str) -> frozenset[int]:
    """The processes in a group and all below it; those of a group that is gone are none."""
    found: set[int] = set()
    for group in _tree(path):
        try:
            found.update(map(int, Path(group, "cgroup.procs").read_text().split()))
        except OSError as error:
            if error.errno not in (errno.ENOENT, errno.ENODEV):
                raise
    return frozenset(found)


def _kill_all(path: str, deadline: float) -> bool:
    """Kill until a group is empty; a process that forks meanwhile only makes another round."""
    try:
        descriptor = os.open(f"{path}/cgroup.kill", os.O_WRONLY | os.O_CLOEXEC)
    except FileNotFoundError:
        return _kill_each(path, deadline)
    try:
        os.write(descriptor, b"1")
    except OSError as error:
        if error.errno != errno.ENODEV:
            raise
    finally:
        os.close(descriptor)
    return _wait_until_empty(path, deadline)


def _kill_each(path: str, deadline: float) -> bool:
    while pids := _pids_below(path):
        if pids == {0} or time.monotonic() >= deadline:
            return False
        pidfds = {pid: pidfd for pid in pids - {0} if (pidfd := _open_pidfd(pid)) is not None}
        try:
            # Still listed after its descriptor was opened: the descriptor can't mean another.
            doomed = [pidfds[pid] for pid in _pids_below(path) & pidfds.keys()]
            for pidfd in doomed:
                processes.kill(pidfd)
            for pidfd in doomed:
                if not is_readable(pidfd, deadline - time.monotonic()):
                    return False
        finally:
            for pidfd in pidfds.values():
                os.close(pidfd)
    return True


def _open_pidfd(pid: int) -> int | None:
    try:
        return os.pidfd_open(pid)
    except ProcessLookupError:
        return None


def _wait_until_empty(path: str, deadline: float) -> bool:
    """Wait for a version 2 group's `populated 0`, which the kernel tells by POLLPRI."""
    try:
        descriptor = os.open(f"{path}/cgroup.events", os.O_RDONLY | os.O_CLOEXEC)
    except FileNotFoundError:
        return not _pids_below(path)  # Version 1, or gone.
    try:
        while b"populated 1" in os.pread(descriptor, 4096, 0):
            if not is_ready(descriptor, select.POLLPRI, deadline - time.monotonic()):
                return False
    except OSError as error:
        if error.errno != errno.ENODEV:
            raise
    finally:
        os.close(descriptor)
    return True


def _remove_tree(path: str) -> bool:
    """Remove a group and all below it; False when something runs in one of them."""
    for group in _tree(path):
        if not _remove_one(group) and not (
            _wait_until_empty(group, time.monotonic() + _EMPTYING_S) and _remove_one(group)
        ):
            return False
    return True


def _remove_one(path: str) -> bool:
    try:
        os.rmdir(path)
    except FileNotFoundError:
        return True
    except OSError as error:
        if error.errno not in (errno.EBUSY, errno.ENOTEMPTY):
            raise
        return False
    return True


def _remove_empty_parents(path: str) -> None:
    """Remove the tag's group, and `kvmsec` at the root: a configured parent isn't ours."""
    tag = os.path.dirname(path)
    top = os.path.dirname(tag)
    if not _remove_one(tag):
        return
    if os.path.basename(top) == DEFAULT_PARENT and os.path.ismount(os.path.dirname(top)):
        _remove_one(top)
