"""What a test may leave out of a jail can be left out by nothing else."""

import inspect
import re
from pathlib import Path

import pytest

from hypervisor.jail import LOCKS, Cell
from kvmsec import Node

ROOT = Path(__file__).resolve().parents[2]
ON_THE_WAY = {
    "hypervisor/jail.py",
    "hypervisor/process.py",
    "kvmsec/node/launch.py",
    "kvmsec/node/local.py",
}


def test_nothing_is_left_out_unless_a_caller_of_the_library_says_so() -> None:
    assert Cell(-1).without_locks == frozenset()
    assert inspect.signature(Node).parameters["without_locks"].default == frozenset()


def test_what_is_no_lock_can_not_be_left_out() -> None:
    assert Cell(-1, without_locks=LOCKS).without_locks == LOCKS
    with pytest.raises(ValueError, match="'the uid'"):
        Cell(-1, without_locks=frozenset({"the uid"}))


def test_no_command_setting_or_definition_reaches_it() -> None:
    sources = [
        path
        for room in ("kvmsec", "hypervisor", "uidpool", "firewall")
        for path in (ROOT / room).rglob("*.py")
    ]
    naming = {
        str(path.relative_to(ROOT))
        for path in sources
        if re.search(r"without_locks|\bLOCKS\b", path.read_text())
    }

    assert naming == ON_THE_WAY
    calls = [
        call for path in sources for call in re.findall(r"\bLocalNode\(.*\)", path.read_text())
    ]
    assert calls
    assert not any("without" in call or "**" in call for call in calls)
