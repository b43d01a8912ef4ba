"""docs/audit.md tells every point, in the code's order, with its weight, reason and fix."""

import re
from pathlib import Path
from typing import Any

import pytest

from kvmsec.audit.points import CONFINEMENT, ON_TOP, POINTS
from kvmsec.audit.score import rating

TEXT = (Path(__file__).resolve().parents[3] / "docs/audit.md").read_text()
_ROW = re.compile(r"^\| `([a-z-]+)` \| ([\d.]+) \| (.+) \| (.+) \|$", re.MULTILINE)


def section(heading: str) -> str:
    return TEXT.split(f"\n## {heading}\n")[1].split("\n## ")[0]


@pytest.mark.parametrize(("heading", "points"), [("Confinement", CONFINEMENT), ("On top", ON_TOP)])
def test_the_points_are_those_of_the_code(heading: str, points: Any) -> None:
    told = [(one.code, f"{one.weight:.2f}", one.why, one.hint) for one in points]

    assert _ROW.findall(section(heading)) == told


def test_what_counts_in_part_are_points_of_the_code() -> None:
    named = re.findall(r"(?:^- |\. )`([a-z-]+)`:", section("What counts in part"), re.MULTILINE)

    assert named
    assert set(named) <= {point.code for point in POINTS}


def test_the_words_begin_where_the_code_has_them() -> None:
    limits, words = (
        [cell.strip() for cell in line.strip("|").split("|")[1:]]
        for line in section("The score").splitlines()
        if line.startswith(("| from", "| | PERFECT"))
    )

    assert [rating(float(limit)) for limit in limits] == words
