"""The processes of a uid: found by any of its four ids, and ended all at once."""

import contextlib
import errno
import os
import re
import select
import signal
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Final

from attrs import evolve, frozen

from kvmsec.linux import processes as linux_processes
from kvmsec.linux.children import run_in_child
from kvmsec.linux.credentials import NOBODY
from kvmsec.linux.locks import FileLock
from uidpool.accounts import find_lasting_problems
from uidpool.errors import NotSweepable

_STATUS_BYTES: Final = 4096
# The name is escaped by the kernel, so that no process can put a line of its own in here.
_FIELDS: Final = re.compile(
    rb"Name:\t(?P<name>[^\n]*)\n.*?State:\t(?P<state>\S).*?\nUid:\t(?P<uids>[\d\t]+)\n", re.DOTALL
)
_THREADS: Final = re.compile(rb"\nThreads:\t(\d+)\n")
_DESCRIBED: Final = 5


@frozen
class Process:
    """A process that has the uid as real, effective, saved or filesystem uid.

    `name` and `command` are what it calls itself: to be shown, and not to be believed.
    """

    pid: int
    name: str
    is_zombie: bool
    command: str = ""

    def __str__(self) -> str:
        return f"{self.pid} ({self.command[:80] or self.name[:16]!a})"


Settled = Callable[[], Mapping[int, int]]
"""Asks after processes that run at the time of the answer, and have the same uid as all four of
their ids and for good, since they lack every privilege to take another: the uid of each, by pid."""


def nobody_settled() -> Mapping[int, int]:
    """For who knows of no such process."""
    return {}


def find_processes(
    uid: int, *, settled: Settled = nobody_settled, at_most: int | None = None
) -> list[Process]:
    """Every process of a uid that this PID namespace can see, those of inner namespaces too.

    A process is a zombie when none of its threads runs any more: a leader may end first. Threads
    share their leader's uids unless a privileged program changed that, which an instance is not.
    Those that are `settled` with another uid are not looked at, of the rest `at_most` so many.
    Raises ProcessLookupError when /proc doesn't show the caller's namespace, and when something of
    the uid runs that no look at /proc finds (a process that forks and ends all the time); OSError
    (E2BIG) when there are more to look at.
    """
    if os.readlink("/proc/self") != str(os.getpid()):
        raise ProcessLookupError("/proc is not that of this PID namespace")
    found = _scan(uid, settled, at_most)
    if not found and _anything_runs(uid):
        found = _scan(uid, settled, at_most)
        if not found and _anything_runs(uid):
            raise ProcessLookupError("processes of the uid run that can't be caught in /proc")
    return found


def uids_that_run() -> Mapping[int, Process]:
    """Every uid that a process has as one of its four, and one of its processes; one look at /proc.

    For what is told to a person: what forks and ends all the time may be missed.
    """
    found: dict[int, Process] = {}
    for pid in linux_processes.pids():
        if (status := _status(pid)) is not None and (fields := _FIELDS.match(status)):
            one = Process(pid, fields["name"].decode(errors="replace"), fields["state"] in b"ZX")
            for word in fields["uids"].split():
                found.setdefault(int(word), one)
    return found


def _scan(uid: int, settled: Settled, at_most: int | None) -> list[Process]:
    listed = linux_processes.pids()
    # In this order: whoever was listed, and runs as another uid's after that, was it all along.
    others = {pid for pid, other in settled().items() if other != uid}
    looked_at = [pid for pid in listed if pid not in others]
    if at_most is not None and len(looked_at) > at_most:
        raise OSError(errno.E2BIG, os.strerror(errno.E2BIG), "/proc")
    word = str(uid).encode()
    return [one for pid in looked_at if (one := _read(pid, word))]


def _status(pid: int) -> bytes | None:
    try:
        descriptor = os.open(f"/proc/{pid}/status", os.O_RDONLY | os.O_CLOEXEC)
    except (FileNotFoundError, ProcessLookupError):
        return None
    try:
        return os.read(descriptor, _STATUS_BYTES)
    except ProcessLookupError:
        return None
    finally:
        os.close(descriptor)


