"""The border: exit statuses, what is said on stderr, and how quick help is."""

import asyncio
import errno
import json
import os
import signal
import subprocess
import sys
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path
from typing import Any

import click
import pytest
from click.testing import CliRunner

from kvmsec.cli import session
from kvmsec.cli.main import kvmsec
from kvmsec.errors import KvmsecError

SLOW = (
    *("asyncio", "attr", "cattrs", "msgspec", "psutil", "pyroute2", "qemu.qmp", "rich", "ssl"),
    *("cryptography", "iptc", "hypervisor.machine", "kvmsec.agent", "kvmsec.config"),
)
ACTING = [
    ["doctor"],
    ["cluster", "init", "--name", "a"],
    ["cluster", "modify", "--uid-pool", "30000"],
    ["cluster", "info"],
    ["cluster", "destroy", "--yes"],
    ["uids", "provision", "30000"],
    ["uids", "provision", "30000", "--remove"],
    ["uids", "list"],
    ["uids", "release", "30000"],
    ["firewall", "show"],
    ["firewall", "apply"],
    ["firewall", "verify"],
    ["firewall", "remove"],
    ["instance", "start", "a"],
    ["instance", "stop", "a"],
    ["instance", "list"],
    ["instance", "info", "a"],
    ["instance", "log", "a"],
    ["instance", "console", "a"],
    ["instance", "reboot", "a"],
    ["audit", "a"],
    ["audit", "--canary"],
]

_VERBS = (("doctor",), ("audit",))  # commands that stand alone


def commands(
    command: click.Command = kvmsec, path: tuple[str, ...] = ()
) -> Iterator[tuple[str, ...]]:
    yield path
    if isinstance(command, click.Group):
        context = click.Context(command)
        for name in command.list_commands(context):
            inner = command.get_command(context, name)
            assert inner is not None
            yield from commands(inner, (*path, name))


def test_every_command_of_this_release_is_there() -> None:
    assert {path for path in commands() if len(path) == 2 or path in _VERBS} == {
        tuple(line.split())
        for line in (
            *("audit", "doctor"),
            *("config show", "config check"),
            *("cluster init", "cluster modify", "cluster info", "cluster destroy"),
            *("cluster verify", "cluster sync", "cluster master-failover"),
            *("cluster renew-crypto", "cluster certless", "node certless"),
            *("node serve", "node invite", "node join", "node add", "node list", "node info"),
            *("node promote", "node demote", "node readd", "node remove", "node leave"),
            *("uids provision", "uids list", "uids release"),
            *("firewall show", "firewall apply", "firewall verify", "firewall remove"),
            *("instance start", "instance stop", "instance list", "instance info"),
            *("instance log", "instance console", "instance reboot", "instance autostart"),
        )
    }


