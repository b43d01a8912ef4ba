"""The command itself, as a person and a script use it: real users, rules and guests."""

import contextlib
import json
import os
import pty
import re
import select
import signal
import subprocess
import sys
import termios
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from hypervisor import tiny

pytestmark = pytest.mark.kvm

PROGRAM = (sys.executable, "-c", "from kvmsec.cli.main import entry_point; entry_point()")
DEADLINE_S = 60
OWN_POOL = "246000-246003"


class Shell:
    """Runs the command below one root."""

    def __init__(self, root: Path, accelerator: str) -> None:
        self.root = root
        self.guest = ("--firmware", str(tiny.rom_path()), "--memory", "1", "--accel", accelerator)

    def argv(self, *arguments: str) -> list[str]:
        return [*PROGRAM, "--root", str(self.root), *arguments]

    def run(
        self, *arguments: str, status: int = 0, stdin: bytes = b""
    ) -> subprocess.CompletedProcess[str]:
        done = subprocess.run(
            self.argv(*arguments),
            input=stdin,
            capture_output=True,
            check=False,
            timeout=DEADLINE_S,
        )
        said = subprocess.CompletedProcess(
            arguments, done.returncode, done.stdout.decode(), done.stderr.decode()
        )
        assert said.returncode == status, said
        assert "Traceback" not in said.stderr
        return said

    def json(self, *arguments: str) -> object:
        return json.loads(self.run(*arguments, "--json").stdout)

    def start(self, name: str, *arguments: str) -> subprocess.CompletedProcess[str]:
        return self.run("instance", "start", name, *self.guest, *arguments)


@pytest.fixture
def shell(lab) -> Shell:
    """The command in a root that has a cluster with a pool."""
    return Shell(lab.root, lab.accelerator)


@pytest.fixture
def web(shell: Shell, lab) -> Iterator[Shell]:
    """The same with the instance `web` running, which the command neither starts nor stops."""
    lab.start()
    yield shell
    lab.stop()


def test_an_admin_s_day(tmp_path: Path, accelerator_in_use: str, lab) -> None:
    """From a host without users to three instances and back."""
    lab.destroy()
    shell = Shell(lab.root, accelerator_in_use)

    made = shell.run("uids", "provision", OWN_POOL)
    assert made.stdout == f"users made: {OWN_POOL} (4)\n"
    again = shell.run("uids", "provision", OWN_POOL)
    assert again.stdout == f"users made: none\nthere already: {OWN_POOL} (4)\n"
    shell.run("cluster", "init", "--name", "prod", "--uid-pool", OWN_POOL)
    assert shell.json("cluster", "info")["uid_pool"] == OWN_POOL
    for name in ("a", "b", "c"):
        assert f"{name} running: pid " in shell.start(name).stdout

    listed = shell.json("instance", "list")
    assert [one["name"] for one in listed] == ["a", "b", "c"]
    assert len({one["uid"] for one in listed}) == 3
    held = {one["uid"]: one["instance"] for one in shell.json("uids", "list")}
    assert {one["uid"]: one["name"] for one in listed}.items() <= held.items()
    assert shell.json("firewall", "show")["uids"] == OWN_POOL
    shell.run("firewall", "verify")

    refused = shell.run("uids", "provision", OWN_POOL, "--remove", status=1)
    assert "in the cluster's pool" in refused.stderr
    assert (
        "instances are running: a, b, c"
        in shell.run("cluster", "destroy", "--yes", status=1).stderr
    )
    assert "instances" in shell.run("firewall", "remove", status=1).stderr

    for name in ("a", "b"):
        assert shell.run("instance", "stop", name).stdout == f"{name} stopped (powered down)\n"
    shell.run("instance", "stop", "c", "--force")
    assert shell.json("instance", "list") == []
    shell.run("cluster", "destroy", "--yes")
    removed = shell.run("uids", "provision", OWN_POOL, "--remove")
    assert removed.stdout.startswith(f"users removed: {OWN_POOL} (4)\n")


def test_a_start_of_the_same_name_is_refused_and_an_unknown_one_is_not_stopped(web: Shell) -> None:
    again = web.run("instance", "start", "web", *web.guest, status=1)
    assert again.stderr.startswith("kvmsec: the instance web runs already\nhint: ")
    unknown = web.run("instance", "stop", "other", status=1)
    assert unknown.stderr.startswith("kvmsec: there is no instance other\nhint: ")


def test_root_s_model_warns(shell: Shell) -> None:
    started = shell.start("web", "--security-model", "none")

    assert "warning: web runs as root (security model none)" in started.stderr
    shell.run("instance", "stop", "web", "--force")


def test_a_start_that_fails_says_why_and_leaves_nothing(shell: Shell, lab) -> None:
    shell.run("instance", "start", "web", *shell.guest, "--disk", "/nonexistent/disk", status=1)
    failed = shell.run("instance", "start", "web", *shell.guest, "--cpu", "nonesuch", status=1)

    assert "nonesuch" in failed.stderr
    assert not lab.leftovers()


