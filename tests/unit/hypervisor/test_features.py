"""Finding QEMU, asking it, and telling what isn't one; by stand-ins that are real programs."""

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from hypervisor import features
from hypervisor.errors import NotQemu, QemuNotFound, QemuTooOld
from hypervisor.features import DEVICES, Features, find_qemu, probe

MakeProgram = Callable[[str], Path]


@pytest.fixture
def program(tmp_path: Path) -> MakeProgram:
    def make(script: str) -> Path:
        path = tmp_path / "qemu-system-x86_64"
        path.write_text(f"#!/bin/sh\n{script}\n")
        path.chmod(0o755)
        return path

    return make


def answers(
    *,
    version: tuple[int, int, int] = (9, 2, 1),
    options: tuple[str, ...] = ("sandbox",),
    lacking: tuple[str, ...] = (),
) -> str:
    """What a QEMU writes, as `cat` and a here-document."""
    major, minor, micro = version
    numbers = {"qemu": {"major": major, "minor": minor, "micro": micro}, "package": "a build"}
    controls = ["enable", "obsolete", "elevateprivileges", "spawn", "resourcecontrol"]
    replies: dict[str, object] = {
        "machines": [{"name": "pc-q35-9.2", "alias": "q35"}, {"name": "none"}, {"name": "x,y"}],
        "options": [
            {"option": name, "parameters": [{"name": control} for control in controls]}
            for name in options
        ],
        **{
            name: [] if name in lacking else [{"name": name}]
            for name in (*DEVICES, "kvm-accel", "tcg-accel")
        },
        "cpus": [{"name": "max"}, {"name": "EPYC"}],
    }
    lines = [{"QMP": {"version": numbers, "capabilities": []}}, {"return": {}}]
    lines += [{"return": reply, "id": name} for name, reply in replies.items()]
    return "cat <<'END'\n" + "\n".join(map(json.dumps, lines)) + "\nEND"


def test_what_qemu_says_is_understood(program: MakeProgram) -> None:
    assert probe(program(answers()), credentials=None) == Features(
        version=(9, 2, 1),
        package="a build",
        machines=("pc-q35-9.2", "q35"),
        devices=DEVICES,
        accelerators=("kvm", "tcg"),
        cpus=("EPYC", "max"),
        sandbox=True,
    )


def test_what_an_older_build_lacks_is_seen(program: MakeProgram) -> None:
    script = answers(version=(7, 0, 0), options=(), lacking=("tcg-accel", "e1000"))
    found = probe(program(script), credentials=None)
    assert not found.sandbox
    assert found.accelerators == ("kvm",)
    assert "e1000" not in found.devices
    assert found.version_text == "7.0.0"


def test_a_qemu_older_than_the_oldest_is_refused(program: MakeProgram) -> None:
    with pytest.raises(QemuTooOld, match=r"is QEMU 6\.2\.0; kvmsec needs 7\.0\.0"):
        probe(program(answers(version=(6, 2, 0))), credentials=None)


@pytest.mark.parametrize(
    ("script", "words"),
    [
        ("exit 0", "ended with status 0"),
        ("echo 'error while loading libfoo.so' >&2; exit 127", "status 127.*libfoo.so"),
        ("echo hello", "hello"),
        ("echo '{}'", "no QEMU"),
        ("echo '[]'", "no QEMU"),
        ("""echo '{"QMP": 5}'""", "of no use"),
        ("""echo '{"QMP": {"version": {"qemu": {"major": "x"}}}}'""", "of no use"),
        (answers().replace('"machines"', '"m"'), "of no use"),
        ("kill -SEGV $$", "status -11"),
    ],
)
def test_a_program_that_is_no_qemu_is_named_with_its_words(
    program: MakeProgram, script: str, words: str
) -> None:
    with pytest.raises(NotQemu, match=words):
        probe(program(script), credentials=None)


@pytest.mark.parametrize("script", ["exec sleep 60", "exec >&- 2>&-; sleep 60"])
def test_a_program_that_never_answers_is_given_up(program: MakeProgram, script: str) -> None:
    with pytest.raises(NotQemu, match=r"within 0\.2 s"):
        probe(program(script), credentials=None, timeout_s=0.2)


