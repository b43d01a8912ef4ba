"""A record that was read is remembered only for as long as its file is the same."""

import os
from pathlib import Path

import pytest

from kvmsec.agent import InstanceState
from kvmsec.node import records
from kvmsec.node.records import InstanceRecord, RecordUnreadable
from kvmsec.paths import Paths
from tests.unit.node.a_record import record_of


@pytest.fixture
def paths(tmp_path: Path) -> Paths:
    return Paths(tmp_path)


def save(paths: Paths, name: str = "web", generation: str = "0" * 16) -> InstanceRecord:
    record = record_of(name, None, generation=generation, state=InstanceState.RUNNING)
    paths.instance(name).directory.mkdir(parents=True, exist_ok=True)
    return records.save(paths, record)


def let_settle(monkeypatch: pytest.MonkeyPatch) -> None:
    """Have every file count as one that has not changed for a while."""
    monkeypatch.setattr(records, "_SETTLED_NS", -(10**18))


def test_what_stays_the_same_is_read_once(paths: Paths, monkeypatch: pytest.MonkeyPatch) -> None:
    let_settle(monkeypatch)
    saved = save(paths)
    first = records.load(paths, "web")

    assert first == saved
    assert records.load(Paths(paths.root), "web") is first


def test_what_changed_just_now_is_read_again(paths: Paths) -> None:
    save(paths)

    assert records.load(paths, "web") is not records.load(paths, "web")


def test_a_change_is_seen_whoever_made_it(paths: Paths, monkeypatch: pytest.MonkeyPatch) -> None:
    let_settle(monkeypatch)
    save(paths)
    records.load(paths, "web")
    save(paths, generation="1" * 16)
    replaced = records.load(paths, "web")
    path = paths.instance("web").record
    path.write_bytes(path.read_bytes().replace(b"1" * 16, b"2" * 16))
    overwritten = records.load(paths, "web")

    assert replaced is not None and replaced.generation == "1" * 16
    assert overwritten is not None and overwritten.generation == "2" * 16
    path.write_bytes(b"{")
    with pytest.raises(RecordUnreadable):
        records.load(paths, "web")
    path.unlink()
    assert records.load(paths, "web") is None


def test_nothing_is_kept_of_instances_that_are_gone(
    paths: Paths, monkeypatch: pytest.MonkeyPatch
) -> None:
    let_settle(monkeypatch)
    for name in ("gone", "here"):
        save(paths, name)
    records.read_all(paths)
    paths.instance("gone").record.unlink()
    os.rmdir(paths.instance("gone").directory)
    records.read_all(paths)

    assert records._read[paths].keys() == {"here"}


def test_two_roots_are_not_mixed_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    let_settle(monkeypatch)
    roots = [Paths(tmp_path / name) for name in ("a", "b")]
    for number, paths in enumerate(roots):
        save(paths, generation=str(number) * 16)
    found = [records.load(paths, "web") for paths in roots]

    assert [one and one.generation for one in found] == ["0" * 16, "1" * 16]
