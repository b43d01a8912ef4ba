"""`instance log`: what was said, by whom, and what is said from then on."""

import asyncio
import json
import subprocess
from typing import Any

import pytest

from kvmsec.agent import InstanceInfo, InstanceLog, InstanceState
from kvmsec.cli import following
from kvmsec.cli.following import Transcript

UNTRUSTED = "written by the instance, it may have changed it"


def shown(capsys: pytest.CaptureFixture[str], *logs: InstanceLog) -> str:
    transcript = Transcript()
    for log in logs:
        transcript.show(log)
    transcript.end()
    return capsys.readouterr().out


def test_the_instance_s_words_stand_below_a_heading_that_warns(run: Any, node: Any) -> None:
    node.logs = [InstanceLog("started\n", "qemu: warning\n", "hello\r\nworld\r\n")]

    assert run("instance", "log", "web").stdout == (
        "== kvmsec ==\nstarted\n"
        f"== QEMU ({UNTRUSTED}) ==\n  qemu: warning\n"
        f"== serial line ({UNTRUSTED}) ==\n  hello\n  world\n"
    )


def test_no_word_of_the_instance_s_passes_for_ours(run: Any, node: Any) -> None:
    node.logs = [InstanceLog("", "", "== kvmsec ==\nstarted\n\x1b[2J\u202e\x85\n")]

    lines = run("instance", "log", "web").stdout.splitlines()

    assert lines[1:] == ["  == kvmsec ==", "  started", "  \\x1b[2J\\u202e\\x85"]


def test_the_log_for_machines(run: Any, node: Any) -> None:
    node.logs = [InstanceLog("a", "b", "c\x1b")]

    told = json.loads(run("instance", "log", "web", "--json").stdout)

    assert told == {"kvmsec": "a", "qemu": "b", "serial": "c\x1b"}


def test_only_what_is_new_is_shown(capsys: pytest.CaptureFixture[str]) -> None:
    said = shown(
        capsys,
        InstanceLog("", "", "log"),
        InstanceLog("", "", "login: "),
        InstanceLog("", "", "login: root\r"),
        InstanceLog("noted\n", "", "login: root\r\n# "),
    )

    title = f"== serial line ({UNTRUSTED}) ==\n"
    assert said == f"{title}  login: root\n== kvmsec ==\nnoted\n{title}  # \n"


def test_half_a_character_is_waited_for(capsys: pytest.CaptureFixture[str]) -> None:
    whole = "grün".encode()
    logs = [InstanceLog("", "", whole[:end].decode(errors="replace")) for end in (3, len(whole))]

    assert shown(capsys, *logs).splitlines()[1:] == ["  grün"]


def test_a_log_that_lost_its_beginning_goes_on(capsys: pytest.CaptureFixture[str]) -> None:
    lines = [f"line {number}\n" for number in range(2000)]

    said = shown(
        capsys,
        InstanceLog("".join(lines[:1000]), "", ""),
        InstanceLog("".join(lines[500:]), "", ""),
    )

    assert said == "== kvmsec ==\n" + "".join(lines)


def test_a_log_that_was_rewritten_is_said_to_be(capsys: pytest.CaptureFixture[str]) -> None:
    said = shown(capsys, InstanceLog("", "", "guilty\n"), InstanceLog("", "", "innocent\n"))

    assert "  [changed, from its beginning:]\n  innocent\n" in said


def test_following_ends_with_the_instance(
    run: Any, node: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also when the instance's files have been put away by then."""
    monkeypatch.setattr(following, "_PAUSE_S", 0.05)
    with subprocess.Popen(["sleep", "60"]) as process:
        said = iter(["a", "ab"])

        async def log(name: str) -> InstanceLog:
            if process.poll() is not None:
                return InstanceLog("", "", "")
            words = next(said, "abc")
            if words == "abc":
                process.kill()
            return InstanceLog("", "", words)

        monkeypatch.setattr(node, "log", log)
        node.infos = [InstanceInfo(name="web", state=InstanceState.RUNNING, pid=process.pid)]
        result = run("instance", "log", "web", "--follow")

    assert result.exit_code == 0
    assert result.stdout.splitlines()[1:] == ["  abc"]


def test_following_one_that_has_ended_shows_what_was_said(run: Any, node: Any) -> None:
    node.infos = [InstanceInfo(name="web", state=InstanceState.CRASHED)]
    node.logs = [InstanceLog("died\n", "", "")]

    assert run("instance", "log", "web", "-f").stdout == "== kvmsec ==\ndied\n"


def test_following_one_that_was_stopped_and_has_no_definition_shows_its_log(
    run: Any, node: Any
) -> None:
    node.logs = [InstanceLog("stopped\n", "", "")]

    assert run("instance", "log", "web", "-f").stdout == "== kvmsec ==\nstopped\n"


def test_a_pid_that_changed_hands_is_not_watched(node: Any) -> None:
    with subprocess.Popen(["sleep", "10"]) as process:
        node.infos = [InstanceInfo(name="web", state=InstanceState.RUNNING, pid=process.pid)]

        async def ask() -> int | None:
            asked = node.info
            node.info = lambda name: asked_again(asked, name)
            return await following._open_process(node, "web")

        async def asked_again(asked: Any, name: str) -> InstanceInfo:
            found: InstanceInfo = await asked(name)
            node.infos = [InstanceInfo(name="web", state=InstanceState.STOPPED)]
            return found

        assert asyncio.run(ask()) is None
        process.kill()
