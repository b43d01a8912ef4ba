"""Work that stops where something takes long, and goes on once somebody has seen to that.

A generator yields each such step and is sent what it came to. So one description of a release
serves who waits in place (`carry_out`) and who has an event loop to keep running, with all that is
between two steps, and the undoing after an error, written once.
"""

from collections.abc import Callable, Generator
from typing import Any, Self, TypeVar

from attrs import frozen

from kvmsec.linux.locks import FileLock
from uidpool.usage import Usage

_T = TypeVar("_T")


@frozen
class Look:
    """Look at what a uid has: the answer is a verdict."""

    uid: int


@frozen
class Clean:
    """End and remove what a uid has: the answer is a verdict on what is left."""

    uid: int


Step = Look | Clean | FileLock
"""A lock is to be taken, within a minute."""

Work = Generator[Step, Any, _T]


@frozen
class Verdict:
    """What a look at a uid came to: as much of a `Usage` as is decided by, at any size of it.

    `reason` says in a line what is left. `is_obscured`: nothing was found, and the files of others
    kept it from being certain.
    """

    is_clean: bool
    reason: str
    is_obscured: bool = False
    is_incomplete: bool = False

    @classmethod
    def of(cls, found: Usage) -> Self:
        return cls(found.is_clean, found.reason(), found.is_obscured, found.incomplete is not None)


def carry_out(work: Work[_T], take: Callable[[Step], Any]) -> _T:
    """Do work to its end, each step by `take`; what that raises is the work's to answer."""
    try:
        step = next(work)
        while True:
            try:
                answer = take(step)
            except BaseException as error:
                step = work.throw(error)
            else:
                step = work.send(answer)
    except StopIteration as end:
        result: _T = end.value
        return result
