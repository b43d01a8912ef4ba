"""The only place that starts QEMU; what the kernel says of it afterwards; its end."""

import contextlib
import os
import signal
from collections.abc import Sequence
from typing import Final, NoReturn

import msgspec
from attrs import frozen

from hypervisor.descriptors import foreign_descriptors, identity_of
from hypervisor.errors import HypervisorError, JailFailed
from hypervisor.jail import (
    NETWORK_NAMESPACE,
    Jail,
    close_foreign,
    duplicate_above,
    enter,
    execute,
)
from kvmsec.linux import forking, processes, syscalls
from kvmsec.linux.processes import ProcessId, ProcessStatus
from kvmsec.linux.readiness import is_hung_up, is_readable

_ENVIRONMENT: Final = {"PATH": "/usr/bin", "LC_ALL": "C"}
_GO: Final = b"g"
_EXECUTING: Final = b"x"
_ALONE: Final = 125
"""The exit status of a child whose launcher is gone."""
_KILLED: Final = "the process was killed before it could start QEMU"


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


class Newborn:
    """A child that is being shut in and waits for `release` before it becomes QEMU.

    Between the fork and `release` the launcher writes down whose process this is. Should it die
    before, the kernel ends the child with it: no unknown QEMU can be left behind.
    """

    def __init__(self, process: ProcessId, pidfd: int, go: int, report: int, jail: Jail) -> None:
        self.process = process
        self.jail = jail
        # Looked up now: the launcher closes its own copies before QEMU's are checked.
        self.granted = frozenset(map(identity_of, (*jail.descriptors.values(), jail.log)))
        self.pidfd = pidfd
        self._go = go
        self._report = report

    def release(self) -> None:
        """Let the child execute QEMU once its jail stands."""
        try:
            os.write(self._go, _GO)
        except BrokenPipeError:
            return  # It failed in the jail; `executed` says where.
        finally:
            os.close(self._go)
            self._go = -1

    def fileno(self) -> int:
        """A descriptor that is readable once the child has become QEMU, or failed to."""
        return self._report

    def executed(self) -> None:
        """Return when the child has become QEMU; raises JailFailed with what went wrong.

        What QEMU does from then on, its end included, is another question.
        """
        _require_executed(self._report)

    def close(self) -> None:
        """Free the pipes (the process is not touched, the pidfd stays the caller's)."""
        for descriptor in (self._go, self._report):
            if descriptor >= 0:
                os.close(descriptor)
        self._go = self._report = -1


def _require_executed(report: int) -> None:
    words = b""
    while chunk := os.read(report, 4096):
        words += chunk
    if words != _EXECUTING:
        raise _failure(words)


def _failure(words: bytes) -> JailFailed:
    try:
        failure = msgspec.json.decode(words.removeprefix(_EXECUTING))
        step, number, detail = failure["step"], failure["errno"], failure["detail"]
    except (ValueError, TypeError, KeyError):
        return JailFailed("exec", 0, _KILLED)
    return JailFailed(str(step), int(number), str(detail))


def spawn(jail: Jail, program: str, argv: Sequence[str]) -> Newborn:
    """Fork the process that will be QEMU, as the caller's own child.

    Raises ManyThreads when the calling process has more than one, and OSError when it can't fork;
    no process and no descriptor is left then.
    """
    with contextlib.ExitStack() as childs, contextlib.ExitStack() as undo:
        go_reader, go = os.pipe2(os.O_CLOEXEC)
        childs.callback(os.close, go_reader)
        undo.callback(os.close, go)
        report, report_writer = os.pipe2(os.O_CLOEXEC)
        childs.callback(os.close, report_writer)
        undo.callback(os.close, report)
        pid, pidfd = forking.clone_init(jail.born_in)
        if pid == 0:
            _become_qemu(jail, program, argv, go_reader, report_writer)
        undo.callback(_end, pidfd)
        process = processes.identify(pid)
        if process is None:
            # Ended already, and not kept for us: SIGCHLD is ignored.
            childs.close()
            _require_executed(report)
            raise ProcessLookupError("/proc does not show the new process: is it mounted?")
        undo.pop_all()
    return Newborn(process, pidfd, go, report, jail)


def _end(pidfd: int) -> None:
    processes.kill(pidfd)
    with contextlib.suppress(ChildProcessError):
        os.waitid(os.P_PIDFD, pidfd, os.WEXITED)
    os.close(pidfd)


def _become_qemu(jail: Jail, program: str, argv: Sequence[str], go: int, report: int) -> NoReturn:
    """The child's whole life as Python; it must never return into the launcher's code."""
    try:
        try:
            close_foreign(jail, (go, report))
            # Above every number that the jail hands out, so that neither is overwritten.
            lowest = max(jail.descriptors, default=2) + 1
            go, report = (duplicate_above(descriptor, lowest) for descriptor in (go, report))
            _end_with_launcher(go)
            enter(jail)
            _end_with_launcher(go)
            if os.read(go, 1) != _GO:
                os._exit(_ALONE)
            syscalls.outlive_parent()
            os.write(report, _EXECUTING)
            execute(jail, program, argv, _ENVIRONMENT)
        except JailFailed as error:
            _report(report, error.step, error.errno, error.detail)
        except OSError as error:
            _report(report, "exec", error.errno or 0, str(error))
        except BaseException as error:
            _report(report, "jail", 0, repr(error))
    finally:
        os._exit(126)


def _end_with_launcher(go: int) -> None:
    """Be ended as soon as the launcher is; said again whenever ids change, which undoes it.

    Once its launcher is gone another command may clean the uid and lease it anew: the child must
    not take it after that.
    """
    syscalls.end_with_parent()
    if is_hung_up(go):  # It was gone before; the first process of a namespace sees no parent.
        os._exit(_ALONE)


def _report(pipe: int, step: str, number: int, detail: str) -> None:
    said = detail[:1024].encode(errors="backslashreplace").decode()  # A path may be no text.
    told = {"step": step, "errno": number, "detail": said}
    os.write(pipe, msgspec.json.encode(told))


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
        "capabilities": (status.capabilities, (0,) * 5),
        "no_new_privs": (status.no_new_privs, True),
        "seccomp mode": (status.seccomp, 2),
    }
    problems = [
        f"{what} {found}, wanted {want}" for what, (found, want) in wanted.items() if found != want
    ]
    problems += _missing_filters(status, jail)
    try:
        problems += _shared_namespaces(process.pid, jail.without_locks)
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