@pytest.mark.parametrize("path", list(commands()), ids=" ".join)
def test_every_command_has_help_that_needs_no_root(
    run: Any, path: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(session, "is_root", lambda: False)

    result = run(*path, "--help")

    assert result.exit_code == 0
    assert result.stdout.startswith("Usage: kvmsec")
    assert result.stderr == ""


def test_version_names_the_program(run: Any) -> None:
    assert run("--version").stdout.startswith("kvmsec 0.")


def loaded_by(*arguments: str) -> set[str]:
    """The modules that a run of the command has imported."""
    script = (
        "import json, sys\n"
        "from kvmsec.cli.main import entry_point\n"
        "try: entry_point()\n"
        "finally: print(json.dumps(sorted(sys.modules)), file=sys.stderr)\n"
    )
    argv = [sys.executable, "-c", script, *arguments]
    done = subprocess.run(argv, capture_output=True, check=False, timeout=60)
    modules: list[str] = json.loads(done.stderr.splitlines()[-1])
    return set(modules)


@pytest.mark.parametrize("arguments", [["--help"], ["instance", "start", "--help"]])
def test_help_imports_nothing_slow(arguments: list[str]) -> None:
    assert loaded_by(*arguments).isdisjoint(SLOW)


@pytest.mark.parametrize("arguments", ACTING, ids=lambda arguments: " ".join(arguments))
def test_who_is_not_root_is_told_so_first(
    run: Any, node: Any, arguments: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(session, "is_root", lambda: False)

    result = run(*arguments)

    command = " ".join(arguments[: 1 if (arguments[0],) in _VERBS else 2])
    assert result.exit_code == 1
    assert result.stderr == (
        f"kvmsec: `kvmsec {command}` needs root\nhint: run it as root, or with sudo\n"
    )
    assert node.calls == []


@pytest.mark.parametrize(
    "arguments",
    [
        ["nonsense"],
        ["instance", "nonsense"],
        ["instance", "list", "--nonsense"],
        ["instance", "stop"],
        ["instance", "start", "../x"],
        ["instance", "start", "-x"],
        ["instance", "start", "a\n"],
        ["instance", "start", ""],
        ["instance", "start", "a" * 4096],
        ["instance", "start", "a", "--memory", "1_000"],
        ["instance", "start", "a", "--memory", "٣"],
        ["instance", "start", "a", "--memory", "0"],
        ["instance", "start", "a", "--cpu-quota", "half"],
        ["instance", "start", "a", "--cpu-weight", "0"],
        ["instance", "start", "a", "--io-weight", "50%"],
        ["instance", "start", "a", "--accel", "magic"],
        ["instance", "start", "a", "--firmware", ""],
        ["instance", "start", "a", "--disk", "/d,colour=red"],
        ["instance", "start", "a", "--nic", "mac"],
        ["instance", "stop", "a", "--timeout", "nan"],
        ["instance", "stop", "a", "--timeout", "-1"],
        ["instance", "log", "a", "--follow", "--json"],
        ["cluster", "init"],
        ["cluster", "init", "--name", "A"],
        ["cluster", "modify"],
        ["cluster", "modify", "--drain"],
        *(["uids", "provision", pool] for pool in ("", "5-", "5-3", "1-2-3", "٣", "1_000", "a")),
        ["uids", "provision", "30000", "--remove", "--format", "sysusers"],
        ["uids", "release", "x"],
    ],
    ids=lambda arguments: " ".join(arguments)[:40].encode("unicode_escape").decode(),
)
def test_wrong_usage_is_status_2_with_a_hint(run: Any, node: Any, arguments: list[str]) -> None:
    result = run(*arguments)

    assert result.exit_code == 2
    first, *_, last = result.stderr.splitlines()
    assert first.startswith("kvmsec: ")
    assert last.startswith("hint: ")
    assert result.stdout == ""
    assert node.calls == []


@pytest.mark.parametrize("arguments", [[], ["cluster"], ["instance"]])
def test_a_noun_alone_shows_its_verbs(arguments: list[str]) -> None:
    result = CliRunner().invoke(kvmsec, arguments)

    assert result.exit_code == 2
    assert "Usage: kvmsec" in result.stderr


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (KvmsecError("it is broken", hint="mend it"), "kvmsec: it is broken\nhint: mend it\n"),
        (KvmsecError("it is broken"), "kvmsec: it is broken\n"),
        (
            OSError(errno.ENOSPC, "No space left on device", "/run/x"),
            "kvmsec: /run/x: No space left on device\n"
            "hint: make room, or inodes: see `df` and `df -i`\n",
        ),
        (OSError(errno.EIO, "Input/output error", "/x"), "kvmsec: /x: Input/output error\n"),
        (
            OSError(errno.EINVAL, "Invalid argument"),
            "kvmsec: Invalid argument\nhint: `kvmsec --debug …` shows where it happened\n",
        ),
        (
            KvmsecError("QEMU said:\nkvmsec: all is well\n\x1b[2J"),
            "kvmsec: QEMU said:\n  kvmsec: all is well\n  \\x1b[2J\n",
        ),
        (
            ValueError("surprise"),
            "kvmsec: unexpected ValueError: surprise\n"
            "hint: this is a bug; `kvmsec --debug …` shows where it happened\n",
        ),
    ],
)
def test_an_error_is_told_in_words_and_is_status_1(
    run: Any, node: Any, error: BaseException, said: str
) -> None:
    node.error = error

    result = run("instance", "list")

    assert (result.exit_code, result.stdout, result.stderr) == (1, "", said)
    assert node.is_closed


def noted(error: BaseException, *notes: str) -> BaseException:
    for note in notes:
        error.add_note(note)
    return error


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (KvmsecError("it is broken", hint="mend it"), "kvmsec: it is broken\nhint: mend it\n"),
        (OSError(errno.EIO, "Input/output error", "/x"), "kvmsec: /x: Input/output error\n"),
        (click.UsageError("wrong"), "kvmsec: wrong\nhint: see `kvmsec instance list --help`\n"),
        (KeyboardInterrupt(), "kvmsec: interrupted\n"),
    ],
    ids=lambda value: type(value).__name__,
)
def test_what_could_not_be_undone_is_told_after_the_error(
    run: Any, node: Any, monkeypatch: pytest.MonkeyPatch, error: BaseException, said: str
) -> None:
    notes = ("not taken back: web", "nor\nkvmsec: this\x1b[2J")
    monkeypatch.setattr(session, "open_node", raising(noted(error, *notes)))

    result = run("instance", "list")

    assert result.stderr == (
        f"{said}note: not taken back: web\nnote: nor\n  kvmsec: this\\x1b[2J\n"
    )


