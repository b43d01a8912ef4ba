"""What a row of the table of attacks says, and where it is tried."""

from collections.abc import Callable
from typing import Any, Final, Literal, TypeVar

from attrs import evolve, field, frozen

Locks = Literal[
    "everything",
    "no seccomp",
    "the network namespace alone",
    "the packet rules alone",
    "the uid alone",
    "nothing",
]
"""What confines the attacker: the jail as it is, less of it, or (as a control) nothing."""

SUCCEEDED: Final = "succeeded"
BY_DESIGN: Final = frozenset({SUCCEEDED})
"""What is shared by design works: docs/threat-model.md lists it."""


def _answers(given: str | frozenset[str]) -> frozenset[str]:
    return frozenset(given.split("|")) if isinstance(given, str) else given


@frozen
class Refusal:
    """Which lock refuses an attack, and the kernel's answers that show it (names of errors).

    A signal is the one by which the kernel ended the attack. Other words are the suite's own:
    NONE (it looked, and found nothing to use), UNSENT (nothing arrived), UNHURT (the victim noticed
    nothing), HELD (what was to be let go is held), LIMITED (a few of many were logged), ENDED (the
    whole instance). Of encounters: INTIME (nobody waited longer than was said), BOUNDED (no more
    was taken in than has room), UNREAD (not what was planted), SPARED (nobody else's process was
    ended), GONE (nothing of it is left), KEPT (its uid is kept from others), ALONE (of those that
    raced one won). Where the answer follows from the host's settings, a function reads these.
    """

    lock: str
    _given: str | frozenset[str] | Callable[[], str]

    @property
    def answers(self) -> frozenset[str]:
        return _answers(self._given() if callable(self._given) else self._given)


def _behind(first: Refusal, *others: Refusal | None) -> tuple[str, ...]:
    refusing = [one.lock for one in others if one and one.answers != BY_DESIGN]
    return tuple(lock for lock in dict.fromkeys(refusing) if lock != first.lock)


@frozen
class Without:
    """A control that can't succeed on some kernels: its answer there, and how that is seen."""

    answer: str
    reason: str
    is_so: Callable[[], bool]


@frozen
class Control:
    """How an attack is tried without confinement, and what it must then be answered.

    order: where it differs from the one to the instance. attacker: `root`, `somebody` (a uid that
    nobody has) or `victim` (the victim's uid). changes_root: below a directory of its own.
    """

    order: str | None = None
    attacker: Literal["root", "somebody", "victim"] = "root"
    answers: frozenset[str] = field(converter=_answers, default=SUCCEEDED)
    changes_root: bool = False
    unless: Without | None = None


@frozen
class Attack:
    """One row: a named attack, what the stand-in is ordered, and who refuses it.

    `order` has facts of `setting.Setting.facts` in braces. `refusal` holds while everything is on;
    `second` once seccomp is left out (None: what `refusal` says); `rules` where the packet rules
    are all that there is against what is sent; `uid` outside the jail, with the instance's uid and
    no more. `shared` names the models under which it works by design, `shared_second` those under
    which it would without seccomp.
    """

    name: str
    order: str
    refusal: Refusal
    second: Refusal | None = field(default=None, kw_only=True)
    rules: Refusal | None = field(default=None, kw_only=True)
    uid: Refusal | None = field(default=None, kw_only=True)
    shared: frozenset[str] = field(converter=_answers, default=frozenset(), kw_only=True)
    shared_second: frozenset[str] = field(converter=_answers, default=frozenset(), kw_only=True)
    control: Control = field(default=Control(), kw_only=True)
    room: str = field(default="", kw_only=True)

    @property
    def behind(self) -> tuple[str, ...]:
        """The locks that refuse it each where the first is left out, as is tried."""
        return _behind(self.refusal, self.second, self.rules, self.uid)

    def expected(self, model: str, locks: Locks) -> Refusal | None:
        """Who must refuse it there; None where it isn't tried."""
        if locks == "nothing":
            return Refusal("nothing", self.control.answers)
        if locks == "the uid alone":
            return self.uid
        if locks == "the packet rules alone":
            return self.rules
        if locks == "the network namespace alone" and self.rules is None:
            return None
        shared, found = self.shared, self.refusal
        if locks != "everything":
            shared, found = shared | self.shared_second, self.second or found
        return Refusal("shared by design", BY_DESIGN) if model in shared else found


@frozen
class Encounter:
    """One row about whoever starts, watches or ends instances: it takes two for it.

    `meet` has kvmsec deal with a hostile instance (given a `stage.Stage`) and says what that came
    to; `control` has somebody deal with the same who takes no care, or leaves the lock out, and
    must be answered `succeeded`. `locks` says under what else than everything it is tried.
    `second`, `shared` and `shared_second` are as an `Attack` has them.
    """

    name: str
    refusal: Refusal
    meet: Callable[[Any], Any]
    control: Callable[[Any], Any]
    locks: frozenset[Locks] = field(default=frozenset({"everything"}), kw_only=True)
    second: Refusal | None = field(default=None, kw_only=True)
    shared: frozenset[str] = field(converter=_answers, default=frozenset(), kw_only=True)
    shared_second: frozenset[str] = field(converter=_answers, default=frozenset(), kw_only=True)
    room: str = field(default="", kw_only=True)

    @property
    def behind(self) -> tuple[str, ...]:
        """As `Attack.behind`."""
        return _behind(self.refusal, self.second)

    def expected(self, model: str, locks: Locks) -> Refusal | None:
        """Who must refuse it there; None where it isn't tried."""
        if locks == "nothing":
            return Refusal("nothing", SUCCEEDED)
        if locks not in self.locks:
            return None
        shared, found = self.shared, self.refusal
        if locks != "everything":
            shared, found = shared | self.shared_second, self.second or found
        return Refusal("shared by design", BY_DESIGN) if model in shared else found


@frozen
class Elsewhere:
    """An attack that another suite carries out: the lock, the test, and its control's test.

    What is there alone knows no models: the packet rules are about uids.
    """

    name: str
    lock: str
    test: str
    control: str


_Row = TypeVar("_Row", Attack, Encounter)


def in_room(room: str, *rows: _Row) -> tuple[_Row, ...]:
    return tuple(evolve(row, room=room) for row in rows)
