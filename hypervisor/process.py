"""A QEMU that was started: what the kernel says of how it is confined, its use, its end."""

import os
import signal
from collections.abc import Iterator, Sequence

from attrs import frozen

from hypervisor.descriptors import foreign_descriptors
from hypervisor.errors import HypervisorError
from hypervisor.jail import ENVIRONMENT, NETWORK_NAMESPACE, UMASK, Jail
from hypervisor.newborn import Newborn
from hypervisor.tree import OUTPUT
from kvmsec.linux import processes
from kvmsec.linux.mounts import read_mounts_of
from kvmsec.linux.processes import ProcessId, ProcessStatus
from kvmsec.linux.readiness import is_readable


class NotConfined(HypervisorError):
    """The kernel shows a process that isn't shut in as it was asked for; it was ended."""

    def __init__(self, problems: Sequence[str]) -> None:
        super().__init__(
            f"QEMU is not confined as asked: {'; '.join(problems)}",
            hint="run `kvmsec doctor`; the kernel or a security module of this host interferes",
        )
        self.problems = tuple(problems)


class QemuGone(HypervisorError):
    """QEMU ended before the kernel could show how it is confined."""

    def __init__(self) -> None:
        super().__init__(
            "QEMU ended before it was seen to be confined",
            hint="what it said last, or the kernel's log, may say why",
        )


def confinement_problems(newborn: Newborn) -> list[str]:
    """Hold what /proc says of a started QEMU against what its jail was to be (proc(5)).

    Raises QemuGone, and OSError when /proc can't be read.
    """
    process, jail = newborn.process, newborn.jail
    status = processes.read_status(process.pid)
    if status is None or processes.identify(process.pid) != process:
        raise QemuGone
    uid, gid = jail.credentials.uid, jail.credentials.gid
    wanted = {
        "uids": (status.uids, (uid,) * 4),
        "gids": (status.gids, (gid,) * 4),
        "groups": (status.groups, ()),
        "umask": (status.umask, UMASK),
        "capabilities": (status.capabilities, (0,) * 5),
        "no_new_privs": (status.no_new_privs, True),
        "seccomp mode": (status.seccomp, 2),
    }
    problems = [
        f"{what} {found}, wanted {want}" for what, (found, want) in wanted.items() if found != want
    ]
    problems += _missing_filters(status, jail)
    try:
        problems += _left_of_the_launcher(process.pid)
        problems += _shared_namespaces(process.pid, jail.cell.without_locks)
        problems += _writable_mounts(process.pid)
        problems += foreign_descriptors(process.pid, newborn.granted)
        problems += jail.limits.problems_of(process.pid)
    except (FileNotFoundError, ProcessLookupError) as error:
        raise QemuGone from error
    return problems


def _missing_filters(status: ProcessStatus, jail: Jail) -> list[str]:
    """QEMU's own filter and ours under it must be there, beside those that the launcher is under.

    None at all is the seccomp mode's to tell.
    """
    mine = processes.read_status(os.getpid())
    if not status.seccomp_filters or mine is None:
        return []
    wanted = (mine.seccomp_filters or 0) + (1 if jail.filter_in_force is None else 2)
    if status.seccomp_filters >= wanted:
        return []
    return [f"seccomp filters {status.seccomp_filters}, wanted at least {wanted}"]


def _left_of_the_launcher(pid: int) -> Iterator[str]:
    """Its session, by which a terminal is typed into, and its environment, which may be secret."""
    if os.getsid(pid) != pid:
        yield "it is in a session of its launcher's"
    wanted = b"".join(f"{name}={value}\0".encode() for name, value in ENVIRONMENT.items())
    with open(f"/proc/{pid}/environ", "rb") as environ:
        if environ.read(len(wanted) + 1) != wanted:
            yield "its environment is not the one that it was to have"


def _writable_mounts(pid: int) -> list[str]:
    return [
        f"{mount.path} can be written to in its tree"
        for mount in read_mounts_of(pid)
        if "ro" not in mount.options | mount.super_options and mount.path != OUTPUT
    ]


def _shared_namespaces(pid: int, without_locks: frozenset[str] = frozenset()) -> list[str]:
    kinds = ["mnt", "net", "ipc", "uts", "pid", "cgroup"]
    if NETWORK_NAMESPACE in without_locks:
        kinds.remove("net")
    return [
        f"it shares the node's {kind} namespace"
        for kind in kinds
        if os.readlink(f"/proc/{pid}/ns/{kind}") == os.readlink(f"/proc/self/ns/{kind}")
    ]


def kill_and_wait(pidfd: int, timeout_s: float) -> bool:
    """SIGKILL the process behind a descriptor and wait for its end; False when it outlives that.

    The end of a PID namespace's first process is seen only once every process in it has ended.
    """
    processes.kill(pidfd, signal.SIGKILL)
    return is_readable(pidfd, timeout_s)


@frozen
class Ended:
    """How a process of the caller's own ended: its exit status, or the signal that ended it."""

    status: int | None
    signal: signal.Signals | None


def reap(pidfd: int) -> Ended | None:
    """Take the exit status of an ended child; None when it isn't the caller's child."""
    try:
        result = os.waitid(os.P_PIDFD, pidfd, os.WEXITED | os.WNOHANG)
    except ChildProcessError:
        return None
    if result is None:
        return None
    if result.si_code == os.CLD_EXITED:
        return Ended(result.si_status, None)
    try:
        return Ended(None, signal.Signals(result.si_status))
    except ValueError:
        # A real-time signal without a name of its own: told as shells do.
        return Ended(128 + result.si_status, None)


@frozen
class Use:
    """What a process uses now: resident memory in bytes and CPU time in seconds since its start."""

    resident_bytes: int
    cpu_s: float


def use_of(process: ProcessId) -> Use | None:
    """What a running process uses; None once it is gone."""
    import psutil  # Not for a start, which forks: what is loaded has to be forked as well.

    try:
        seen = psutil.Process(process.pid)
        with seen.oneshot():
            memory, times = seen.memory_info(), seen.cpu_times()
    except psutil.NoSuchProcess:
        return None
    if processes.identify(process.pid) != process:
        return None
    return Use(memory.rss, times.user + times.system)
