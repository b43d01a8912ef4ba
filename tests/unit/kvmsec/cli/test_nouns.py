"""`doctor`, `config`, `cluster`, `uids` and `firewall`: what is asked, shown, and the status."""

import json
from pathlib import Path
from typing import Any

import pytest

from kvmsec.agent import Finding, UidState
from kvmsec.cli import cluster
from kvmsec.node.uids import UidNotClean

FINDINGS = (
    Finding("kvm", "ok", "accelerator", "kvm works"),
    Finding("pool", "warning", "pool", "no pool yet", "kvmsec cluster init"),
)
ERROR = Finding("tun", "error", "tun", "there is no /dev/net/tun", "modprobe tun", "node1")


@pytest.mark.parametrize("command", [["doctor"], ["firewall", "verify"]])
def test_checks_without_an_error_are_status_0(run: Any, node: Any, command: list[str]) -> None:
    node.findings = FINDINGS

    result = run(*command)

    assert result.exit_code == 0
    assert result.stdout.splitlines()[1].startswith("warning  pool")


@pytest.mark.parametrize("command", [["doctor"], ["firewall", "verify"]])
def test_an_error_among_the_checks_is_status_3(run: Any, node: Any, command: list[str]) -> None:
    node.findings = (*FINDINGS, ERROR)

    assert run(*command).exit_code == 3
    result = run(*command, "--json")
    assert result.exit_code == 3
    assert json.loads(result.stdout)[2] == {
        "code": "tun",
        "severity": "error",
        "node": "node1",
        "item": "tun",
        "message": "there is no /dev/net/tun",
        "hint": "modprobe tun",
    }


# firewall ------------------------------------------------------------------------------------


def test_the_rules_are_shown_in_words_and_as_json(run: Any, node: Any) -> None:
    drop = {
        **{"at": "2024-05-01T10:00:00+00:00", "uid": 30001, "interface": "eth0\x1b"},
        **{"source": "192.0.2.1", "destination": "192.0.2.9", "protocol": "UDP"},
        **{"port": 53, "is_canary": False},
    }
    node.rules = {
        **{"backend": "nftables", "tag": "kvmsec", "uids": "30000-30009"},
        **{"families": ["ipv4", "ipv6"], "dropped_packets": 4, "dropped": {"ipv4": 3, "ipv6": 1}},
        "rules": ["table inet kvmsec {", "chain output {", "meta skuid @pool drop", "}", "}"],
        "log": {"prefix": "kvmsec-drop: ", "group": None},
        **{"last_drops": [drop], "last_drops_note": None},
    }

    assert run("firewall", "show").stdout.splitlines() == [
        "backend:  nftables",
        "tag:      kvmsec",
        "uids:     30000-30009",
        "families: ipv4, ipv6",
        "dropped packets: 4 (ipv4 3, ipv6 1)",
        "last drops:",
        "  2024-05-01T10:00:00+00:00 uid 30001: UDP to 192.0.2.9 port 53 by eth0\\x1b",
        "rules:",
        *("  table inet kvmsec {", "    chain output {", "      meta skuid @pool drop"),
        *("    }", "  }"),
    ]
    assert json.loads(run("firewall", "show", "--json").stdout) == node.rules


def test_where_no_rules_are_in_force_that_is_all_that_is_said(run: Any, node: Any) -> None:
    node.rules = {"backend": None}

    assert run("firewall", "show").stdout == "no packet rules of this root are in force\n"


@pytest.mark.parametrize(
    ("arguments", "asked"),
    [
        (["apply"], ("apply_rules", ())),
        (["remove"], ("remove_rules", (False,))),
        (["remove", "--force"], ("remove_rules", (True,))),
    ],
)
def test_the_rules_are_changed_as_told(
    run: Any, node: Any, arguments: list[str], asked: tuple[Any, ...]
) -> None:
    assert run("firewall", *arguments).exit_code == 0
    assert node.calls == [asked]


# config --------------------------------------------------------------------------------------


