"""A compiled filter is kept, and compiled anew when anything that it stands on has changed."""

import ctypes
import json
import os
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest

from hypervisor import seccomp
from hypervisor.seccomp import Filter, NoFilter, find_filter
from hypervisor.seccomp.gate import FIRST_OF_RULES
from hypervisor.seccomp.library import Library, files_in, load_library
from hypervisor.seccomp.rules import RULES

LIMIT = 4096


@pytest.fixture
def compiled(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[int]]:
    """Grows with each compilation."""
    done: list[int] = []
    compile_them = Library.compile

    def counted(self: Library, rules: object) -> bytes:
        done.append(1)
        return compile_them(self, RULES)

    monkeypatch.setattr(Library, "compile", counted)
    yield done


def kept(cache: Path) -> Path:
    (file,) = cache.iterdir()
    return file


def test_it_is_compiled_once(tmp_path: Path, compiled: list[int]) -> None:
    first = find_filter(tmp_path)
    assert find_filter(tmp_path) == first
    assert len(compiled) == 1
    assert first.library == load_library().version


def test_one_that_is_recalled_needs_no_library(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = find_filter(tmp_path)
    monkeypatch.setattr(seccomp, "load_library", lambda: pytest.fail("loaded"))
    assert find_filter(tmp_path) == first


def test_without_a_cache_nothing_is_written(compiled: list[int]) -> None:
    assert find_filter() == find_filter()
    assert len(compiled) == 2


def test_it_stands_on_the_librarys_file_and_on_the_name_that_leads_to_it() -> None:
    files = load_library().files
    assert any(file.endswith("/libseccomp.so.2") for file in files)
    assert {os.path.realpath(file) for file in files} == {os.path.realpath(files[0])}


@pytest.mark.parametrize(
    ("place", "files"),
    [
        ("/opt/lib/libseccomp.so.2.5.4", ("/opt/lib/libseccomp.so.2.5.4",)),
        ("/opt/a b/libseccomp.so.2.5.4", ("/opt/a b/libseccomp.so.2.5.4",)),
        ("/usr/lib/libseccomp.so.2.5.4 (deleted)", ()),
        ("/usr/lib/libc.so.6", ()),
    ],
)
def test_a_library_that_was_replaced_while_in_use_is_no_file(
    place: str, files: tuple[str, ...]
) -> None:
    lines = (f"7f{n}-7f{n}9 r-xp 0000{n} 103:01 1234567      {place}\n" for n in range(4))
    assert (
        files_in(["7ffc0-7ffc1 rw-p 0 00:00 0 [stack]\n", "7f0-7f1 rw-p 0 00:00 0\n", *lines])
        == files
    )


def test_another_library_compiles_anew(
    tmp_path: Path, compiled: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    library = tmp_path / "libseccomp.so.2"
    library.write_bytes(b"version one")
    monkeypatch.setattr(Library, "files", (str(library),))
    find_filter(tmp_path / "cache")
    find_filter(tmp_path / "cache")
    assert len(compiled) == 1

    replaced = tmp_path / "new"
    replaced.write_bytes(b"version two")
    replaced.rename(library)
    find_filter(tmp_path / "cache")
    assert len(compiled) == 2


def test_a_library_whose_file_is_unknown_keeps_nothing(
    tmp_path: Path, compiled: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Library, "files", ())
    find_filter(tmp_path)
    find_filter(tmp_path)
    assert len(compiled) == 2


def test_another_table_compiles_anew(tmp_path: Path, compiled: list[int]) -> None:
    find_filter(tmp_path)
    find_filter(tmp_path, RULES[1:])
    assert len(compiled) == 2


@pytest.mark.parametrize("damage", ["bit", "short", "empty", "words", "digest"])
def test_a_damaged_one_is_compiled_anew(tmp_path: Path, compiled: list[int], damage: str) -> None:
    first = find_filter(tmp_path)
    file = kept(tmp_path)
    if damage in ("empty", "words"):
        file.write_text("" if damage == "empty" else "no filter")
    else:
        content = json.loads(file.read_text())
        program = content["answer"]["filter"]["program"]
        if damage == "digest":
            content["answer"]["digest"] = "0" * 64
        else:  # base64, still
            changed = program[:400] + ("B" if program[400] != "B" else "C") + program[401:]
            content["answer"]["filter"]["program"] = changed if damage == "bit" else program[:400]
        file.write_text(json.dumps(content))

    assert find_filter(tmp_path) == first
    assert len(compiled) == 2
    assert find_filter(tmp_path) == first, "the damage is mended"
    assert len(compiled) == 2


def test_one_that_others_could_have_written_is_compiled_anew(
    tmp_path: Path, compiled: list[int]
) -> None:
    find_filter(tmp_path)
    kept(tmp_path).chmod(0o666)
    find_filter(tmp_path)
    assert len(compiled) == 2


# What a filter is


def test_the_kernel_takes_that_many_instructions() -> None:
    assert find_filter().length < LIMIT / 8, "each start has the kernel check all of them"


@pytest.mark.parametrize(
    "program", [b"", b"\x06" + bytes(7), FIRST_OF_RULES + b"\0", FIRST_OF_RULES * LIMIT]
)
def test_what_cannot_be_one_is_refused(program: bytes) -> None:
    with pytest.raises(ValueError, match=r"no compiled filter|instructions, the kernel takes"):
        Filter(program, "2.5.4")


def test_an_unusable_program_of_the_librarys_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Library, "compile", lambda self, rules: b"odd")
    with pytest.raises(NoFilter, match="made one that is of no use"):
        find_filter()


# Hosts without


def test_a_host_without_the_library_is_told_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(name: str) -> ctypes.CDLL:
        raise OSError(f"{name}: cannot open shared object file: No such file or directory")

    load_library.cache_clear()
    monkeypatch.setattr(ctypes, "CDLL", missing)
    with pytest.raises(NoFilter, match=r"libseccomp.so.2: cannot open") as caught:
        find_filter()
    assert caught.value.hint is not None
    assert "apt-get install libseccomp2" in caught.value.hint
    assert 'may_be_missing = ["seccomp"]' in caught.value.hint


def test_a_library_that_lacks_a_function_is_too_old(monkeypatch: pytest.MonkeyPatch) -> None:
    load_library.cache_clear()
    monkeypatch.setattr(ctypes, "CDLL", lambda name: ctypes.pythonapi)
    with pytest.raises(NoFilter, match="seccomp_"):
        find_filter()


def test_another_machine_has_no_filter(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(os, "uname", lambda: SimpleNamespace(machine="aarch64"))
    with pytest.raises(NoFilter, match="for x86_64, and this machine is aarch64"):
        find_filter(tmp_path)
