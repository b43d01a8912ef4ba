"""docs/threat-model.md names an attack for each lock, and the table of attacks is whole in it."""

import ast
import re
from pathlib import Path

import pytest

from tests.attacks.attack import Attack, Elsewhere, Encounter
from tests.attacks.elsewhere import ELSEWHERE
from tests.attacks.encounters import ENCOUNTERS
from tests.attacks.table import ATTACKS

ROOT = Path(__file__).resolve().parents[3]
TEXT = (ROOT / "docs/threat-model.md").read_text()
LOCKS = "The locks, and what proves them"
ROWS = (*ATTACKS, *ENCOUNTERS)
NAMES = [one.name for one in (*ROWS, *ELSEWHERE)]


def _section(heading: str) -> str:
    return TEXT.split(f"\n## {heading}\n")[1].split("\n## ")[0]


def _named(text: str) -> set[str]:
    return set(re.findall(r"`([a-z0-9-]+)`", text))


def test_no_two_attacks_have_one_name() -> None:
    assert sorted(set(NAMES)) == sorted(NAMES)


def test_the_page_names_every_attack_and_no_other() -> None:
    assert _named(_section(LOCKS)) == set(NAMES)


@pytest.mark.parametrize("attack", ROWS, ids=lambda attack: attack.name)
def test_an_attack_stands_in_the_row_of_the_lock_that_refuses_it(
    attack: Attack | Encounter,
) -> None:
    rows = [line.split("|") for line in _section(LOCKS).splitlines() if f"`{attack.name}`" in line]
    assert [attack.refusal.lock in row[1] for row in rows] == [True]


def test_the_page_lists_what_is_shared_by_design() -> None:
    shared = {one.name for one in ROWS if one.shared or one.shared_second}
    assert _named(_section("What is shared by design")) >= shared


@pytest.mark.parametrize("attack", ELSEWHERE, ids=lambda attack: attack.name)
def test_a_test_that_proves_an_attack_elsewhere_is_there(attack: Elsewhere) -> None:
    for test in (attack.test, attack.control):
        path, _, name = test.partition("::")
        tree = ast.parse((ROOT / path).read_text())
        assert name in {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}


def test_a_refusal_that_rests_on_seccomp_says_what_is_behind_it() -> None:
    """Either another lock, or that there is none: so the filter is not taken for the second."""
    silent = [
        one.name
        for one in ATTACKS
        if one.refusal.lock == "seccomp" and one.second is None and one.rules is None
    ]
    assert silent == []
