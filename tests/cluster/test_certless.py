"""Running without client certificates: the last resort when nodes trust each other no more."""

import pytest

from tests.cluster.lab.formation import Formation
from tests.cluster.lab.node import Node

pytestmark = pytest.mark.kvm

LIST = "/var/lib/kvmsec/ssconf_master_candidates_certs"
BUNDLE = "/var/log/kvmsec/certless.bundle"


def _run_on(cluster: Formation, node: Node, **options: int) -> None:
    """Start an instance there and stop it."""
    cluster.start("web", node, **options)
    if not options:
        cluster.master.kvmsec("instance", "stop", "web", "--node", node.name, "--force")


def test_while_it_lasts_verify_nags_and_its_end_takes_it_from_all(cluster: Formation) -> None:
    cluster.master.kvmsec("cluster", "certless", "enable", "--for", "1h")
    assert {one["node"] for one in cluster.verify() if "certless" in one["code"]} >= {"node3"}
    _run_on(cluster, cluster.lab["node3"])

    cluster.master.kvmsec("cluster", "certless", "disable")

    assert [one for one in cluster.verify() if "certless" in one["code"]] == []
    assert not any(node.path("/var/lib/kvmsec/certless.pem").exists() for node in cluster.lab.nodes)


def test_a_node_that_trusts_nobody_is_reached_by_what_was_carried_to_it(cluster: Formation) -> None:
    node, master = cluster.lab["node3"], cluster.master
    cluster.stop(master)  # It would mend the node by itself, as soon as it could.
    node.path(LIST).write_text("")
    _run_on(cluster, node, status=1)

    enabled = master.kvmsec(
        "cluster", "certless", "enable", "--for", "1h", "--bundle", BUNDLE, status=1
    )
    assert "node3" in enabled.stdout + enabled.stderr
    [told] = [line for line in enabled.stderr.splitlines() if line.startswith("passphrase")]
    node.path(BUNDLE).write_bytes(master.path(BUNDLE).read_bytes())
    node.kvmsec("node", "certless", BUNDLE, input=told.split()[-1].encode())

    master.kvmsec("cluster", "sync")
    cluster.serve(master)
    master.kvmsec("cluster", "certless", "disable")
    _run_on(cluster, node)
