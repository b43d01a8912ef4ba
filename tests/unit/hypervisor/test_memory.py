"""Answers that are kept on disk, and what a process has read of them: they hold while files do."""

import time
from pathlib import Path

import pytest

from hypervisor import identity
from hypervisor.identity import FileIdentity, Memory

KEY = "a question"


@pytest.fixture
def asked(tmp_path: Path) -> Path:
    """The file that the answer is about."""
    path = tmp_path / "asked"
    path.write_text("as it was")
    return path


@pytest.fixture
def memory(tmp_path: Path, asked: Path, monkeypatch: pytest.MonkeyPatch) -> Memory:
    """One that has an answer, read already, as if the files had lain there for long."""
    monkeypatch.setattr(identity, "_SETTLED_NS", -1 << 62)
    memory = Memory(tmp_path / "kept")
    memory.keep(KEY, (FileIdentity.of(asked),), ["yes"])
    assert memory.recall(KEY, list) == ["yes"]
    return memory


def test_an_answer_that_was_read_is_not_read_again(
    memory: Memory, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delattr(Memory, "_read")
    assert memory.recall(KEY, list) == ["yes"]


def test_it_is_forgotten_once_what_it_is_about_has_changed(memory: Memory, asked: Path) -> None:
    asked.chmod(0o600)
    assert memory.recall(KEY, list) is None


def test_another_answer_in_its_place_is_seen(memory: Memory, asked: Path) -> None:
    Memory(memory.directory).keep(KEY, (FileIdentity.of(asked),), ["no"])
    assert memory.recall(KEY, list) == ["no"]


def test_one_that_others_may_write_by_now_is_none(memory: Memory) -> None:
    (kept,) = memory.directory.iterdir()
    kept.chmod(0o666)
    assert memory.recall(KEY, list) is None


def test_one_that_is_gone_is_none(memory: Memory) -> None:
    (kept,) = memory.directory.iterdir()
    kept.unlink()
    assert memory.recall(KEY, list) is None


def test_what_changed_just_now_is_read_again(tmp_path: Path, asked: Path) -> None:
    """Its time may be the same after the next change."""
    memory = Memory(tmp_path / "kept")
    memory.keep(KEY, (FileIdentity.of(asked),), ["yes"])
    assert memory.recall(KEY, list) == ["yes"]
    (kept,) = memory.directory.iterdir()
    assert time.time_ns() - kept.stat().st_ctime_ns < identity._SETTLED_NS
    assert str(kept) not in identity._read


def test_all_answers_stand_on_the_files_that_they_are_about_and_on_their_own(
    memory: Memory, asked: Path
) -> None:
    (kept,) = memory.directory.iterdir()
    assert {file.path for file in memory.basis()} == {str(asked), str(kept)}


def test_they_stand_on_nothing_once_one_of_them_was_not_recalled(memory: Memory) -> None:
    assert memory.recall("another question", list) is None
    assert memory.basis() == ()


def test_they_stand_on_nothing_that_changed_just_now(
    memory: Memory, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(identity, "_SETTLED_NS", 1 << 62)
    assert memory.basis() == ()
