"""An ordered list of things that a process does to itself, and which of them failed."""

from collections.abc import Callable, Iterable
from typing import Generic, TypeVar

from attrs import frozen

from hypervisor.errors import JailFailed

T = TypeVar("T")


@frozen
class Step(Generic[T]):
    """One thing that is done to the calling process, and why."""

    name: str
    act: Callable[[T], None]
    reason: str


def take(steps: Iterable[Step[T]], subject: T) -> None:
    """Take steps in their order. Raises JailFailed with the one that failed."""
    for step in steps:
        try:
            step.act(subject)
        except OSError as error:
            raise JailFailed(step.name, error.errno or 0, str(error)) from error
