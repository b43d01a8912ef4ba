"""Answers that are kept on disk: they hold as long as the files do that they stand on."""

from pathlib import Path

import pytest
from attrs import frozen

from hypervisor import identity
from hypervisor.identity import FileIdentity, Memory, is_settled

KEY = "a question"


@frozen
class Said:
    words: str
    files: tuple[FileIdentity, ...]


@pytest.fixture
def asked(tmp_path: Path) -> Path:
    """The file that the answer is about."""
    path = tmp_path / "asked"
    path.write_text("as it was")
    return path


@pytest.fixture
def memory(tmp_path: Path, asked: Path) -> Memory:
    """One that has an answer."""
    memory = Memory(tmp_path / "kept")
    memory.keep(KEY, Said("yes", (FileIdentity.of(asked),)))
    assert said(memory) == "yes"
    return memory


def said(memory: Memory) -> str | None:
    answer = memory.recall(KEY, Said)
    return answer.words if answer is not None else None


def test_it_is_recalled_with_the_files_that_it_stands_on(memory: Memory, asked: Path) -> None:
    assert memory.recall(KEY, Said) == Said("yes", (FileIdentity.of(asked),))


def test_it_is_forgotten_once_what_it_is_about_has_changed(memory: Memory, asked: Path) -> None:
    asked.chmod(0o600)
    assert said(memory) is None


def test_it_is_forgotten_once_what_it_is_about_is_gone(memory: Memory, asked: Path) -> None:
    asked.unlink()
    assert said(memory) is None


def test_another_answer_in_its_place_is_seen(memory: Memory, asked: Path) -> None:
    Memory(memory.directory).keep(KEY, Said("no", (FileIdentity.of(asked),)))
    assert said(memory) == "no"


def test_one_to_another_question_in_its_place_is_none(memory: Memory, asked: Path) -> None:
    (kept,) = memory.directory.iterdir()
    memory.keep("another", Said("no", (FileIdentity.of(asked),)))
    (another,) = set(memory.directory.iterdir()) - {kept}
    another.rename(kept)
    assert said(memory) is None


def test_one_that_others_may_write_by_now_is_none(memory: Memory) -> None:
    (kept,) = memory.directory.iterdir()
    kept.chmod(0o666)
    assert said(memory) is None


def test_one_that_is_gone_is_none(memory: Memory) -> None:
    (kept,) = memory.directory.iterdir()
    kept.unlink()
    assert said(memory) is None


def test_one_that_stands_on_no_file_is_not_kept(tmp_path: Path) -> None:
    memory = Memory(tmp_path / "kept")
    memory.keep(KEY, Said("yes", ()))
    assert not memory.directory.exists()


def test_one_that_says_on_disk_that_it_stands_on_no_file_is_none(
    memory: Memory, asked: Path
) -> None:
    (kept,) = memory.directory.iterdir()
    kept.write_text(f'{{"key": "{KEY}", "answer": {{"words": "yes", "files": []}}}}')
    assert said(memory) is None


def test_a_file_is_settled_once_its_times_would_tell_of_a_change(asked: Path) -> None:
    file = FileIdentity.of(asked)
    assert not is_settled((file,), file.changed_ns)
    assert not is_settled((file,), file.changed_ns + identity._SETTLED_NS)
    assert is_settled((file,), file.changed_ns + identity._SETTLED_NS + 1)
