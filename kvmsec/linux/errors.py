"""What goes wrong: one base for every error that a person may see, and the errors of this room."""

from collections.abc import Sequence
from pathlib import Path


class Fault(Exception):
    """An error that says what was wrong (`message`) and, where there is one, what to do (`hint`).

    Every package derives its own root from it, so that the command line prints all of them alike.
    """

    def __init__(self, message: str, *, hint: str | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint


class LinuxError(Fault):
    """The root of what `kvmsec.linux` raises; plain system call failures stay `OSError`."""


class CommandFailed(LinuxError):
    """A command ended with a status that its caller does not take."""

    def __init__(self, argv: Sequence[str], status: int, stderr: bytes) -> None:
        words = stderr.decode(errors="replace").strip() or "it said nothing"
        super().__init__(f"{argv[0]} ended with status {status}: {words}")
        self.argv = tuple(argv)
        self.status = status
        self.stderr = stderr


class CommandTimedOut(LinuxError):
    """A command did not end in time and was killed."""

    def __init__(self, argv: Sequence[str], timeout_s: float) -> None:
        super().__init__(f"{argv[0]} did not end within {timeout_s:g} s and was killed")
        self.argv = tuple(argv)
        self.timeout_s = timeout_s


class LockBusy(LinuxError):
    """Somebody else holds the lock."""

    def __init__(self, path: Path) -> None:
        super().__init__(
            f"{path} is locked by another process",
            hint="wait until the other command has ended, then try again",
        )
        self.path = path


class ChildFailed(LinuxError):
    """A function that ran in a child process raised; `kind` is the exception's type name."""

    def __init__(self, what: str, kind: str, detail: str) -> None:
        super().__init__(f"{what}: {detail}" if detail else f"{what}: {kind}")
        self.what = what
        self.kind = kind
        self.detail = detail


class ChildTimedOut(LinuxError):
    """A function that ran in a child process did not end in time; the child was killed."""

    def __init__(self, what: str, timeout_s: float) -> None:
        super().__init__(f"{what} did not end within {timeout_s:g} s")
        self.what = what
        self.timeout_s = timeout_s


class ManyThreads(LinuxError):
    """A process with several threads was about to fork: the child would have one of them only."""

    def __init__(self, count: int) -> None:
        super().__init__(
            f"this process has {count} threads, and a fork takes only one of them along",
            hint="call kvmsec from a process with one thread; start its threads in another",
        )
        self.count = count


class UntrustedPath(LinuxError):
    """A path that root is about to rely on could be changed by somebody else."""

    def __init__(self, path: Path, problem: str) -> None:
        super().__init__(
            f"{path} {problem}",
            hint="make it and every directory above it root's, writable by nobody else",
        )
        self.path = path
        self.problem = problem

    def told_of(self, path: Path) -> str:
        """The problem in a message about `path`, which is not named twice."""
        return self.problem if self.path == path else self.message
