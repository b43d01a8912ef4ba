"""Processes: which one is meant (never by a pid alone), and what the kernel says of it."""

import contextlib
import errno
import os
import re
import signal
from functools import cache
from pathlib import Path
from typing import Final

from attrs import frozen

_PID: Final = re.compile(rb"^Pid:\t(-?\d+)$", re.MULTILINE)
_STATUS_LIMIT: Final = 1 << 20  # 65,536 groups (NGROUPS_MAX) of ten digits fit.
# Linux before 6.15 says EINVAL of a process that is just being reaped, and of a number that is a
# thread's alone; later ones ESRCH and ENOENT (pidfd_prepare in kernel/fork.c).
_NO_PROCESS: Final = (errno.ESRCH, errno.EINVAL, errno.ENOENT)
CAPABILITY_SETS: Final = ("CapInh", "CapPrm", "CapEff", "CapBnd", "CapAmb")


@cache
def boot_id() -> str:
    """The identity of the running boot (random(4)): a pid of another boot means nothing."""
    return Path("/proc/sys/kernel/random/boot_id").read_text().strip()


@frozen
class ProcessId:
    """One process for good: its pid, its start time in clock ticks since boot, and the boot."""

    pid: int
    start_ticks: int
    boot_id: str


@frozen
class ProcessStatus:
    """What /proc/PID/status says (proc(5)); ids are real, effective, saved and filesystem's.

    umask: None where the process has no file system state, as a zombie.
    seccomp_filters: how many are in force; None where the kernel does not tell (before 5.9).
    """

    name: str
    state: str
    umask: int | None
    uids: tuple[int, ...]
    gids: tuple[int, ...]
    groups: tuple[int, ...]
    capabilities: tuple[int, ...]
    no_new_privs: bool
    seccomp: int
    seccomp_filters: int | None
    threads: int

    @property
    def is_zombie(self) -> bool:
        """Whether it has ended: a leader that ended before its threads only looks like it."""
        return _has_ended(self.state, self.threads)


def pids() -> list[int]:
    """Every process that this pid namespace can see, one numbered entry of /proc each."""
    return [int(name) for name in os.listdir("/proc") if name.isdigit()]


@frozen
class _Look:
    """What one read of /proc/PID/stat shows, all of the same moment."""

    state: str
    threads: int
    start_ticks: int


def identify(pid: int) -> ProcessId | None:
    """The identity of a running process (or zombie), None when there is none with this pid."""
    seen = _look_at(pid)
    return None if seen is None else ProcessId(pid, seen.start_ticks, boot_id())


def _look_at(pid: int) -> _Look | None:
    stat = _read(f"/proc/{pid}/stat")
    if not stat:
        return None
    # The name may hold anything, spaces and parentheses too: count from the last parenthesis.
    after_name = stat[stat.rindex(b")") + 2 :].split()
    return _Look(after_name[0].decode(), int(after_name[17]), int(after_name[19]))


def _has_ended(state: str, threads: int) -> bool:
    return state in ("Z", "X") and threads <= 1


def myself() -> ProcessId:
    """The identity of the calling process."""
    return _of_this_process(os.getpid())


@cache
def _of_this_process(pid: int) -> ProcessId:
    """Remembered by pid, since a forked child is another: it starts once."""
    found = identify(pid)
    if found is None:
        raise ProcessLookupError("/proc does not show the calling process: is it mounted?")
    return found


def is_alive(process: ProcessId) -> bool:
    """Whether that very process is there and has not ended; a zombie has."""
    seen = _look_at(process.pid)
    if seen is None or ProcessId(process.pid, seen.start_ticks, boot_id()) != process:
        return False
    return not _has_ended(seen.state, seen.threads)


def pidfd_of(pid: int) -> int | None:
    """A descriptor of the process with this pid (pidfd_open(2)), close-on-exec; None without one.

    Raises OSError when none can be had (EMFILE, ENFILE).
    """
    try:
        return os.pidfd_open(pid)
    except OSError as error:
        if error.errno in _NO_PROCESS:
            return None
        raise


def open_pidfd(process: ProcessId) -> int | None:
    """A descriptor of that very process, close-on-exec; None when it is gone.

    The start time is compared after opening: from then on the descriptor can't mean another.
    Raises OSError when none can be had.
    """
    descriptor = pidfd_of(process.pid)
    if descriptor is None:
        return None
    if identify(process.pid) == process:
        return descriptor
    os.close(descriptor)
    return None


def pid_of(pidfd: int) -> int | None:
    """The pid of the process behind a descriptor; None once it is gone and collected."""
    found = _PID.search(_read(f"/proc/self/fdinfo/{pidfd}"))
    assert found is not None
    pid = int(found[1])
    return pid if pid > 0 else None


def kill(pidfd: int, number: signal.Signals = signal.SIGKILL) -> None:
    """Signal the process behind a descriptor; one that has ended is fine."""
    with contextlib.suppress(ProcessLookupError):
        signal.pidfd_send_signal(pidfd, number)


def read_status(pid: int) -> ProcessStatus | None:
    """Read /proc/PID/status; None when there is no such process.

    Raises KeyError when the kernel leaves out a line that a judgement could rest on.
    """
    raw = _read(f"/proc/{pid}/status")
    if not raw:
        return None
    # The kernel escapes newlines in a process's name, and no other character that `splitlines`
    # takes for the end of a line: a form feed there would let a process forge the lines below.
    lines = (line.partition(":") for line in raw.decode(errors="replace").split("\n"))
    fields = {key: value.strip() for key, _, value in lines}
    return ProcessStatus(
        name=fields["Name"],
        state=fields["State"][:1],
        umask=int(umask, 8) if (umask := fields.get("Umask")) else None,
        uids=_numbers(fields["Uid"]),
        gids=_numbers(fields["Gid"]),
        groups=_numbers(fields["Groups"]),
        capabilities=tuple(int(fields[name], 16) for name in CAPABILITY_SETS),
        no_new_privs=fields.get("NoNewPrivs") == "1",
        seccomp=int(fields.get("Seccomp", "0")),
        seccomp_filters=int(filters) if (filters := fields.get("Seccomp_filters")) else None,
        threads=int(fields["Threads"]),
    )


def _numbers(text: str) -> tuple[int, ...]:
    return tuple(int(word) for word in text.split())


def _read(path: str) -> bytes:
    """A /proc file of a process; empty when that has gone."""
    chunks = []
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except (FileNotFoundError, ProcessLookupError):
        return b""
    try:
        while chunk := os.read(descriptor, _STATUS_LIMIT):
            chunks.append(chunk)
    except ProcessLookupError:
        return b""
    finally:
        os.close(descriptor)
    return b"".join(chunks)
