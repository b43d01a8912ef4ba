"""The resource limits of an instance's process: told to it by its launcher, set, and read back.

Each is hard and soft at once, so that a process that was taken over can't raise it. What isn't
named here stays as the launcher has it: `stack` (the default size of QEMU's thread stacks), `cpu`,
`data` and `rss` (memory and CPU time are bounded by control groups), `rttime` (it has no real-time
priority), and `locks`, which Linux has not counted since 2.4.25 (getrlimit(2)).
"""

import contextlib
import os
import resource
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Final

from attrs import frozen

UNLIMITED: Final = resource.RLIM_INFINITY
_MOST: Final = 2**63 - 1
_OOM_SCORE: Final = "oom_score_adj"
_CORE_FILTER: Final = "coredump_filter"


@frozen
class Bound:
    """One limit: the kernel's number for it, its name in /proc/PID/limits, and its value.

    may_be_lower: one that is lower already and can't be raised does as well.
    """

    resource: int
    name: str
    value: int
    may_be_lower: bool = False

    @property
    def shown(self) -> str:
        """The value as /proc/PID/limits has it."""
        return _shown(self.value)

    def agrees_with(self, found: tuple[str, str] | None) -> bool:
        """Whether these soft and hard values are what was asked for, or lower where that does."""
        if found is None or found[0] != found[1]:
            return False
        is_lower = found[0].isdigit() and 0 <= int(found[0]) < self.value
        return found[0] == self.shown or (self.may_be_lower and is_lower)


@frozen
class ProcessLimits:
    """The limits of one QEMU; the defaults do for a small machine without disks.

    processes: of the uid, all its processes and threads on the node counted (getrlimit(2)); None
    leaves the launcher's, for a uid that is shared or is root's, which isn't counted.
    file_bytes: of any file that it writes, its images among them, and its memory where that is
    a file (memfd). None is for a child that is limited before that is known (`limit_files`).
    locked_bytes: mlock(2), and the rings of io_uring before Linux 5.12.
    oom_score_adjust: -1000 to 1000, more is killed earlier (proc_pid_oom_score_adj(5)).
    """

    open_files: int = 1024
    processes: int | None = None
    file_bytes: int | None = 1 << 30
    locked_bytes: int = 8 << 20
    oom_score_adjust: int = 0

    @property
    def bounds(self) -> tuple[Bound, ...]:
        """Every limit that is set; `core` first, since a failure must not leave a core."""
        return (
            # One byte is too little for a file, and the one value for which the kernel starts no
            # program of the node's that a core is piped to: for zero it does (fs/coredump.c).
            Bound(resource.RLIMIT_CORE, "Max core file size", 1, may_be_lower=True),
            Bound(resource.RLIMIT_NOFILE, "Max open files", self.open_files),
            *self._of_processes(),
            *self._of_files(),
            self._of_locked_memory(),
            # A launcher's own, from a shell with `ulimit -v`, would end a guest for its size.
            Bound(resource.RLIMIT_AS, "Max address space", UNLIMITED),
            # POSIX message queues are memory of the kernel's that outlives a process.
            Bound(resource.RLIMIT_MSGQUEUE, "Max msgqueue size", 0),
            Bound(resource.RLIMIT_SIGPENDING, "Max pending signals", 1024, may_be_lower=True),
            Bound(resource.RLIMIT_NICE, "Max nice priority", 0),
            Bound(resource.RLIMIT_RTPRIO, "Max realtime priority", 0),
        )

    def _of_processes(self) -> Iterator[Bound]:
        if self.processes is not None:
            yield Bound(resource.RLIMIT_NPROC, "Max processes", self.processes)

    def _of_files(self) -> Iterator[Bound]:
        if self.file_bytes is not None:
            yield Bound(resource.RLIMIT_FSIZE, "Max file size", min(self.file_bytes, _MOST))

    def _of_locked_memory(self) -> Bound:
        # A node's own may be less, which does where QEMU isn't told to lock all that it has.
        may_be_lower = self.locked_bytes != UNLIMITED
        return Bound(resource.RLIMIT_MEMLOCK, "Max locked memory", self.locked_bytes, may_be_lower)

    def apply(self) -> None:
        """Limit the calling process, and read back what it has then. Raises OSError.

        Asked of the kernel without /proc's table of them: it is for `problems_of`.
        """
        _set_all(self.bounds)
        _write_own(_OOM_SCORE, str(self.oom_score_adjust))
        # Should a core be written all the same (gcore, another kernel), no mapping is in it. It
        # lasts through the exec (core(5)).
        with contextlib.suppress(FileNotFoundError):  # A kernel without CONFIG_ELF_CORE.
            _write_own(_CORE_FILTER, "0")
        if problems := self._other_problems_of("self"):
            raise OSError(0, "; ".join(problems))

    def limit_files(self) -> None:
        """Limit the size of files alone, of a calling process that has the rest. Raises OSError."""
        _set_all(self._of_files())

    def problems_of(self, pid: int | str) -> list[str]:
        """What /proc shows of a process that isn't as it should be. Raises OSError."""
        shown = parse_limits(Path(f"/proc/{pid}/limits").read_text())
        problems = []
        for bound in self.bounds:
            found = shown.get(bound.name)
            if not bound.agrees_with(found):
                problems.append(f"{bound.name} {found}, wanted {bound.shown}")
        return problems + self._other_problems_of(pid)

    def _other_problems_of(self, pid: int | str) -> list[str]:
        """What is no limit of getrlimit(2)."""
        problems = []
        score = _read(f"/proc/{pid}/{_OOM_SCORE}").strip()
        if score != str(self.oom_score_adjust):
            problems.append(f"{_OOM_SCORE} {score}, wanted {self.oom_score_adjust}")
        try:
            # Empty once the process has ended and has no memory that could be in one.
            kinds = int(_read(f"/proc/{pid}/{_CORE_FILTER}") or "0", 16)
        except FileNotFoundError:
            return problems  # A kernel without CONFIG_ELF_CORE writes none at all.
        if kinds:
            problems.append(f"{_CORE_FILTER} {kinds:#x}, wanted 0")
        return problems


