"""The table of attacks as people read it: who refuses what, and what the kernel answered."""

from collections.abc import Iterator, Mapping
from typing import Final

from tests.attacks.assault import Run
from tests.attacks.attack import Attack, Encounter, Locks
from tests.attacks.attacker import Answer
from tests.attacks.elsewhere import ELSEWHERE
from tests.attacks.encounters import ENCOUNTERS
from tests.attacks.table import ATTACKS

_COLUMNS: Final[tuple[tuple[str, str | None, Locks], ...]] = (
    ("pool", "pool", "everything"),
    ("user", "user", "everything"),
    ("none", "none", "everything"),
    ("no seccomp", None, "no seccomp"),
    ("net ns alone", None, "the network namespace alone"),
    ("rules alone", None, "the packet rules alone"),
    ("uid alone", None, "the uid alone"),
    ("control", None, "nothing"),
)
Results = Mapping[Run, Mapping[str, Answer]]


def lines(results: Results) -> Iterator[str]:
    """A line an attack, below a heading a room; a cell that wasn't tried is empty."""
    head = ("attack", "refused by", "behind it", *(title for title, _, _ in _COLUMNS))
    rows: list[tuple[str, ...]] = []
    room = ""
    for attack in (*ATTACKS, *ENCOUNTERS):
        if attack.room != room:
            room = attack.room
            rows.append((f"- {room}",))
        behind = ", ".join(attack.behind)
        rows.append((attack.name, attack.refusal.lock, behind, *_cells(attack, results)))
    whole = (head, *(row for row in rows if len(row) == len(head)))
    widths = [max(map(len, column)) for column in zip(*whole, strict=True)]
    for row in (head, *rows):
        yield "  ".join(
            cell.ljust(width) for cell, width in zip(row, widths, strict=False)
        ).rstrip()
    yield "- proved by the packet rules' own suite"
    for other in ELSEWHERE:
        yield f"{other.name.ljust(widths[0])}  {other.lock.ljust(widths[1])}  {other.test}"
        yield f"{' ' * sum(widths[:2])}    control: {other.control}"


def _cells(attack: Attack | Encounter, results: Results) -> Iterator[str]:
    for _, model, locks in _COLUMNS:
        seen = {
            answers[attack.name].word
            for run, answers in results.items()
            if run.locks == locks and model in (None, run.model) and attack.name in answers
        }
        yield "/".join(sorted(seen))
