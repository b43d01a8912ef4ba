"""What is done to a control group's directory and all below it: counted, emptied, removed."""

import errno
import os
import select
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Final

from kvmsec.linux import processes
from kvmsec.linux.readiness import is_readable, is_ready

EMPTYING_S: Final = 1.0  # What has just ended may still be leaving its group.
_GONE: Final = (errno.ENOENT, errno.ENODEV)  # Not there, or removed while it is opened or read.


def subgroups(path: str) -> list[str]:
    """The groups right below one; none where there is no such group."""
    try:
        with os.scandir(path) as entries:
            return [entry.path for entry in entries if entry.is_dir(follow_symlinks=False)]
    except (FileNotFoundError, NotADirectoryError):
        return []


def tree(path: str) -> Iterator[str]:
    """A group and all below it, the deepest first."""
    for child in subgroups(path):
        yield from tree(child)
    yield path


def pids_below(path: str) -> frozenset[int]:
    """The processes in a group and all below it; those of a group that is gone are none."""
    found: set[int] = set()
    for group in tree(path):
        try:
            found.update(map(int, Path(group, "cgroup.procs").read_text().split()))
        except OSError as error:
            if error.errno not in _GONE:
                raise
    return frozenset(found)


def kill_all(path: str, deadline: float) -> bool:
    """Kill until a group is empty; a process that forks meanwhile only makes another round.

    False when something outlives `deadline` (of the monotonic clock). Raises OSError.
    """
    try:
        descriptor = os.open(f"{path}/cgroup.kill", os.O_WRONLY | os.O_CLOEXEC)
    except OSError as error:
        if error.errno not in _GONE:
            raise
        return _kill_each(path, deadline)  # Version 1, before Linux 5.14, or gone.
    try:
        os.write(descriptor, b"1")
    except OSError as error:
        if error.errno != errno.ENODEV:
            raise
    finally:
        os.close(descriptor)
    return wait_until_empty(path, deadline)


def _kill_each(path: str, deadline: float) -> bool:
    while pids := pids_below(path):
        if pids == {0} or time.monotonic() >= deadline:
            return False
        opened = ((pid, processes.pidfd_of(pid)) for pid in pids - {0})
        pidfds = {pid: pidfd for pid, pidfd in opened if pidfd is not None}
        try:
            # Still listed after its descriptor was opened: the descriptor can't mean another.
            doomed = [pidfds[pid] for pid in pids_below(path) & pidfds.keys()]
            for pidfd in doomed:
                processes.kill(pidfd)
            for pidfd in doomed:
                if not is_readable(pidfd, deadline - time.monotonic()):
                    return False
        finally:
            for pidfd in pidfds.values():
                os.close(pidfd)
    return True


def wait_until_empty(path: str, deadline: float) -> bool:
    """Wait for a version 2 group's `populated 0`, which the kernel tells by POLLPRI."""
    try:
        descriptor = os.open(f"{path}/cgroup.events", os.O_RDONLY | os.O_CLOEXEC)
    except OSError as error:
        if error.errno not in _GONE:
            raise
        return not pids_below(path)  # Version 1, or gone.
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


def remove_tree(path: str, emptying_s: float = EMPTYING_S) -> bool:
    """Remove a group and all below it; False when something runs in one of them.

    What is still leaving one is waited for, at most `emptying_s` seconds.
    """
    for group in tree(path):
        if not remove_one(group) and not (
            wait_until_empty(group, time.monotonic() + emptying_s) and remove_one(group)
        ):
            return False
    return True


def remove_one(path: str) -> bool:
    """Remove one group; False when something is in it or below it. A missing one is fine."""
    try:
        os.rmdir(path)
    except FileNotFoundError:
        return True
    except OSError as error:
        if error.errno not in (errno.EBUSY, errno.ENOTEMPTY):
            raise
        return False
    return True
