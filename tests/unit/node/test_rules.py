"""When the packet rules change, and when the records of all who run are looked at for it."""

import asyncio
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from attrs import evolve

from firewall.policy import Policy
from kvmsec.config import FirewallSettings
from kvmsec.node import records
from kvmsec.node.records import InstanceRecord
from kvmsec.node.rules import Rules
from kvmsec.paths import Paths
from tests.unit.node.a_record import record_of
from uidpool.ranges import UidRanges


class Filter:
    """A packet filter that notes what it is to hold."""

    def __init__(self) -> None:
        self.applied: list[str] = []
        self.proved: list[tuple[int, Policy]] = []

    def apply(self, policy: Policy) -> None:
        self.applied.append(str(UidRanges(policy.uids)))

    def remove(self) -> None:
        self.applied.append("none")

    def prove(self, uid: int, gid: int, policy: Policy) -> None:
        assert policy.covers(uid)
        self.proved.append((uid, policy))


class Place:
    """A root with a pool, the rules of it, and what they read."""

    def __init__(self, root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.paths = Paths(root)
        self.paths.run.mkdir(parents=True)
        self.cluster = SimpleNamespace(guarded_uids=UidRanges.parse("2000-2009"))
        self.rules = self.rules_with(FirewallSettings())
        self.looks = 0
        read_all = records.read_all

        def counted(paths: Paths) -> Any:
            self.looks += 1
            return read_all(paths)

        monkeypatch.setattr(records, "read_all", counted)

    def rules_with(self, settings: FirewallSettings) -> Rules:
        store: Any = SimpleNamespace(load=lambda: (self.cluster, 1))
        rules = Rules(self.paths, settings, store)
        self.filter = Filter()
        vars(rules)["firewall"] = self.filter
        return rules

    def record(self, name: str, uid: int) -> InstanceRecord:
        self.paths.instance(name).directory.mkdir(parents=True, exist_ok=True)
        return records.save(self.paths, record_of(name, uid))

    def end(self, name: str) -> None:
        self.paths.instance(name).record.unlink()
        self.paths.instance(name).directory.rmdir()

    def prove(self, uid: int) -> None:
        asyncio.run(self.rules.prove(uid, uid))

    def settle(self) -> None:
        asyncio.run(self.rules.settle())


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Place:
    return Place(tmp_path, monkeypatch)


def test_under_the_pool_one_start_looks_at_the_records_and_the_others_do_not(place: Place) -> None:
    for number in range(3):
        place.record(f"vm{number}", 2000 + number)
        place.prove(2000 + number)
        place.settle()

    assert place.filter.applied == ["2000-2009"]
    assert [uid for uid, _ in place.filter.proved] == [2000, 2001, 2002]
    assert place.looks == 1


def test_a_uid_outside_of_the_pool_joins_the_others_and_leaves_them(place: Place) -> None:
    for name, uid in (("web", 2000), ("db", 500), ("mail", 2001), ("log", 600)):
        place.record(name, uid)
        place.prove(uid)
    place.end("db")
    place.settle()
    place.end("log")
    place.settle()
    place.settle()

    assert place.filter.applied == [
        "2000-2009",
        "500,2000-2009",
        "500,600,2000-2009",
        "600,2000-2009",
        "2000-2009",
    ]


def test_a_pool_that_grew_is_in_force_before_the_next_proof(place: Place) -> None:
    place.record("db", 500)
    place.prove(500)
    place.cluster.guarded_uids = UidRanges.parse("2000-2019")
    place.record("web", 2000)
    place.prove(2000)

    assert place.filter.applied == ["500,2000-2009", "500,2000-2019"]


@pytest.mark.parametrize("note", [None, "500,2000-2009\nbeing applied", "2000-2009"])
def test_a_note_that_is_gone_or_not_whole_has_the_rules_applied(
    place: Place, note: str | None
) -> None:
    place.record("db", 500)
    place.prove(500)
    (place.paths.run / "rules").unlink()
    if note is not None:
        (place.paths.run / "rules").write_text(note)
    place.record("web", 2000)
    place.prove(2000)

    assert place.filter.applied == ["500,2000-2009"] * 2


def test_other_settings_have_the_rules_applied(place: Place) -> None:
    place.record("web", 2000)
    place.prove(2000)
    place.rules = place.rules_with(evolve(FirewallSettings(), log_group=5))
    place.prove(2000)

    assert place.filter.applied == ["2000-2009"]


def test_without_a_pool_the_last_end_removes_the_rules(place: Place) -> None:
    place.cluster.guarded_uids = UidRanges.parse("")
    place.record("db", 500)
    place.prove(500)
    place.end("db")
    place.settle()

    assert place.filter.applied == ["500", "none"]