def parse_limits(text: str) -> Mapping[str, tuple[str, str]]:
    """/proc/PID/limits as name -> (soft, hard), in the kernel's words (proc_pid_limits(5))."""
    found = {}
    for line in text.splitlines()[1:]:
        name, values = line[:25].strip(), line[25:].split()
        if len(values) >= 2:
            found[name] = (values[0], values[1])
    return found


def _shown(value: int) -> str:
    return "unlimited" if value == UNLIMITED else str(value)


def _read(path: str) -> str:
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        return os.read(descriptor, 4096).decode()
    finally:
        os.close(descriptor)


def _set_all(bounds: Iterable[Bound]) -> None:
    """Set each limit, and read it back."""
    for bound in bounds:
        _set(bound)
        soft, hard = resource.getrlimit(bound.resource)
        if not bound.agrees_with((_shown(soft), _shown(hard))):
            raise OSError(0, f"{bound.name} {soft}, {hard}, wanted {bound.shown}")


def _set(bound: Bound) -> None:
    try:
        resource.setrlimit(bound.resource, (bound.value, bound.value))
    except ValueError as error:  # So says Python where the kernel says EPERM.
        _, most = resource.getrlimit(bound.resource)
        if not bound.may_be_lower or not 0 <= most < bound.value:
            what = f"{bound.name}: {bound.shown} can't be had, the launcher's own is {most}"
            raise PermissionError(1, what) from error
        resource.setrlimit(bound.resource, (most, most))


def _write_own(name: str, text: str) -> None:
    descriptor = os.open(f"/proc/self/{name}", os.O_WRONLY | os.O_CLOEXEC)
    try:
        os.write(descriptor, text.encode())
    except OSError as error:
        what = f"{name}: {text} can't be had ({error.strerror})"
        raise OSError(error.errno, what) from error
    finally:
        os.close(descriptor)
