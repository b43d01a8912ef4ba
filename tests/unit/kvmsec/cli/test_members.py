"""`cluster` over several nodes, `cluster verify`, and `instance` on other nodes: what is said."""

import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
from attrs import define, evolve, field

from kvmsec.agent import InstanceInfo, InstanceState
from kvmsec.cli import session
from kvmsec.model.cluster import Cluster, Role
from kvmsec.model.instance import InstanceDefinition
from kvmsec.pki.joining import parse_token
from kvmsec.rpc.messages import Finding
from kvmsec.store.file import FileStore
from tests.unit.kvmsec.fake_node import FakeCluster, FakeNode, Refusal, ranges


@define
class Member(FakeNode):
    """Another member, with instances."""

    infos: list[InstanceInfo] = field(factory=list)
    is_stale: bool = False
    started: list[InstanceDefinition] = field(factory=list)

    async def list(self) -> tuple[InstanceInfo, ...]:
        self.called("list")
        return tuple(self.infos)

    async def start(self, definition: InstanceDefinition) -> InstanceInfo:
        self.called("start")
        if self.is_stale:
            self.is_stale = False
            raise Refusal(f"{self.name}: an older copy", "StaleCopy")
        self.started.append(definition)
        return InstanceInfo(name=definition.name, state=InstanceState.RUNNING, pid=7, uid=1003)

    async def stop(
        self, name: str, *, timeout_s: float = 60.0, force: bool = False
    ) -> InstanceInfo:
        return InstanceInfo(name=name, state=InstanceState.STOPPED)


class Reach(FakeCluster):
    """The ways to the members, over the store of the command line's root."""

    agent: Any = None

    @property
    def here(self) -> Any:
        return self.agent

    @property
    def household(self) -> FakeNode:
        return self.nodes["node1"]


