"""`kvmsec instance autostart`: who is started, who is left alone, and what is said of each."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from kvmsec.agent import InstanceInfo, InstanceState
from kvmsec.errors import AlreadyRunning
from kvmsec.linux.errors import LockBusy
from kvmsec.model.instance import InstanceDefinition
from kvmsec.rpc.errors import RemoteFault

Define = Callable[..., Path]


@pytest.fixture
def define(root: Path, monkeypatch: pytest.MonkeyPatch) -> Define:
    """Keep a definition, in a place that counts as root's."""
    monkeypatch.setattr("kvmsec.model.instance.require_trusted", lambda path: None)

    def write(name: str, text: str = "autostart = true\n") -> Path:
        path = root / "etc/kvmsec/instances" / f"{name}.toml"
        path.write_text(text + "memory_mib = 64\n")
        return path

    return write


@pytest.fixture
def starts(node: Any, monkeypatch: pytest.MonkeyPatch) -> dict[str, Exception]:
    """Has the node answer a start by name; an error that a test puts here is raised."""
    failures: dict[str, Exception] = {}

    async def start(definition: InstanceDefinition) -> InstanceInfo:
        node.calls.append(("start", (definition.name,)))
        if definition.name in failures:
            raise failures[definition.name]
        return InstanceInfo(
            name=definition.name,
            state=InstanceState.RUNNING,
            pid=4711,
            uid=20001,
            accelerator="kvm",
        )

    monkeypatch.setattr(node, "start", start)
    return failures


def started(node: Any) -> list[str]:
    return [details[0] for what, details in node.calls if what == "start"]


def test_those_that_ask_for_it_are_started_by_name(
    run: Any, node: Any, define: Define, starts: Any
) -> None:
    for name in ("web", "db"):
        define(name)
    define("trial", "autostart = false\n")
    define("other", "")

    result = run("instance", "autostart")

    assert result.exit_code == 0, result.stderr
    assert started(node) == ["db", "web"]
    assert [line.partition(":")[0] for line in result.stdout.splitlines()] == [
        "db running",
        "web running",
    ]


def test_one_that_runs_is_left_alone(run: Any, node: Any, define: Define, starts: Any) -> None:
    define("web")
    node.infos = [InstanceInfo(name="web", state=InstanceState.RUNNING, pid=1)]

    result = run("instance", "autostart")

    assert result.exit_code == 0
    assert started(node) == []
    assert result.stdout == "web runs already\n"


@pytest.mark.parametrize("state", [InstanceState.CRASHED, InstanceState.STOPPED])
def test_one_that_ended_is_started(
    run: Any, node: Any, define: Define, starts: Any, state: InstanceState
) -> None:
    define("web")
    node.infos = [InstanceInfo(name="web", state=state, reason="the host rebooted")]

    assert run("instance", "autostart").exit_code == 0
    assert started(node) == ["web"]


@pytest.mark.parametrize(
    "error",
    [AlreadyRunning("web"), RemoteFault(None, "it runs already", kind="AlreadyRunning")],
    ids=["by itself", "through the daemon"],
)
def test_one_that_somebody_starts_meanwhile_is_no_failure(
    run: Any, node: Any, define: Define, starts: dict[str, Exception], error: Exception
) -> None:
    define("web")
    starts["web"] = error

    result = run("instance", "autostart")

    assert (result.exit_code, result.stdout) == (0, "web runs already\n")


def test_one_that_fails_keeps_no_other_from_its_start(
    run: Any, node: Any, define: Define, starts: dict[str, Exception]
) -> None:
    for name in ("db", "mail", "web"):
        define(name)
    starts["db"] = LockBusy(Path("/run/kvmsec/locks/db"))
    starts["mail"] = OSError(28, "No space left on device", "/run/kvmsec")

    result = run("instance", "autostart")

    assert result.exit_code == 1
    assert started(node) == ["db", "mail", "web"]
    assert result.stdout.startswith("web running")
    assert "kvmsec: db can't be started\n" in result.stderr
    assert "/run/kvmsec: No space left on device" in result.stderr
    assert "kvmsec: not started: db, mail\n" in result.stderr


def test_a_file_that_can_not_be_read_is_a_failure_and_the_others_start(
    run: Any, node: Any, define: Define, starts: Any
) -> None:
    define("broken", "autostart = \n")
    define("unfit", 'autostart = true\ncolour = "red"\n')
    define("doubtful", 'autostart = "yes"\n')
    define("web")

    result = run("instance", "autostart")

    assert result.exit_code == 1
    assert started(node) == ["web"]
    assert "not started: broken, doubtful, unfit\n" in result.stderr
    assert "colour" in result.stderr
    assert "autostart: " in result.stderr


def test_what_is_wrong_with_one_that_does_not_ask_for_it_is_no_matter(
    run: Any, node: Any, define: Define, starts: Any
) -> None:
    define("unfit", 'colour = "red"\n')

    assert run("instance", "autostart").exit_code == 0
    assert started(node) == []


def test_a_definition_that_others_can_write_is_refused(
    run: Any, node: Any, root: Path, starts: Any
) -> None:
    path = root / "etc/kvmsec/instances/web.toml"
    path.write_text("autostart = true\nmemory_mib = 64\n")
    path.chmod(0o666)

    result = run("instance", "autostart")

    assert result.exit_code == 1
    assert started(node) == []
    assert "web can't be started" in result.stderr


def test_without_definitions_there_is_nothing_to_do(run: Any, node: Any) -> None:
    result = run("instance", "autostart")

    assert (result.exit_code, result.stdout) == (0, "")
