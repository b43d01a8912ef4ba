"""A QEMU that is none, or none any more: told apart in time, and taken back whole."""

import signal
import subprocess
from pathlib import Path
from typing import Any

import pytest

from hypervisor.errors import NotQemu, QemuNotFound, QemuTooOld
from hypervisor.features import probe
from kvmsec.errors import StartFailed
from kvmsec.linux import namespaces
from kvmsec.linux.errors import UntrustedPath

pytestmark = pytest.mark.kvm

READY = "[uids]\nreuse_delay_s = 0\n[qemu]\nready_timeout_s = {}\n"
PATIENT, IMPATIENT = READY.format(3), READY.format(0.4)


# The look at a program ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("program", "words"),
    [
        ("exits", r"ended with status 7 as no QEMU does; it said: stand-in: no \x1b[31mluck"),
        ("talks", "did not answer"),
        ("greets-only", "gave an answer of no use"),
    ],
)
def test_a_program_that_is_no_qemu_is_told_with_its_own_words(
    place: Any, stand_ins: Path, program: str, words: str
) -> None:
    error = place.refused(NotQemu, qemu=str(stand_ins / program))
    assert words in error.message
    assert "\x1b" not in error.message
    assert "--qemu" in error.hint


def test_a_program_that_never_answers_is_given_up(
    place: Any, stand_ins: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(probe.__kwdefaults__ or {}, "timeout_s", 0.3)
    error = place.refused(NotQemu, qemu=str(stand_ins / "never-answers"))
    assert "did not answer as QEMU within 0.3 s" in error.message


def test_a_qemu_that_is_too_old_is_refused(place: Any, stand_ins: Path) -> None:
    error = place.refused(QemuTooOld, qemu=str(stand_ins / "too-old"))
    assert "is QEMU 6.2.9; kvmsec needs 7.0.0 or later" in error.message


@pytest.mark.parametrize("content", [b"", b"#!/bin/sh\necho hello\n", b"\x7fELF and no more"])
def test_a_file_that_is_no_program_is_refused(place: Any, stand_ins: Path, content: bytes) -> None:
    file = stand_ins / "file"
    file.write_bytes(content)
    file.chmod(0o755)
    error = place.refused((NotQemu, QemuNotFound), qemu=str(file))
    assert str(file) in error.message


def test_a_program_that_others_may_change_is_not_even_run(place: Any, stand_ins: Path) -> None:
    file = stand_ins / "file"
    file.write_bytes((stand_ins / "qemu").read_bytes())
    file.chmod(0o757)
    assert str(file) in place.refused(UntrustedPath, qemu=str(file)).message


def test_a_qemu_whose_data_others_may_change_is_not_started(place: Any) -> None:
    data = "/usr/share/qemu"
    namespaces.mount("data", data, "tmpfs", 0, "mode=755")
    try:
        Path(data, "bios.bin").touch()
        Path(data, "bios.bin").chmod(0o666)
        error = place.refused(StartFailed)
    finally:
        namespaces.umount(data)
    assert "bios.bin can be written by others" in error.message
    assert "root's, writable by nobody else" in error.hint


@pytest.mark.parametrize("path", ["/var/lib/missing", "/usr/bin", "/etc/passwd"])
def test_no_program_at_all_is_refused(place: Any, path: str) -> None:
    assert path in place.refused(QemuNotFound, qemu=path).message


# A start -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("behaviour", "words", "said"),
    [
        ("exits", "QEMU exited with status 7", "no \x1b[31mluck"),
        ("garbage", "sent something that is not a JSON object", ""),
        ("one-line", "sent a line of more than 1048576 bytes", ""),
        ("dies-midway", "hung up in the middle of a message", "about to die"),
        ("refuses", r"no \x1b[31mluck", ""),
        ("another-id", "something else in reply to qmp_capabilities", ""),
        ("unfiltered", "seccomp filters 1, wanted at least 2", ""),
    ],
)
def test_a_qemu_that_breaks_down_is_told_and_taken_back(
    place: Any, stand_ins: Path, behaviour: str, words: str, said: str
) -> None:
    place.lab.configure(PATIENT)
    error = place.refused(StartFailed, behaviour, qemu=str(stand_ins / "qemu"))
    assert words in error.message
    assert said in error.output


@pytest.mark.parametrize("behaviour", ["never-answers", "greets-only", "floods"])
def test_a_qemu_that_is_not_ready_in_time_is_ended(
    place: Any, stand_ins: Path, behaviour: str
) -> None:
    place.lab.configure(IMPATIENT)
    error = place.refused(StartFailed, behaviour, qemu=str(stand_ins / "qemu"))
    assert "within 0.4 s" in error.message


def test_the_command_tells_what_qemu_said_so_that_it_can_pass_for_nothing_else(
    place: Any, stand_ins: Path
) -> None:
    for name, program in (("web", "exits"), ("exits", "qemu"), ("forges", "qemu")):
        options = ("--memory", "1", "--accel", "tcg", "--qemu", stand_ins / program)
        with place.unchanged():
            done = place.kvmsec("instance", "start", name, *options)
        first, *others = done.err.splitlines()
        assert (done.status, done.out) == (1, "")
        assert first.startswith("kvmsec: ")
        assert r"no \x1b[31mluck" in done.err
        ours = [line for line in others if not line.startswith("  ")]
        assert ours in ([], others[-1:]), "what QEMU says is indented, whatever it says"
        assert "hint: say yes" not in ours


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_a_command_that_is_told_to_end_takes_its_start_back(
    place: Any, stand_ins: Path, number: signal.Signals
) -> None:
    options = ("--memory", "1", "--accel", "tcg", "--qemu", str(stand_ins / "qemu"))
    with place.unchanged():
        argv = place.command("instance", "start", "never-answers", *options)
        starting = subprocess.Popen(argv, stderr=subprocess.PIPE, text=True)
        has_process = False
        while not has_process:
            assert starting.poll() is None
            found = place.lab.instances().get("never-answers")
            has_process = found is not None and found.pid is not None
        starting.send_signal(number)
        _, said = starting.communicate(timeout=60)
    assert starting.returncode == 128 + number, said
    word = "interrupted" if number == signal.SIGINT else "terminated"
    assert said == f"kvmsec: {word}\n"
