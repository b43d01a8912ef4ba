"""Other programs get nothing of ours, and what they leave is told truly."""

import os
import signal
import socket
import sys
import time

import pytest

from kvmsec.linux import command
from kvmsec.linux.errors import CommandFailed, CommandTimedOut


def test_output_and_status_come_back() -> None:
    told = command.run(
        ["sh", "-c", "cat; echo err >&2; exit 3"], input=b"in", timeout_s=10, ok=(3,)
    )
    assert told == command.Output(3, b"in", b"err\n")


def test_a_status_that_is_not_taken_is_an_error_with_the_programs_words() -> None:
    with pytest.raises(CommandFailed, match="ended with status 1: bad thing") as raised:
        command.run(["sh", "-c", "echo bad thing >&2; exit 1"], timeout_s=10)
    assert raised.value.status == 1
    with pytest.raises(CommandFailed, match="status -9: it said nothing"):
        command.run(["sh", "-c", "kill -9 $$"], timeout_s=10)


def test_a_missing_program_is_named() -> None:
    with pytest.raises(FileNotFoundError, match="no-such-program"):
        command.run(["no-such-program"], timeout_s=10)


def test_a_program_that_stays_is_killed_with_its_deadline() -> None:
    started = time.monotonic()
    with pytest.raises(CommandTimedOut, match=r"sleep did not end within 0\.2 s"):
        command.run(["sleep", "60"], timeout_s=0.2)
    assert time.monotonic() - started < 5


def test_a_program_gets_no_input_environment_directory_or_descriptor_of_ours(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("KVMSEC_SECRET", "x")
    monkeypatch.setenv("LD_PRELOAD_", "x")
    left, right = socket.socketpair()
    os.set_inheritable(left.fileno(), True)
    script = (
        "import os, sys\n"
        "names = [n for n in os.listdir('/proc/self/fd') if os.path.exists('/proc/self/fd/' + n)]\n"
        "print(sorted(os.environ), os.getcwd(), sys.stdin.read() == '', names)"
    )
    try:
        told = command.run([sys.executable, "-I", "-c", script], timeout_s=10)
    finally:
        left.close()
        right.close()
    assert told.stdout == b"['LC_ALL', 'PATH'] / True ['0', '1', '2']\n"


def test_a_failure_is_one_even_where_the_caller_ignores_its_children() -> None:
    """The kernel throws the status away then, and Python takes that for 0."""
    before = signal.signal(signal.SIGCHLD, signal.SIG_IGN)
    try:
        with pytest.raises(CommandFailed, match="status 4"):
            command.run(["sh", "-c", "exit 4"], timeout_s=10)
        assert signal.getsignal(signal.SIGCHLD) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGCHLD, before)