def test_an_interrupted_start_is_undone(shell: Shell, lab) -> None:
    """Wherever it is interrupted; a start that was done before the signal came is done."""
    for delay_s in (0.1, 0.2, 0.3, 0.4, 0.5):
        process = subprocess.Popen(
            shell.argv("instance", "start", "web", *shell.guest),
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
        )
        with process:
            time.sleep(delay_s)
            process.send_signal(signal.SIGTERM)
            _, said = process.communicate(timeout=DEADLINE_S)
        assert b"Traceback" not in said
        if process.returncode != 128 + signal.SIGTERM:
            # It came before there was anything to undo, or after all was done.
            assert process.returncode in (0, -signal.SIGTERM), said
            for one in shell.json("instance", "list"):
                shell.run("instance", "stop", one["name"], "--force")
        assert not lab.leftovers()


def test_the_log_tells_who_said_what(web: Shell) -> None:
    web.run("instance", "console", "web", stdin=b"e\x1b[2Jhello\n")

    log = web.run("instance", "log", "web").stdout

    own, _, others = log.partition("== serial line (written by the instance, it may have changed")
    assert "-sandbox" in own
    assert "  ECHO \\x1b[2Jhello\n" in others
    assert "\x1b" not in log


def test_following_a_log_ends_with_the_instance(shell: Shell) -> None:
    shell.start("web")
    with subprocess.Popen(
        shell.argv("instance", "log", "web", "--follow"), stdout=subprocess.PIPE, text=True
    ) as follower:
        assert follower.stdout is not None
        shell.run("instance", "console", "web", stdin=b"enews\n")
        for line in follower.stdout:
            if line == "  ECHO news\n":
                break
        shell.run("instance", "stop", "web", "--force")
        assert follower.wait(DEADLINE_S) == 0


# The console ---------------------------------------------------------------------------------


def test_a_pipe_talks_with_the_guest(web: Shell) -> None:
    answered = web.run("instance", "console", "web", stdin=b"ehello there\n3\n")

    assert "ECHO hello there\r\nSECTOR 3\r\n" in answered.stdout
    assert answered.stderr == ""


@contextlib.contextmanager
def attached(shell: Shell) -> Iterator[tuple[subprocess.Popen[bytes], int, int]]:
    """A console on a terminal: its process, and the terminal's far and near end."""
    far, near = pty.openpty()
    process = subprocess.Popen(
        shell.argv("instance", "console", "web"), stdin=near, stdout=near, stderr=near
    )
    try:
        see(far, b"Ctrl-] leaves")
        while termios.tcgetattr(near)[3] & termios.ICANON:
            time.sleep(0.01)
        yield process, far, near
    finally:
        process.kill()
        process.wait()
        os.close(far)
        os.close(near)


def see(terminal: int, wanted: bytes) -> bytes:
    seen, end = b"", time.monotonic() + DEADLINE_S
    while wanted not in seen:
        ready = select.select([terminal], [], [], max(0.0, end - time.monotonic()))[0]
        assert ready, f"only {seen!r} was shown"
        seen += os.read(terminal, 4096)
    return seen


def is_cooked(terminal: int) -> bool:
    return bool(termios.tcgetattr(terminal)[3] & termios.ICANON)


def test_a_terminal_is_attached_until_ctrl_bracket(web: Shell) -> None:
    with attached(web) as (process, far, near):
        os.write(far, b"e\x03typed\n")
        see(far, b"ECHO \x03typed\r\n")
        os.write(far, b"\x1d")
        assert process.wait(DEADLINE_S) == 0
        assert is_cooked(near)
        see(far, b"web: left")


def test_a_second_console_is_told_that_somebody_is_attached(web: Shell) -> None:
    with attached(web):
        refused = web.run("instance", "console", "web", status=1)

    assert "somebody is attached" in refused.stderr
    assert "ECHO back" in web.run("instance", "console", "web", stdin=b"eback\n").stdout


def test_a_console_ends_with_the_guest_and_puts_the_terminal_back(shell: Shell) -> None:
    shell.start("web")
    with attached(shell) as (process, far, near):
        shell.run("instance", "stop", "web", "--force")
        assert process.wait(DEADLINE_S) == 0
        assert is_cooked(near)
        see(far, b"line was closed")


def test_a_console_that_is_told_to_end_puts_the_terminal_back(web: Shell) -> None:
    with attached(web) as (process, _, near):
        process.terminate()
        assert process.wait(DEADLINE_S) == 128 + signal.SIGTERM
        assert is_cooked(near)


# What a person sees --------------------------------------------------------------------------


def test_the_list_and_info_agree(web: Shell) -> None:
    (listed,) = web.json("instance", "list")
    told = web.json("instance", "info", "web")

    assert {key: told[key] for key in ("name", "pid", "uid", "user", "started_at")} == {
        key: listed[key] for key in ("name", "pid", "uid", "user", "started_at")
    }
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d(\.\d+)?\+00:00", listed["started_at"])
    row = web.run("instance", "list").stdout.splitlines()[1].split()
    assert row[:4] == ["web", "running", str(listed["pid"]), str(listed["uid"])]
    assert "-sandbox" in web.run("instance", "info", "web").stdout


def test_a_reboot_keeps_the_process(web: Shell) -> None:
    before = web.json("instance", "info", "web")["pid"]

    web.run("instance", "reboot", "web")

    assert web.json("instance", "info", "web")["pid"] == before
