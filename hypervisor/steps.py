"""An ordered list of things that a process does to itself, and which of them failed."""

import errno
from collections.abc import Callable, Iterable
from typing import Generic, TypeVar

from attrs import frozen

from hypervisor.errors import HypervisorError

T = TypeVar("T")


@frozen
class Step(Generic[T]):
    """One thing that is done to the calling process, and why."""

    name: str
    act: Callable[[T], None]
    reason: str


class JailFailed(HypervisorError):
    """A step of the jail failed; QEMU was not started."""

    def __init__(self, step: str, number: int, detail: str) -> None:
        hint = "run kvmsec as root, outside a container" if number == errno.EPERM else None
        super().__init__(f"the jail's step {step!r} failed: {detail}", hint=hint)
        self.step = step
        self.errno = number
        self.detail = detail


def take(steps: Iterable[Step[T]], subject: T) -> None:
    """Take steps in their order. Raises JailFailed with the one that failed."""
    for step in steps:
        try:
            step.act(subject)
        except OSError as error:
            raise JailFailed(step.name, error.errno or 0, str(error)) from error