def _read(pid: int, uid: bytes) -> Process | None:
    status = _status(pid)
    fields = None if status is None else _FIELDS.match(status)
    if status is None or fields is None or uid not in fields["uids"].split():
        return None
    threads = _THREADS.search(status)
    has_ended = fields["state"] in b"ZX" and threads is not None and int(threads[1]) <= 1
    return Process(pid, fields["name"].decode(errors="replace"), has_ended)


def _anything_runs(uid: int) -> bool:
    """Whether the kernel knows a process with this real uid: one call, which no fork outruns."""
    try:
        os.getpriority(os.PRIO_USER, uid)
    except ProcessLookupError:
        return False
    return True


def described(processes: Sequence[Process]) -> tuple[Process, ...]:
    """The same with the command lines of the first few, for whoever has to look for them."""
    if not processes:
        return ()
    import psutil  # only for a uid that isn't clean: its import costs more than a whole look

    shown = []
    for one in processes[:_DESCRIBED]:
        with contextlib.suppress(psutil.Error):
            one = evolve(one, command=" ".join(psutil.Process(one.pid).cmdline()))
        shown.append(one)
    return (*shown, *processes[_DESCRIBED:])


def check_sweepable(uid: int, reaper_uid: int) -> None:
    """Raise NotSweepable unless ending everything of the uid can hit only a pool's.

    A record may be damaged, so that a uid is not the pool's because one says so: it must also be
    fit for a pool by this host's accounts. Raises OSError when these can't be read.
    """
    if reaper_uid <= 0 or reaper_uid == uid:
        raise NotSweepable(uid, f"uid {reaper_uid} can't be the reaper")
    if problems := find_lasting_problems(uid):
        raise NotSweepable(uid, "; ".join(problem.message for problem in problems))


def end_processes(uid: int, *, reaper_uid: int, lock: Path, timeout_s: float) -> list[Process]:
    """Kill everything of a uid of the pool; returns what is left after at most `timeout_s`.

    One kill(-1) ends all of them at once (a fork is refused while a signal is pending, so that no
    fork loop outruns it), by a child that may signal nobody else. One sweep at a time, under
    `lock`: two sweepers have the reaper's uid in common and would hit each other. Raises
    NotSweepable, LockBusy, ChildFailed, ChildTimedOut, OSError.
    """
    check_sweepable(uid, reaper_uid)
    deadline = time.monotonic() + timeout_s
    sweep_lock = FileLock(lock)
    sweep_lock.acquire(timeout_s)
    try:
        while True:
            remaining = max(deadline - time.monotonic(), 0.1)
            run_in_child(
                lambda: _sweep(uid, reaper_uid),
                what=f"ending the processes of uid {uid}",
                timeout_s=remaining,
            )
            left = [one for one in find_processes(uid) if not one.is_zombie]
            if not left or time.monotonic() >= deadline:
                return left
            _wait_for_end(left, deadline)
    finally:
        sweep_lock.release()


def _sweep(uid: int, reaper_uid: int) -> None:
    """In a child: become (reaper, uid, reaper) and kill everything that this may signal.

    A signal goes to those whose real or saved uid is the sender's real or effective one (kill(2)).
    With real uid 0 that would be every process of root's; with (x, uid, uid) the instance could
    signal the sweeper first.
    """
    os.setgroups([])
    os.setresgid(NOBODY, NOBODY, NOBODY)
    os.setresuid(reaper_uid, uid, reaper_uid)
    status = linux_processes.read_status(os.getpid())
    if status is None or status.uids != (reaper_uid, uid, reaper_uid, uid):
        raise PermissionError("the sweeper did not get its uids")
    if any(status.capabilities[:3]) or status.capabilities[4]:
        raise PermissionError("the sweeper kept a capability")
    with contextlib.suppress(ProcessLookupError):  # Nobody else is in this PID namespace.
        os.kill(-1, signal.SIGKILL)


def _wait_for_end(processes: list[Process], deadline: float) -> None:
    """Wait until these processes have ended, or the deadline."""
    with contextlib.ExitStack() as stack:
        waiting = select.poll()
        count = 0
        for one in processes[:256]:
            if (descriptor := linux_processes.pidfd_of(one.pid)) is not None:
                stack.callback(os.close, descriptor)
                waiting.register(descriptor, select.POLLIN)
                count += 1
        while count and (remaining := deadline - time.monotonic()) > 0:
            for descriptor, _ in waiting.poll(remaining * 1000):
                waiting.unregister(descriptor)
                count -= 1