def raising(error: BaseException) -> Callable[..., None]:
    def fail(*_: object) -> None:
        raise error

    return fail


def test_notes_that_are_none_are_passed_over(run: Any, node: Any) -> None:
    node.error = KvmsecError("it is broken")
    node.error.__notes__ = "web"

    assert run("instance", "list").stderr == "kvmsec: it is broken\n"


def test_what_an_interrupted_command_could_not_undo_is_told(
    run: Any, node: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def act() -> None:
        try:
            os.kill(os.getpid(), signal.SIGTERM)
            await asyncio.sleep(30)
        except asyncio.CancelledError as error:
            error.add_note("the rules are still there")
            raise

    monkeypatch.setattr(node, "apply_rules", act)

    result = run("firewall", "apply")

    assert result.exit_code == 143
    assert result.stderr.endswith("note: the rules are still there\n")


def test_debug_shows_where_an_error_comes_from(run: Any, node: Any) -> None:
    node.error = KvmsecError("it is \x1b[31mbroken")

    result = run("--debug", "instance", "list")

    assert result.exit_code == 1
    assert "Traceback (most recent call last):" in result.stderr
    assert result.stderr.endswith("kvmsec: it is \\x1b[31mbroken\n")
    assert "\x1b" not in result.stderr


def interrupted_by(number: int, undone: list[str]) -> Callable[[], Awaitable[None]]:
    async def act() -> None:
        try:
            os.kill(os.getpid(), number)
            await asyncio.sleep(30)
        finally:
            await asyncio.sleep(0)
            undone.append("undone")

    return act


def test_a_signal_that_comes_when_all_is_done_changes_nothing(
    run: Any, node: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def close() -> None:
        os.kill(os.getpid(), signal.SIGTERM)
        await asyncio.sleep(0.05)

    monkeypatch.setattr(node, "close", close)

    assert run("firewall", "apply").exit_code == 0


def test_an_impatient_person_does_not_spoil_the_undoing(
    run: Any, node: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    undone: list[str] = []

    async def act() -> None:
        try:
            os.kill(os.getpid(), signal.SIGINT)
            await asyncio.sleep(30)
        finally:
            os.kill(os.getpid(), signal.SIGINT)
            await asyncio.sleep(0.05)
            undone.append("undone")

    monkeypatch.setattr(node, "apply_rules", act)

    assert run("firewall", "apply").exit_code == 130
    assert undone == ["undone"]


@pytest.mark.parametrize(
    ("number", "status"),
    [(signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGHUP, 129)],
)
def test_a_signal_has_a_command_undo_its_work_first(
    run: Any, node: Any, monkeypatch: pytest.MonkeyPatch, number: int, status: int
) -> None:
    undone: list[str] = []
    monkeypatch.setattr(node, "apply_rules", interrupted_by(number, undone))

    result = run("firewall", "apply")

    assert result.exit_code == status
    assert undone == ["undone"]
    assert node.is_closed
    assert result.stderr.startswith("kvmsec: ")
    assert "Traceback" not in result.stderr


def show_config_to(stdout: int) -> subprocess.CompletedProcess[bytes]:
    program = "from kvmsec.cli.main import entry_point; entry_point()"
    argv = [sys.executable, "-c", program, "config", "show"]
    return subprocess.run(argv, stdout=stdout, stderr=subprocess.PIPE, check=False, timeout=60)


def test_a_reader_that_leaves_early_is_no_error() -> None:
    read, write = os.pipe()
    os.close(read)
    try:
        done = show_config_to(write)
    finally:
        os.close(write)

    assert (done.returncode, done.stderr) == (1, b"")


def test_a_full_disk_behind_stdout_is_told() -> None:
    with open("/dev/full", "wb") as full:
        done = show_config_to(full.fileno())

    assert done.returncode == 1
    assert done.stderr.startswith(b"kvmsec: the standard output: No space left on device\n")


def test_the_root_can_come_from_the_environment(node: Any, root: Path) -> None:
    spoiled = root / "var/lib/kvmsec/cluster.json"
    spoiled.write_text("{")

    result = CliRunner().invoke(kvmsec, ["cluster", "info"], env={"KVMSEC_ROOT": str(root)})

    assert result.stderr.startswith(f"kvmsec: {spoiled} can't be used")


def test_an_empty_root_is_not_the_working_directory(node: Any) -> None:
    assert CliRunner().invoke(kvmsec, ["--root", "", "instance", "list"]).exit_code == 2
