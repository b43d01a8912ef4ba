"""A master that is killed at any step of a change: the same command again, and all is well.

A step is one that the command names, a file that is put in place, or a call that was answered
(`lab/fatal.py`). The command dies there, as by a power cut. That every write may be the last is
tried without a kernel's part in tests/unit; here are the steps between which nodes differ.
"""

import signal
from itertools import cycle

import pytest

from tests.cluster.lab.formation import POOL, Formation
from tests.cluster.lab.steps import dying_at

pytestmark = pytest.mark.kvm

MODIFY = (
    *("step ask", "step save", "rename cluster.json", "step hand out"),
    *("answer state.put", "call uids.held", "step settle", "answer rules.sync"),
)
"""The second of each two takes uids away again, and asks who holds them."""
ADD = (
    *("answer join.hello", "rename cluster.json", "step admit"),
    *("answer join.admit", "step spend", "step spread"),
)
REMOVE = (
    *("step leave", "rename cluster.json", "answer node.leave"),
    *("step save", "step distrust", "step spread"),
)
NEW_NODE_CERTIFICATES = (
    *("rename client.pem.next", "answer state.put"),
    *("rename client.pem", "answer certificates.commit"),
)
NEW_CLUSTER_CERTIFICATE = (
    *("rename renewal.json", "answer certificates.prepare", "rename server.pem"),
    *("rename cluster.json", "answer state.put", "answer certificates.commit"),
    *("answer node.info", "rename server.key", "answer certificates.finish"),
    "remove renewal.json",
)

PROMOTE = ("answer files.put", "rename cluster.json", "answer state.put")
DEMOTE = ("step spread", "answer state.put", "answer files.put")
FAILOVER = ("rename cluster.json", "answer state.put")
BEGUN = (
    "rename client.pem.next",
    "answer state.put",
    "answer certificates.prepare",
    "rename server.pem",
)
ABORT = (
    "rename renewal.json",
    "answer certificates.rollback",
    "rename server.pem",
    "answer state.put",
)
"""Each has a renewal before it that was killed at the step of BEGUN in its place."""
FORGET = ("rename cluster.json", "remove renewal.json")


def _killed(cluster: Formation, step: str, *command: str) -> None:
    died = dying_at(cluster.master, step, *command)
    assert died.status == -signal.SIGKILL, (step, died)


def _run_again(cluster: Formation, step: str, *command: str) -> str:
    done = cluster.master.kvmsec(*command, status=None)
    assert done.status == 0, (step, done)
    return done.stdout


def test_a_change_of_the_pool(cluster: Formation) -> None:
    for step, pool in zip(MODIFY, cycle(["246000-246020", POOL]), strict=False):
        change = ("cluster", "modify", "--uid-pool", pool)
        _killed(cluster, step, *change)
        _run_again(cluster, step, *change)
        assert cluster.master.json("cluster", "info")["uid_pool"] == pool, step
        assert cluster.errors() == [], step


def test_a_node_that_leaves_and_joins(cluster: Formation) -> None:
    node = cluster.lab["node5"]
    for leaving, joining in zip(REMOVE, ADD, strict=True):
        _killed(cluster, leaving, "node", "remove", "node5")
        if leaving != "step spread":
            _run_again(cluster, leaving, "node", "remove", "node5")
        assert not node.path("/var/lib/kvmsec/client.pem").exists(), leaving

        cluster.invite(node)
        _killed(cluster, joining, "node", "add", "node5")
        _run_again(cluster, joining, "node", "add", "node5")
        assert cluster.errors() == [], (leaving, joining)
        assert "node5" in [one["name"] for one in cluster.master.json("node", "list")]


@pytest.mark.parametrize(
    ("what", "name", "steps"),
    [
        pytest.param("--new-node-certificates", "client.pem", NEW_NODE_CERTIFICATES, id="nodes"),
        pytest.param(
            "--new-cluster-certificate", "server.pem", NEW_CLUSTER_CERTIFICATE, id="cluster"
        ),
    ],
)
def test_a_renewal_of_certificates(
    cluster: Formation, what: str, name: str, steps: tuple[str, ...]
) -> None:
    def certificates() -> list[str]:
        return [node.path(f"/var/lib/kvmsec/{name}").read_text() for node in cluster.lab.nodes]

    for step in steps:
        before = certificates()
        _killed(cluster, step, "cluster", "renew-crypto", what)
        if "no renewal is under way" in _run_again(cluster, step, "cluster", "renew-crypto"):
            _run_again(cluster, step, "cluster", "renew-crypto", what)  # It had not begun.
        assert not set(before) & set(certificates()), step
        assert cluster.errors() == [], step