@pytest.fixture
def reach(
    run: Any, node: Any, root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Reach:
    """A cluster of this node, a candidate and a plain node."""
    assert run("cluster", "init", "--name", "prod", "--uid-pool", "1000-1009").exit_code == 0
    made = Reach(tmp_path / "others")
    made.place.mkdir()
    made.agent = node
    store = FileStore(root / "var/lib/kvmsec/cluster.json")
    made.nodes["node1"] = FakeNode(store, "node1")

    @asynccontextmanager
    async def opened(*_: object) -> AsyncIterator[Reach]:
        yield made

    monkeypatch.setattr(session, "open_reach", opened)
    monkeypatch.setattr(Reach, "here", property(lambda self: self.nodes["node1"]))
    for name, role in (("node2", Role.CANDIDATE), ("node3", Role.PLAIN)):
        made.join(name, role)
        one = made.nodes[name]
        made.nodes[name] = Member(one.store, name, is_remote=True, rules=one.rules)
    monkeypatch.setattr(Reach, "here", property(lambda self: self.agent))
    return made


def standing(reach: Reach) -> Cluster:
    found, _ = reach.household.store.load()
    assert found is not None
    return found


# cluster -------------------------------------------------------------------------------------


def test_init_makes_the_certificates_at_once(run: Any, node: Any, root: Path) -> None:
    run("cluster", "init", "--name", "prod", "--address", "192.0.2.1:7", "--key-kind", "p256")

    var = root / "var/lib/kvmsec"
    names = {path.name for path in var.iterdir()}
    assert {"server.pem", "server.key", "client.pem", "ssconf_master_candidates_certs"} <= names
    (member,) = json.loads(run("cluster", "info", "--json").stdout)["nodes"]
    assert (member["address"], member["port"], len(member["certificates"])) == ("192.0.2.1", 7, 1)
    run("cluster", "destroy", "--yes")
    assert not {path.name for path in var.iterdir()} & {"server.key", "client.pem", "node.json"}


def test_a_refused_pool_is_a_table_of_node_uids_and_reason(run: Any, reach: Reach) -> None:
    for name in ("node2", "node3"):
        reach.nodes[name].unfit = ranges("1020")
    result = run("cluster", "modify", "--add-uids", "1020")

    assert result.exit_code == 1
    assert result.stdout.splitlines() == [
        "NODE   UIDS  REASON",
        "node2  1020  has no user",
        "node3  1020  has no user",
    ]
    assert "refused by node2, node3; nothing has changed" in result.stderr
    assert "hint: provision it" in result.stderr


def test_a_node_that_did_not_take_part_is_named(run: Any, reach: Reach) -> None:
    reach.nodes["node3"].is_silent = True
    result = run("cluster", "modify", "--add-uids", "1020")

    assert result.exit_code == 0
    assert "warning: node3 did not answer, and takes the change up when it does" in result.stderr
    assert run("cluster", "sync").exit_code == 1
    reach.nodes["node3"].is_silent = False
    assert run("cluster", "sync").stdout == "every node has the state\n"
    assert reach.nodes["node3"].store.load()[0] == standing(reach)


def test_a_cluster_with_members_is_not_destroyed(run: Any, reach: Reach) -> None:
    result = run("cluster", "destroy", "--yes")
    assert result.exit_code == 1
    assert "node2, node3" in result.stderr


def test_a_master_that_is_there_is_not_failed_over(run: Any, reach: Reach) -> None:
    result = run("cluster", "master-failover")
    assert result.exit_code == 1
    assert "node1 is the master already" in result.stderr
    forced = run("cluster", "master-failover", "--force")
    assert forced.stdout.startswith("node1 is the master; the state goes on from revision ")


# node ----------------------------------------------------------------------------------------


@pytest.fixture
def node_command(run: Any) -> Any:
    return lambda *arguments, **more: run("node", *arguments, **more)


def test_a_token_is_printed_alone_and_the_next_steps_beside_it(
    node_command: Any, reach: Reach
) -> None:
    result = node_command("invite", "node4", "--valid-for", "30m")

    invitation = parse_token(result.stdout)
    assert invitation.node_name == "node4"
    assert 1700 < (invitation.expires_at - datetime.now(UTC)).total_seconds() <= 1800
    assert "kvmsec node add node4" in result.stderr
    assert node_command("invite", "node2").exit_code == 1
    assert node_command("invite", "node4", "--valid-for", "soon").exit_code == 2


def test_a_token_is_taken_from_standard_input(
    node_command: Any, reach: Reach, run: Any, root: Path
) -> None:
    token = node_command("invite", "node4").stdout
    for name in ("cluster.json", "node.json", "client.pem"):
        (root / "var/lib/kvmsec" / name).unlink()

    joined = node_command("join", input=token)
    assert (joined.exit_code, "will join as node4" in joined.stdout) == (0, True)
    assert node_command("join", input="kvmsec-join-1-x").exit_code == 1


def test_members_are_listed_with_whether_they_answer(node_command: Any, reach: Reach) -> None:
    reach.nodes["node3"].is_silent = True
    rows = json.loads(node_command("list", "--json").stdout)

    assert [(row["name"], row["role"]) for row in rows] == [
        ("node1", "master"),
        ("node2", "candidate"),
        ("node3", "plain"),
    ]
    assert [row["answer"] for row in rows] == [
        "this node",
        "yes",
        "none: node3 can't be reached",
    ]
    assert "candidate" in node_command("info", "node2").stdout
    assert node_command("info", "node9").exit_code == 1


def test_members_are_promoted_demoted_and_removed(node_command: Any, reach: Reach) -> None:
    assert node_command("promote", "node3").stdout == "node3 is a master candidate\n"
    demoted = node_command("demote", "node3")
    assert "note: node3 has had the cluster's key" in demoted.stderr
    assert node_command("remove", "node3").stdout == "node3 is no member any more\n"
    assert [member.name for member in standing(reach).nodes] == ["node1", "node2"]


# verify --------------------------------------------------------------------------------------


def test_findings_are_status_3_and_may_be_ignored(run: Any, reach: Reach) -> None:
    reach.nodes["node3"].is_silent = True
    result = run("cluster", "verify", "--json")
    findings = json.loads(result.stdout)

    assert result.exit_code == 3
    silent = [one for one in findings if one["code"] == "node-silent"]
    assert [(one["node"], one["severity"]) for one in silent] == [("node3", "error")]
    codes = {one["code"] for one in findings if one["severity"] == "error"}
    ignored = [word for code in codes for word in ("--ignore-errors", code)]
    assert run("cluster", "verify", *ignored).exit_code == 0


def test_a_finding_is_shown_with_its_node(run: Any, reach: Reach) -> None:
    reach.nodes["node3"].is_silent = True
    lines = [line.split() for line in run("cluster", "verify").stdout.splitlines()]

    assert ["error", "node3", "answer"] in [line[:3] for line in lines]


def test_a_member_has_the_same_keys_whether_it_answers_or_not(
    node_command: Any, reach: Reach
) -> None:
    reach.nodes["node3"].is_silent = True
    own, other, silent = json.loads(node_command("list", "--json").stdout)

    assert own.keys() == other.keys() == silent.keys()
    assert own["version"] and silent["version"] is None


def test_lines_for_scripts_begin_with_their_code(run: Any, reach: Reach) -> None:
    reach.nodes["node3"].is_silent = True
    result = run("cluster", "verify", "--error-codes")

    assert result.exit_code == 3
    line = "node-silent error node3 answer: node3 can't be reached"
    assert line in result.stdout.splitlines()


@pytest.mark.parametrize(
    "options", [["--ignore-errors", "no-such"], ["--json", "--error-codes"]], ids=str
)
def test_what_cannot_be_meant_is_wrong_usage(run: Any, reach: Reach, options: list[str]) -> None:
    assert run("cluster", "verify", *options).exit_code == 2


def test_a_finding_of_a_node_is_printed_with_its_name(run: Any, reach: Reach) -> None:
    class Unfit(Member):
        async def examine(self, pool: Any) -> Any:
            import msgspec

            said = await FakeNode.examine(self, pool)
            problem = Finding(code="x", severity="error", item="it", message="uid 1003: none")
            return msgspec.structs.replace(said, pool_problems=(problem,))

    third = reach.nodes["node3"]
    reach.nodes["node3"] = Unfit(third.store, "node3", is_remote=True)
    assert (
        "pool-user error node3 uid pool: uid 1003: none"
        in run("cluster", "verify", "--error-codes").stdout
    )


# instance ------------------------------------------------------------------------------------


def running(name: str) -> InstanceInfo:
    return InstanceInfo(name=name, state=InstanceState.RUNNING, pid=7, uid=1003)


def test_an_instance_is_started_and_stopped_on_another_node(run: Any, reach: Reach) -> None:
    second = reach.nodes["node2"]
    assert isinstance(second, Member)
    result = run(
        "instance", "start", "web1", "--memory", "64", "--firmware", "/x", "--node", "node2"
    )

    assert (result.exit_code, result.stderr) == (0, "")
    assert [one.name for one in second.started] == ["web1"]
    assert run("instance", "stop", "web1", "--node", "node2").stdout == "web1 stopped\n"
    assert run("instance", "start", "web1", "--firmware", "/x", "--node", "node9").exit_code == 1


def test_a_node_with_an_older_copy_is_handed_the_state_and_asked_again(
    run: Any, reach: Reach
) -> None:
    second = reach.nodes["node2"]
    assert isinstance(second, Member)
    second.is_silent = True
    run("cluster", "modify", "--add-uids", "1020")
    second.is_silent, second.is_stale = False, True

    result = run(
        "instance", "start", "web1", "--memory", "64", "--firmware", "/x", "--node", "node2"
    )
    assert result.exit_code == 0
    assert second.store.load()[0] == standing(reach)


def test_instances_of_all_nodes_are_listed_and_silence_is_marked(
    run: Any, reach: Reach, node: Any
) -> None:
    second = reach.nodes["node2"]
    assert isinstance(second, Member)
    second.infos = [running("web2")]
    node.infos = [running("web1")]
    reach.nodes["node3"].is_silent = True

    rows = json.loads(run("instance", "list", "--all-nodes", "--json").stdout)
    assert [(row["node"], row["name"], row["state"]) for row in rows] == [
        ("node1", "web1", "running"),
        ("node2", "web2", "running"),
        ("node3", None, "unknown"),
    ]
    shown = run("instance", "list", "--all-nodes")
    assert any(
        line.split()[:4] == ["node3", "-", "no", "answer"] for line in shown.stdout.splitlines()
    )
    assert "warning: node3 did not answer" in shown.stderr
    assert (
        json.loads(run("instance", "list", "--node", "node2", "--json").stdout)[0]["name"] == "web2"
    )


def test_following_a_log_is_for_the_node_itself(run: Any, reach: Reach) -> None:
    assert run("instance", "log", "web1", "--follow", "--node", "node2").exit_code == 2
    assert run("instance", "list", "--node", "node2", "--all-nodes").exit_code == 2


def test_a_changed_member_is_still_found_by_its_name(run: Any, reach: Reach) -> None:
    cluster, revision = reach.household.store.load()
    assert cluster is not None
    moved = evolve(cluster.nodes[1], address="192.0.2.9")
    nodes = (cluster.nodes[0], moved, cluster.nodes[2])
    reach.household.store.save(evolve(cluster, nodes=nodes), revision)
    assert run("instance", "list", "--node", "NODE2", "--json").exit_code == 0
