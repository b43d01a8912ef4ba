"""What goes wrong between a machine's definition and a running QEMU: one root, and its children."""

import errno
from collections.abc import Iterable
from pathlib import Path
from typing import Final

from attrs import frozen

from kvmsec.linux.errors import Fault

_DOCTOR: Final = "`kvmsec doctor` says which piece this host's kernel lacks"
_JAIL_HINTS: Final = {
    errno.EINVAL: _DOCTOR,
    errno.EMSGSIZE: "give the machine fewer disks and interfaces, or QEMU fewer extra_arguments",
    errno.ENOSYS: _DOCTOR,
    errno.EPERM: "run kvmsec as root, outside a container",
    errno.ESTALE: "QEMU is being upgraded: try again",
    errno.EXDEV: "run kvmsec in the host's own mount namespace, outside a chroot",
}
_MORE_NAMESPACES: Final = (
    "as many namespaces of a kind are there as the host allows: look at the sysctls "
    "user.max_*_namespaces, and raise the one that is used up"
)
"""The kernel's word for that is ENOSPC (namespaces(7))."""


SESSION_KEYRING: Final = "session keyring"
"""The jail's step that some hosts refuse: its name."""
ALLOW_KEYCTL: Final = (
    "a filter of system calls or a security module keeps keyctl(2) from kvmsec: in a container, "
    "allow it keyctl, or run kvmsec on the host itself"
)
KEYRING_HINT: Final = (
    f"{ALLOW_KEYCTL}; or do without, in kvmsec.toml: "
    'confinement.may_be_missing = ["session-keyring"]'
)


class HypervisorError(Fault):
    """The root of what `hypervisor` raises; plain system call failures stay `OSError`."""


@frozen
class Problem:
    """One thing that is wrong with a definition: where (`disks[1].format`), and what."""

    where: str
    what: str

    def __str__(self) -> str:
        return f"{self.where}: {self.what}" if self.where else self.what


class SpecError(HypervisorError):
    """A machine's definition breaks rules; `problems` holds every one of them."""

    def __init__(self, source: str, problems: Iterable[Problem]) -> None:
        self.source = source
        self.problems = tuple(problems)
        listed = [str(problem) for problem in self.problems]
        if len(listed) == 1:
            text = f"{source}: {listed[0]}"
        else:
            text = "\n  ".join([f"{source}: {len(listed)} problems", *listed])
        super().__init__(text)


class ForbiddenArguments(HypervisorError):
    """Extra QEMU arguments are not among those that a node's configuration may add."""

    def __init__(self, problems: Iterable[Problem]) -> None:
        self.problems = tuple(problems)
        super().__init__(
            "\n  ".join(["extra QEMU arguments are refused:", *map(str, self.problems)]),
            hint="take them out of the extra arguments in kvmsec.toml",
        )


class Unsupported(HypervisorError):
    """The QEMU in use lacks what the machine asks for."""

    def __init__(self, what: str, version: str, *, hint: str | None = None) -> None:
        super().__init__(f"QEMU {version} {what}", hint=hint)
        self.what = what
        self.version = version


class QemuNotFound(HypervisorError):
    """No QEMU where one was looked for."""

    def __init__(self, tried: Iterable[str]) -> None:
        self.tried = tuple(tried)
        super().__init__(
            f"no QEMU found (tried {', '.join(self.tried)})",
            hint="install qemu-system-x86, or name the program with --qemu or qemu.path",
        )


class NotQemu(HypervisorError):
    """The program does not behave as QEMU does; `said` is what it printed, if anything."""

    def __init__(self, binary: Path, problem: str, said: str = "") -> None:
        words = f"; it said: {said}" if said else ""
        super().__init__(
            f"{binary} {problem}{words}",
            hint="name a working qemu-system-x86_64 with --qemu or qemu.path",
        )
        self.binary = binary
        self.problem = problem
        self.said = said


class QemuTooOld(HypervisorError):
    """This QEMU is older than the oldest one that kvmsec drives."""

    def __init__(self, binary: Path, version: str, oldest: str) -> None:
        super().__init__(
            f"{binary} is QEMU {version}; kvmsec needs {oldest} or later",
            hint="install a newer qemu-system-x86",
        )
        self.binary = binary
        self.version = version


class ClosureError(HypervisorError):
    """What QEMU needs to run could not be worked out."""

    def __init__(self, binary: Path, problem: str, *, hint: str | None = None) -> None:
        mend = "install it anew with its libraries and data, or name another with --qemu"
        super().__init__(f"{binary}: {problem}", hint=hint or mend)
        self.binary = binary
        self.problem = problem


class JailFailed(HypervisorError):
    """A step of the jail, or of the tree in it, failed; QEMU was not started."""

    def __init__(self, step: str, number: int, detail: str) -> None:
        hint = _JAIL_HINTS.get(number)
        if number == errno.ENOSPC and step in ("namespaces", "fork"):
            hint = _MORE_NAMESPACES
        elif step == SESSION_KEYRING:
            hint = KEYRING_HINT
        super().__init__(f"the jail's step {step!r} failed: {detail}", hint=hint)
        self.step = step
        self.errno = number
        self.detail = detail