def test_a_program_that_talks_without_end_is_cut_short(program: MakeProgram) -> None:
    with pytest.raises(NotQemu):
        probe(program("exec yes"), credentials=None, timeout_s=30)


def test_the_words_of_a_program_hold_no_control_character(program: MakeProgram) -> None:
    with pytest.raises(NotQemu) as caught:
        probe(program(r"printf '\033[31mred\n\007'; exit 1"), credentials=None)
    assert caught.value.message.isprintable()


def test_a_file_that_can_not_be_executed_is_named(tmp_path: Path) -> None:
    path = tmp_path / "qemu"
    path.write_text("no program")
    path.chmod(0o755)
    with pytest.raises(NotQemu, match="can't be executed"):
        probe(path, credentials=None)
    with pytest.raises(QemuNotFound):
        probe(tmp_path / "missing", credentials=None)


def counted(program: MakeProgram, tmp_path: Path, script: str) -> tuple[Path, Callable[[], int]]:
    calls = tmp_path / "calls"
    calls.touch()
    return program(f"echo >> {calls}\n{script}"), lambda: calls.stat().st_size


def test_a_qemu_is_asked_once(program: MakeProgram, tmp_path: Path) -> None:
    path, calls = counted(program, tmp_path, answers())
    cache = tmp_path / "cache"
    first = probe(path, credentials=None, cache=cache)
    assert probe(path, credentials=None, cache=cache) == first
    assert calls() == 1
    assert cache.stat().st_mode & 0o777 == 0o700
    assert [file.stat().st_mode & 0o777 for file in cache.iterdir()] == [0o600]


def test_a_replaced_qemu_is_asked_again_even_with_the_same_size_and_time(
    program: MakeProgram, tmp_path: Path
) -> None:
    path, calls = counted(program, tmp_path, answers())
    cache = tmp_path / "cache"
    probe(path, credentials=None, cache=cache)
    status = path.stat()
    shutil.copy(path, tmp_path / "new")
    (tmp_path / "new").rename(path)
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))
    probe(path, credentials=None, cache=cache)
    assert calls() == 2


@pytest.mark.parametrize("content", [b"", b"{", b'{"key": 5}', b"\0" * 100])
def test_a_cache_that_can_not_be_read_is_passed_over(
    program: MakeProgram, tmp_path: Path, content: bytes
) -> None:
    path, calls = counted(program, tmp_path, answers())
    cache = tmp_path / "cache"
    probe(path, credentials=None, cache=cache)
    (file,) = cache.iterdir()
    file.write_bytes(content)
    probe(path, credentials=None, cache=cache)
    assert calls() == 2


def test_a_cache_that_others_may_write_is_passed_over(program: MakeProgram, tmp_path: Path) -> None:
    path, calls = counted(program, tmp_path, answers())
    cache = tmp_path / "cache"
    probe(path, credentials=None, cache=cache)
    (file,) = cache.iterdir()
    file.chmod(0o666)
    probe(path, credentials=None, cache=cache)
    assert calls() == 2


def test_a_given_qemu_is_the_one_that_is_used(program: MakeProgram, tmp_path: Path) -> None:
    path = program("exit")
    assert find_qemu(path, None) == path
    assert find_qemu(None, path) == path
    assert find_qemu(path, tmp_path / "missing") == path
    for wrong in (tmp_path / "missing", tmp_path, Path("relative")):
        with pytest.raises(QemuNotFound, match=str(wrong)):
            find_qemu(wrong, path)


def test_the_known_names_are_tried_in_their_order(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(features, "_FIXED_PATH", str(tmp_path / "libexec/qemu-kvm"))
    monkeypatch.setattr(features, "_DIRECTORIES", (str(tmp_path / "bin"),))
    with pytest.raises(QemuNotFound, match="qemu-kvm, kvm, qemu-system-x86_64"):
        find_qemu(None, None)
    for name in ("bin/qemu-system-x86_64", "bin/kvm", "bin/qemu-kvm", "libexec/qemu-kvm"):
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        shutil.copy("/bin/true", path)
        assert find_qemu(None, None) == path
    (tmp_path / "libexec/qemu-kvm").unlink()
    (tmp_path / "bin/qemu-kvm").write_text("#!/bin/sh\nexec qemu-system-x86_64 -enable-kvm\n")
    assert find_qemu(None, None) == tmp_path / "bin/kvm"