@pytest.mark.root
def test_the_settings_are_shown_with_where_they_come_from(run: Any) -> None:
    settings = json.loads(run("config", "show", "--json").stdout)

    assert {"key": "uids.reuse_delay_s", "value": 60, "origin": "default"} in settings
    assert "firewall.backend" in run("config", "show").stdout


@pytest.mark.root
def test_every_fault_of_the_settings_is_told(run: Any, root: Path) -> None:
    (root / "etc/kvmsec/kvmsec.toml").write_text('[firewall]\nbackend = "x"\n[uid]\n')

    result = run("config", "check")

    assert result.exit_code == 1
    assert "firewall.backend" in result.stderr
    assert "uid" in result.stderr
    assert run("config", "show").exit_code == 1


@pytest.mark.root
def test_right_settings_are_said_to_be_right(run: Any, root: Path) -> None:
    place = root / "etc/kvmsec/kvmsec.toml"
    place.write_text("[uids]\nreuse_delay_s = 5\n")

    assert run("config", "check").stdout == f"{place} is right\n"


# cluster -------------------------------------------------------------------------------------


def test_a_cluster_is_made_changed_shown_and_ended(run: Any, node: Any, root: Path) -> None:
    made = run("cluster", "init", "--name", "prod", "--uid-pool", "30000-30009")
    assert (made.exit_code, made.stderr) == (0, "")
    assert made.stdout == "cluster prod: security model pool, uid pool 30000-30009 (10 uids)\n"

    changed = run("cluster", "modify", "--add-uids", "30020", "--remove-uids", "30003")
    assert changed.exit_code == 0

    shown = json.loads(run("cluster", "info", "--json").stdout)
    assert shown["name"] == "prod"
    assert shown["uid_pool"] == "30000-30002,30004-30009,30020"
    assert shown["security_model"] == "pool"
    assert [one["name"] for one in shown["nodes"]] == ["node1"]
    assert "30000-30002,30004-30009,30020" in run("cluster", "info").stdout

    ended = run("cluster", "destroy", "--yes")
    assert (ended.exit_code, ended.stdout) == (0, "the cluster prod is no more\n")
    assert run("cluster", "info").exit_code == 1


def test_a_second_init_is_refused(run: Any, node: Any) -> None:
    run("cluster", "init", "--name", "prod")

    result = run("cluster", "init", "--name", "other")

    assert result.exit_code == 1
    assert result.stderr.startswith("kvmsec: this node already belongs to the cluster prod\nhint: ")


def test_what_killed_commands_left_is_put_right_before_a_change(run: Any, node: Any) -> None:
    run("cluster", "init", "--name", "prod")

    assert node.calls[0] == ("reconcile", ())


