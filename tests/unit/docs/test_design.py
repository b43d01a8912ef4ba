"""The pages on the design tell the steps in the code's order, and name files that exist."""

import re
from pathlib import Path
from typing import Any

import pytest

from hypervisor import jail, tree
from kvmsec.node import launch

ROOT = Path(__file__).resolve().parents[3]
_STEP = re.compile(r"^\| `(?P<name>[a-z -]+)` \|", re.MULTILINE)


@pytest.mark.parametrize(
    ("page", "heading", "steps"),
    [
        ("design.md", "A start", launch.STEPS),
        ("design/jail.md", "The tree", tree.STEPS),
        ("design/jail.md", "In the child", jail.STEPS),
    ],
)
def test_the_steps_are_those_of_the_code_in_their_order(
    page: str, heading: str, steps: Any
) -> None:
    section = (ROOT / "docs" / page).read_text().split(f"\n## {heading}\n")[1].split("\n## ")[0]

    assert _STEP.findall(section) == [step.name for step in steps]


def test_every_source_file_that_a_page_names_is_there() -> None:
    named = {
        path
        for page in (ROOT / "docs").rglob("*.md")
        for path in re.findall(
            r"\b(?:kvmsec|hypervisor|uidpool|firewall|tests)/[\w/]+\.py\b", page.read_text()
        )
    }

    assert named
    assert [path for path in sorted(named) if not (ROOT / path).is_file()] == []
