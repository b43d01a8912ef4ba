"""`kvmsec audit`: whom it asks about, what is shown, and the status."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from kvmsec.agent import InstanceInfo, InstanceState
from kvmsec.audit import examination
from kvmsec.audit.examination import Report, Subject
from kvmsec.audit.process_files import ProcessGone
from kvmsec.audit.score import Finding
from kvmsec.cli import session


def report(subject: Subject, score: float = 0.7) -> Report:
    findings = (
        Finding(
            code="seccomp",
            exposure=score,
            weight=1.2,
            state="exposed",
            message="one filter",
            why="The kernel.",
            hint="add one",
        ),
        Finding(code="uid", exposure=0.0, weight=1.0, state="sealed", message="uid 5", why="w"),
    )
    return Report(
        pid=subject.pid,
        name=subject.instance or "qemu",
        instance=subject.instance,
        uid=None if subject.pid == 9 else 5,
        user=None,
        executable="/usr/bin/\x1b[2Jqemu",
        score=score,
        rating="SAFE",
        unread={"tree": "Permission denied"} if subject.pid == 9 else {},
        findings=findings,
    )


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch, node: Any) -> list[Any]:
    """What was asked of the audit; the instance `web` runs with pid 7, and 9 is a foreign QEMU."""
    calls: list[Any] = []

    def examine(subject: Subject, *, with_canary: bool = False) -> Report:
        calls.append((subject, with_canary))
        if subject.pid == 404:
            raise ProcessGone(404)
        return report(subject)

    def examine_all(instances: Sequence[Subject], *, with_canary: bool) -> list[Report]:
        known = {subject.pid: subject for subject in instances}
        pids = [9, 7] if node.infos else []
        return [examine(known.get(pid, Subject(pid)), with_canary=with_canary) for pid in pids]

    monkeypatch.setattr(examination, "examine", examine)
    monkeypatch.setattr(examination, "examine_all", examine_all)
    node.infos = [
        InstanceInfo(name="web", state=InstanceState.RUNNING, pid=7),
        InstanceInfo(name="db", state=InstanceState.STOPPED),
    ]
    return calls


def web(root: Path, *tolerated: str) -> Subject:
    """The instance, with where its sockets are."""
    place = root / "run/kvmsec/instances/web"
    return Subject(7, "web", tolerated, (str(place / "qmp.sock"), str(place / "serial.sock")))


def test_an_instance_is_found_by_name(run: Any, root: Path, asked: list[Any]) -> None:
    page = run("audit", "web")

    assert page.exit_code == 0
    assert asked == [(web(root), False)]
    assert page.stdout.startswith("instance web: pid 7, uid 5, /usr/bin/\\x1b[2Jqemu\n")
    assert "seccomp: The kernel.\n  hint: add one\n" in page.stdout
    assert page.stdout.endswith("Overall exposure of web: 0.7 SAFE\n")


def test_one_that_does_not_run_says_so(run: Any, asked: list[Any]) -> None:
    result = run("audit", "db")

    assert result.exit_code == 1
    assert result.stderr == (
        "kvmsec: the instance db does not run: it is stopped\n"
        "hint: start it first with `kvmsec instance start db`\n"
    )
    assert run("audit", "nobody").stderr.startswith("kvmsec: there is no instance nobody\n")


def test_any_process_is_audited_by_its_pid(run: Any, root: Path, asked: list[Any]) -> None:
    assert run("audit", "--pid", "9").exit_code == 0
    assert run("audit", "--pid", "7").exit_code == 0
    assert asked == [(Subject(9), False), (web(root), False)]

    gone = run("audit", "--pid", "404")
    assert gone.exit_code == 1
    assert gone.stderr.startswith("kvmsec: there is no process 404\nhint: ")


@pytest.mark.parametrize("arguments", [[], ["--all"]])
def test_all_is_a_table_with_what_could_not_be_read_marked(
    run: Any, asked: list[Any], arguments: list[str]
) -> None:
    table = run("audit", *arguments).stdout.splitlines()

    assert table[1].split() == ["web", "7", "5", "-", "0.7", "SAFE", "seccomp"]
    assert table[2].split() == ["qemu", "9", "?", "-", "0.7?", "SAFE", "seccomp"]
    assert table[3].startswith("? something could not be read")


def test_json_is_a_list_with_the_keys_that_are_promised(run: Any, asked: list[Any]) -> None:
    (one,) = json.loads(run("audit", "web", "--json").stdout)

    assert one.keys() >= {"pid", "name", "uid", "score", "findings"}
    assert one["findings"][0].keys() >= {"code", "exposure", "message", "hint"}
    assert len(json.loads(run("audit", "--json").stdout)) == 2


def test_no_qemu_is_an_empty_list(run: Any, asked: list[Any], node: Any) -> None:
    node.infos = []

    assert run("audit").stdout == "no QEMU runs here\n"
    assert run("audit", "--threshold", "0").exit_code == 0
    assert json.loads(run("audit", "--json").stdout) == []


@pytest.mark.parametrize(
    ("threshold", "status"), [("0.69", 3), ("0.7", 0), ("10", 0), ("10.0", 0), ("0", 3)]
)
def test_a_score_above_the_threshold_is_status_3(
    run: Any, asked: list[Any], threshold: str, status: int
) -> None:
    assert run("audit", "web", "--threshold", threshold).exit_code == status
    assert run("audit", "--threshold", threshold, "--json").exit_code == status


@pytest.mark.parametrize(
    "arguments",
    [
        ["web", "--all"],
        ["web", "--pid", "7"],
        ["--pid", "7", "--all"],
        ["--pid", "-1"],
        ["--pid", "x"],
        ["--threshold", "10.5"],
        ["--threshold", "-1"],
        ["--threshold", "nan"],
        ["../x"],
    ],
)
def test_wrong_usage_is_status_2(run: Any, asked: list[Any], arguments: list[str]) -> None:
    assert run("audit", *arguments).exit_code == 2
    assert asked == []


def test_the_canary_is_sent_when_asked(run: Any, root: Path, asked: list[Any]) -> None:
    run("audit", "web", "--canary")

    assert asked == [(web(root), True)]


def test_what_the_node_tolerates_goes_along(run: Any, asked: list[Any], root: Any) -> None:
    config = root / "etc/kvmsec/kvmsec.toml"
    config.parent.mkdir(parents=True, exist_ok=True)
    config.write_text('[confinement]\nmay_be_missing = ["cgroup"]\n')

    run("audit", "web")
    run("audit", "--all")

    assert asked[0][0] == web(root, "cgroup")
    assert [subject for subject, _ in asked[1:]] == [Subject(9), web(root, "cgroup")]


def test_who_is_not_root_is_warned_and_may_look(
    run: Any, asked: list[Any], node: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(session, "is_root", lambda: False)
    monkeypatch.setattr("kvmsec.cli.audit.is_root", lambda: False)

    result = run("audit")

    assert result.exit_code == 0
    assert "warning: without root" in result.stderr
    assert node.calls == []
    assert [subject for subject, _ in asked] == [Subject(9), Subject(7)]