def test_drained_uids_are_told(run: Any, node: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    async def held() -> dict[int, str]:
        return {30003: "web"}

    monkeypatch.setattr(node, "held_uids", held)
    run("cluster", "init", "--name", "prod", "--uid-pool", "30000-30009")

    refused = run("cluster", "modify", "--remove-uids", "30003")
    assert refused.exit_code == 1
    assert "uid 30003: web" in refused.stderr

    drained = run("cluster", "modify", "--remove-uids", "30003", "--drain")
    assert "leaving once they are free: 30003\n" in drained.stdout


def test_an_unreadable_store_is_named_and_left(run: Any, node: Any, root: Path) -> None:
    place = root / "var/lib/kvmsec/cluster.json"
    place.write_text("{")

    for arguments in (["info"], ["init", "--name", "a"], ["destroy", "--yes"]):
        result = run("cluster", *arguments)
        assert result.exit_code == 1
        assert str(place) in result.stderr
    assert place.read_text() == "{"


def test_destroying_asks_and_refuses_where_nobody_can_answer(run: Any, node: Any) -> None:
    run("cluster", "init", "--name", "prod")

    result = run("cluster", "destroy")

    assert result.exit_code == 2
    assert result.stderr.splitlines()[-1] == "hint: say --yes to mean it"
    assert run("cluster", "info").exit_code == 0


@pytest.mark.parametrize(("is_sure", "status"), [(True, 0), (False, 1)])
def test_destroying_does_what_was_answered(
    run: Any, node: Any, monkeypatch: pytest.MonkeyPatch, is_sure: bool, status: int
) -> None:
    monkeypatch.setattr(cluster, "_is_sure", lambda question: is_sure)
    run("cluster", "init", "--name", "prod")

    assert run("cluster", "destroy").exit_code == status
    assert run("cluster", "info").exit_code == (1 if is_sure else 0)


# uids ----------------------------------------------------------------------------------------


def test_uids_are_listed_in_words_and_as_json(run: Any, node: Any) -> None:
    node.states = (
        UidState(30000, "kvmsec-30000", "leased", "web", root="/"),
        UidState(30001, None, "quarantined", reason="a file is left: /tmp/\x1b"),
    )

    lines = run("uids", "list").stdout.splitlines()
    assert [line.split()[:3] for line in lines] == [
        ["UID", "USER", "STATE"],
        ["30000", "kvmsec-30000", "leased"],
        ["30001", "-", "quarantined"],
    ]
    assert lines[2].endswith("a file is left: /tmp/\\x1b")
    assert json.loads(run("uids", "list", "--all", "--json").stdout)[0] == {
        "uid": 30000,
        "user": "kvmsec-30000",
        "state": "leased",
        "instance": "web",
        "root": "/",
        "reason": None,
    }
    assert node.calls == [("uid_states", (False,)), ("uid_states", (True,))]


def test_a_released_uid_is_told(run: Any, node: Any) -> None:
    node.states = (UidState(30001, None, "free"),)

    assert run("uids", "release", "30001").stdout == "uid 30001 is free\n"


def test_a_uid_that_an_instance_of_another_root_holds_is_listed_with_that_root(
    run: Any, node: Any, root: Path
) -> None:
    here = UidState(30000, None, "leased", "web", root=str(root))
    node.states = (here, UidState(30001, None, "leased", "web", root="/srv/trial"))

    lines = run("uids", "list").stdout.splitlines()

    assert lines[1].split()[3:] == ["web", "-"]
    assert lines[2].split()[3:] == ["web", "(of", "/srv/trial)", "-"]


def test_a_uid_that_stays_quarantined_is_status_1_with_the_reason(
    run: Any, node: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def refuse(uid: int) -> UidState:
        raise UidNotClean(uid, "process 12")

    monkeypatch.setattr(node, "release_uid", refuse)

    result = run("uids", "release", "30001")

    assert result.exit_code == 1
    assert result.stderr.startswith("kvmsec: uid 30001 stays quarantined: process 12\nhint: ")


@pytest.mark.root
def test_the_users_can_be_shipped_as_a_sysusers_file(run: Any) -> None:
    result = run("uids", "provision", "30000,30002", "--format", "sysusers")

    assert result.exit_code == 0
    lines = result.stdout.splitlines()
    assert [line.split()[:3] for line in lines] == [
        ["u", "kvmsec-reaper", "-"],
        ["u", "kvmsec-30000", "30000"],
        ["u", "kvmsec-30002", "30002"],
    ]


@pytest.mark.parametrize("printed", [["--format", "sysusers"], ["--dry-run"], []])
@pytest.mark.parametrize("pool", ["0", "4294967295", "61184-61190", "30000-2000000000"])
def test_an_unfit_pool_is_refused_whatever_is_asked_for(
    run: Any, node: Any, pool: str, printed: list[str]
) -> None:
    result = run("uids", "provision", pool, *printed)

    assert result.exit_code != 0
    assert result.stdout == ""
    assert result.stderr.startswith("kvmsec: ")
    assert node.calls == []


@pytest.mark.root
def test_a_shipped_file_holds_nobody_else_s_uid(run: Any) -> None:
    """uid 65534 is a user of every host: it is there, and fit for no pool."""
    assert run("uids", "provision", "65534", "--dry-run").exit_code == 1
    assert run("uids", "provision", "65534", "--format", "sysusers").exit_code == 1


@pytest.mark.root
def test_a_dry_run_says_what_would_be_made(run: Any) -> None:
    result = run("uids", "provision", "30000-30001", "--dry-run")

    assert (result.exit_code, result.stdout) == (0, "users to make: 30000-30001 (2)\n")
