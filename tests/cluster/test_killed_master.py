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
