"""A master that is killed at any step of a change: the same command again, and all is well.

A step is a file that is put in place or removed, and a call that is made to another node or was
answered (`lab/fatal.py`). The command dies before it, as by a power cut.
"""

import signal
from collections.abc import Callable

import pytest

from tests.cluster.lab.formation import POOL, Formation
from tests.cluster.lab.steps import dying_at, steps_of

pytestmark = pytest.mark.kvm


def _each_step(
    cluster: Formation,
    command: tuple[str, ...],
    prepare: Callable[[], None],
    check: Callable[[], None],
    again: Callable[[], None] | None = None,
) -> None:
    """Kill `command` at each of its steps, run it again, and hold the cluster against `check`.

    `again` is for a command that is gone on with by another.
    """
    prepare()
    steps = steps_of(cluster.master, *command)
    check()
    assert len(steps) > 2, steps
    for step in steps:
        prepare()
        died = dying_at(cluster.master, step, *command)
        assert died.status == -signal.SIGKILL, (step, died)
        if again is None:
            done = cluster.master.kvmsec(*command, status=None)
            assert done.status == 0, (step, done)
        else:
            again()
        check()
        assert cluster.errors() == [], step


def test_a_change_of_the_pool(cluster: Formation) -> None:
    def prepare() -> None:
        cluster.master.kvmsec("cluster", "modify", "--uid-pool", POOL)

    def check() -> None:
        cluster.wait_for_pool("246000-246020")

    _each_step(cluster, ("cluster", "modify", "--add-uids", "246020"), prepare, check)
    prepare()


def test_a_node_that_joins(cluster: Formation) -> None:
    node = cluster.lab["node5"]

    def prepare() -> None:
        cluster.master.kvmsec("node", "remove", "node5", "--force")
        node.kvmsec("node", "leave", "--yes", status=None)
        cluster.invite(node)

    def check() -> None:
        assert "node5" in [one["name"] for one in cluster.master.json("node", "list")]

    def again() -> None:
        done = cluster.master.kvmsec("node", "add", "node5", status=None)
        if done.status:  # The invitation was spent: it is a member, and not all know it.
            assert "no node is invited" in done.stderr, done
            cluster.master.kvmsec("cluster", "sync")

    _each_step(cluster, ("node", "add", "node5"), prepare, check, again)


@pytest.mark.parametrize("what", ["--new-node-certificates", "--new-cluster-certificate"])
def test_a_renewal_of_certificates(cluster: Formation, what: str) -> None:
    def fingerprints() -> list[str]:
        name = "server.pem" if "cluster" in what else "client.pem"
        return [node.path(f"/var/lib/kvmsec/{name}").read_text() for node in cluster.lab.nodes]

    before: list[str] = []

    def prepare() -> None:
        before[:] = fingerprints()

    def check() -> None:
        assert not set(before) & set(fingerprints())

    def go_on() -> None:
        done = cluster.master.kvmsec("cluster", "renew-crypto")
        if "no renewal is under way" in done.stdout:  # It died before it had begun.
            cluster.master.kvmsec("cluster", "renew-crypto", what)

    _each_step(cluster, ("cluster", "renew-crypto", what), prepare, check, go_on)
