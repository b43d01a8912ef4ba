"""Nodes of a cluster, each with its kernel's own part: one master, one pool, instances anywhere."""

import pytest

from tests.cluster.lab.formation import POOL, Formation, answers

pytestmark = pytest.mark.kvm


def test_five_nodes_make_a_cluster_that_is_sound(cluster: Formation) -> None:
    listed = cluster.master.json("node", "list")

    assert [one["name"] for one in listed] == [node.name for node in cluster.lab.nodes]
    assert [one["role"] for one in listed] == ["master", *["plain"] * 4]
    for node in cluster.lab.nodes:
        assert node.json("cluster", "info")["uid_pool"] == POOL
        assert cluster.pool_of(node) == POOL


def test_a_change_of_the_pool_is_in_force_on_every_node(cluster: Formation) -> None:
    cluster.master.kvmsec("cluster", "modify", "--add-uids", "246020-246021")
    assert {cluster.pool_of(node) for node in cluster.lab.nodes} == {"246000-246021"}
    cluster.master.kvmsec("cluster", "modify", "--remove-uids", "246020-246021")
    assert {cluster.pool_of(node) for node in cluster.lab.nodes} == {POOL}


def test_a_change_that_one_node_is_not_fit_for_is_made_on_none(cluster: Formation) -> None:
    third = cluster.lab["node3"]
    third.kvmsec("uids", "provision", "246029", "--remove")
    refused = cluster.master.kvmsec("cluster", "modify", "--add-uids", "246029", status=1)
    third.kvmsec("uids", "provision", "246029")

    [row] = [line for line in refused.stdout.splitlines() if "246029" in line]
    assert row.startswith("node3")
    assert {cluster.pool_of(node) for node in cluster.lab.nodes} == {POOL}
    for node in cluster.lab.nodes:
        assert node.json("cluster", "info")["uid_pool"] == POOL


def test_the_master_starts_and_stops_an_instance_on_any_node(cluster: Formation) -> None:
    first, *others = cluster.lab.nodes
    for node in (first, others[0], others[-1]):
        cluster.start(f"web-{node.name}", node)
    listed = {one["name"]: one for one in first.json("instance", "list", "--all-nodes")}

    for node in (first, others[0], others[-1]):
        web = listed[f"web-{node.name}"]
        assert (web["node"], web["state"], web["security_model"]) == (node.name, "running", "pool")
        leased = [one["uid"] for one in node.json("uids", "list") if one["state"] == "leased"]
        assert leased == [web["uid"]]
        first.kvmsec("instance", "stop", web["name"], "--node", node.name, "--force")
    left = [one["name"] for one in first.json("instance", "list", "--all-nodes")]
    assert not [name for name in left if name.startswith("web-")]


def test_a_plain_node_orders_nothing(cluster: Formation) -> None:
    plain, other = cluster.lab["node2"], cluster.lab["node3"]

    refused = cluster.start("web", other, by=plain, status=1)
    assert "node2" in refused.stderr
    changed = plain.kvmsec("cluster", "modify", "--add-uids", "246020", status=1)
    assert "node1" in changed.stderr
    plain.kvmsec("node", "remove", "node3", status=1)
    assert not plain.path("/var/lib/kvmsec/server.key").exists()
    assert cluster.pool_of(other) == POOL


def test_what_a_remote_order_may_not_name_is_refused_and_written_down(cluster: Formation) -> None:
    node = cluster.lab["node4"]
    node.run("sh", "-c", "head -c 1048576 /dev/zero >/var/lib/secret.raw")
    where = ("--node", "node4", "--accel", cluster.accelerator, "--disk", "/var/lib/secret.raw")

    refused = cluster.master.kvmsec("instance", "start", "thief", *where, status=1)

    assert "/var/lib/secret.raw" in refused.stderr
    log = node.path("/var/log/kvmsec/orders.jsonl").read_text()
    assert '"thief"' in log
    assert "node1" in log


def test_a_demoted_candidate_orders_nothing_from_that_moment(cluster: Formation) -> None:
    second, third = cluster.lab["node2"], cluster.lab["node3"]
    cluster.master.kvmsec("node", "promote", "node2")
    cluster.start("web", third, by=second)
    second.kvmsec("instance", "stop", "web", "--node", "node3", "--force")

    cluster.master.kvmsec("node", "demote", "node2")

    cluster.start("web", third, by=second, status=1)
    assert not second.path("/var/lib/kvmsec/server.key").exists()


def test_a_candidate_takes_over_from_a_dead_master_which_then_follows(cluster: Formation) -> None:
    old, new = cluster.master, cluster.lab["node2"]
    old.kvmsec("node", "promote", "node2")
    cluster.daemons.pop(old.name)
    old.kill()

    new.kvmsec("cluster", "master-failover")
    new.kvmsec("cluster", "modify", "--add-uids", "246020")
    old.boot()
    cluster.serve(old)
    cluster.wait_for_pool("246000-246020", asking=new)
    assert "node2" in old.kvmsec("cluster", "modify", "--add-uids", "246021", status=1).stderr

    new.kvmsec("cluster", "modify", "--remove-uids", "246020")
    old.kvmsec("cluster", "master-failover", "--force")
    old.kvmsec("node", "demote", "node2")


def test_a_node_is_taken_out_and_joins_again(cluster: Formation) -> None:
    node = cluster.lab["node5"]
    cluster.master.kvmsec("node", "remove", "node5")

    assert "node5" not in [one["name"] for one in cluster.master.json("node", "list")]
    for name in ("server.pem", "client.pem", "cluster.json"):
        assert not node.path(f"/var/lib/kvmsec/{name}").exists()
    cluster.start("web", node, status=1)
    cluster.add(node)
    assert answers(node)
