"""How a judgement answers: how much of its point's weight counts, in words, and what to do."""

from collections.abc import Callable, Sequence
from typing import Final

from attrs import frozen

from kvmsec.audit.facts import Facts
from kvmsec.audit.score import State

_LISTED: Final = 5


@frozen
class Verdict:
    """`part` is how much of the weight counts: 0.0 to 1.0. A `hint` of None takes the point's."""

    part: float
    state: State
    message: str
    hint: str | None = None


def sealed(message: str) -> Verdict:
    """Nothing to mend."""
    return Verdict(0.0, "sealed", message)


def exposed(message: str, part: float = 1.0) -> Verdict:
    """Something to mend, in full or in part."""
    return Verdict(part, "exposed", message)


def note(message: str, *, hint: str | None = None) -> Verdict:
    """Worth knowing, and no part of the score."""
    return Verdict(0.0, "note", message, hint)


def unknown(facts: Facts, *names: str) -> Verdict:
    """What a judgement rests on could not be read: counted as the worst."""
    name = next((name for name in names if name in facts.unread), names[0])
    reason = facts.unread.get(name, "it was not looked at")
    return Verdict(
        1.0,
        "unknown",
        f"can't be told: {reason}",
        "run it as root, on the host itself; what can't be read is taken for open",
    )


def listed(things: Sequence[str]) -> str:
    """The first few of them, and how many more there are."""
    more = f" and {len(things) - _LISTED} more" if len(things) > _LISTED else ""
    return ", ".join(things[:_LISTED]) + more


@frozen(kw_only=True)
class Point:
    """One thing that is judged: what it can weigh at most, why it matters, and its usual fix."""

    code: str
    weight: float
    why: str
    hint: str
    judge: Callable[[Facts], Verdict]
