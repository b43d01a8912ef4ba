"""Nodes that join, are changed together, and leave, by commands and real daemons over TLS."""

import json
import shutil
import socket
from collections.abc import Callable

import pytest

from kvmsec.paths import Paths
from tests.root.daemon.node_by_command import Node

pytestmark = pytest.mark.root


def test_a_node_joins_is_promoted_demoted_and_leaves(
    master: Node, bring_in: Callable[[str], Node]
) -> None:
    other = bring_in("node2")
    assert other.state() == master.state()
    assert master.codes() == set()

    master.do("node", "promote", "node2")
    assert other.has("server.key")
    assert master.codes() == set() == other.codes()

    master.do("cluster", "modify", "--security-model", "user")
    assert other.state()["security_model"] == "user"
    refused = other.run("cluster", "modify", "--security-model", "none")
    assert "this node is not the cluster's master" in refused.stderr

    master.do("node", "demote", "node2")
    assert not other.has("server.key")
    assert master.codes() == set()

    master.do("node", "remove", "node2")
    assert not other.has("client.pem")
    assert not other.has("cluster.json")
    assert [one["name"] for one in master.state()["nodes"]] == [master.state()["master"]]


def test_a_candidate_takes_over_from_a_master_whose_daemon_is_gone(
    master: Node, bring_in: Callable[[str], Node]
) -> None:
    other = bring_in("node2")
    master.do("node", "promote", "node2")
    refused = other.run("cluster", "master-failover")
    assert "answers" in refused.stderr

    assert master.daemon is not None
    master.daemon.end()
    said = other.do("cluster", "master-failover")
    assert said.startswith("node2 is the master; the state goes on from revision ")
    other.do("cluster", "modify", "--security-model", "user")

    master.serve()
    master.daemon.says("serving other nodes")
    other.do("cluster", "sync")
    assert master.state() == other.state()
    assert master.run("cluster", "modify", "--security-model", "none").returncode == 1
    assert other.codes() == set()


def test_a_silent_node_is_named_in_time_and_catches_up(
    master: Node, bring_in: Callable[[str], Node]
) -> None:
    other = bring_in("node2")
    assert other.daemon is not None
    other.daemon.end()

    changed = master.run("cluster", "modify", "--security-model", "user")
    assert changed.returncode == 0
    assert "node2 did not answer" in changed.stderr
    assert master.codes() == {("node2", "node-silent")}
    rows = json.loads(master.do("instance", "list", "--all-nodes", "--json"))
    assert [(row["node"], row["state"]) for row in rows] == [("node2", "unknown")]

    other.serve()
    other.daemon.says("serving other nodes")
    master.do("cluster", "sync")
    assert other.state() == master.state()
    assert master.codes() == set()


def test_a_stranger_with_another_token_does_not_join(
    master: Node, nodes: Callable[[], Node]
) -> None:
    node = nodes()
    node.do("node", "join", given=master.do("node", "invite", "node2"))
    master.do("node", "invite", "node2")  # takes the place of the first
    node.serve()
    assert node.daemon is not None
    node.daemon.says("waiting to be admitted")

    refused = master.run("node", "add", f"127.0.0.1:{node.port}")
    assert refused.returncode == 1
    assert len(master.state()["nodes"]) == 1
    assert not node.has("client.pem")


def test_a_node_that_lost_its_files_joins_again(
    master: Node, bring_in: Callable[[str], Node]
) -> None:
    other = bring_in("node2")
    assert other.daemon is not None
    before = master.state()["nodes"][1]["uuid"]
    other.daemon.end()
    shutil.rmtree(Paths(other.root).var)
    assert "node invite node2 --readd" in master.run("node", "readd", "node2").stderr

    other.serve()
    other.daemon.says("no certificate")
    other.do("node", "join", given=master.do("node", "invite", "node2", "--readd"))
    # A join returns when the daemon listens, which would look for a token only now and then.
    socket.create_connection(("127.0.0.1", other.port), timeout=20).close()
    master.do("node", "readd", "node2")
    assert other.state() == master.state()
    assert master.state()["nodes"][1]["uuid"] == before
    assert master.codes() == set()