def test_a_candidate_that_is_made_and_unmade(cluster: Formation) -> None:
    node = cluster.lab["node2"]
    key = node.path("/var/lib/kvmsec/server.key")
    for promote, demote in zip(PROMOTE, DEMOTE, strict=True):
        _killed(cluster, promote, "node", "promote", "node2")
        _run_again(cluster, promote, "node", "promote", "node2")
        assert cluster.errors() == [], promote
        assert key.exists(), promote

        _killed(cluster, demote, "node", "demote", "node2")
        _run_again(cluster, demote, "node", "demote", "node2")
        assert cluster.errors() == [], demote
        assert not key.exists(), demote
        cluster.start("web", cluster.lab["node3"], by=node, status=1)


def test_a_promotion_that_is_given_up(cluster: Formation) -> None:
    """The key is on a plain node then: `verify` tells, and a demotion takes it away."""
    _killed(cluster, "answer files.put", "node", "promote", "node2")
    assert {one["node"] for one in cluster.errors()} == {"node2"}
    _run_again(cluster, "answer files.put", "node", "demote", "node2")
    assert cluster.errors() == []


def test_a_candidate_that_takes_over(cluster: Formation) -> None:
    first, second = cluster.master, cluster.lab["node2"]
    first.kvmsec("node", "promote", "node2")
    old, new = first, second
    for step in FAILOVER:
        cluster.stop(old)
        died = dying_at(new, step, "cluster", "master-failover")
        assert died.status == -signal.SIGKILL, (step, died)
        again = new.kvmsec("cluster", "master-failover", status=None)
        if again.status != 0:
            assert "is the master already" in again.stderr, (step, again)
        cluster.serve(old)
        new.kvmsec("cluster", "sync")
        assert [one for one in cluster.verify(new) if one["severity"] == "error"] == [], step
        for node in cluster.lab.nodes:
            assert node.json("cluster", "info")["master"] == new.name, (step, node.name)
        old, new = new, old
    first.kvmsec("node", "demote", "node2")


def test_a_renewal_that_is_taken_back(cluster: Formation) -> None:
    def files() -> list[str]:
        names = ("client.pem", "server.pem", "ssconf_master_candidates_certs")
        paths = [node.path("/var/lib/kvmsec") for node in cluster.lab.nodes]
        return [(path / name).read_text() for path in paths for name in names]

    before = files()
    ways = cycle([("--abort",), ()])  # Going on goes back as well, once that was begun.
    for begun, step in zip(BEGUN, ABORT, strict=True):
        _killed(cluster, begun, "cluster", "renew-crypto", "--new-cluster-certificate")
        _killed(cluster, step, "cluster", "renew-crypto", "--abort")
        way = ("--abort",) if step == ABORT[0] else next(ways)
        _run_again(cluster, step, "cluster", "renew-crypto", *way)
        assert files() == before, (begun, step)
        assert cluster.errors() == [], (begun, step)
        assert not cluster.master.path("/var/lib/kvmsec/renewal.json").exists()


def test_a_renewal_that_ends_without_a_node_that_is_away(cluster: Formation) -> None:
    away = cluster.lab["node5"]
    for step in FORGET:
        cluster.stop(away)
        cluster.master.kvmsec("cluster", "renew-crypto", "--new-node-certificates", status=1)
        _killed(cluster, step, "cluster", "renew-crypto", "--forget-offline")
        _run_again(cluster, step, "cluster", "renew-crypto", "--forget-offline")
        assert {one["node"] for one in cluster.errors()} == {"node5"}, step
        away.kvmsec("node", "leave", "--yes")
        token = cluster.master.kvmsec("node", "invite", "node5", "--readd").stdout.split()[0]
        away.kvmsec("node", "join", input=token.encode())
        cluster.serve(away)
        cluster.master.kvmsec("node", "readd", "node5")
        assert cluster.errors() == [], step
