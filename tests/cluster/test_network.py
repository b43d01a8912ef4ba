"""What the network does to a cluster: no command hangs, and who was away catches up."""

import pytest

from tests.cluster.lab.formation import POOL, Formation

pytestmark = pytest.mark.kvm

# A change asks, hands out and settles; each of them waits for a node that is silent once at most.
MODIFY_S = 60.0
LIST_S = 30.0


def test_a_node_that_is_cut_off_is_named_and_takes_the_change_up_when_it_is_back(
    cluster: Formation,
) -> None:
    away = cluster.lab["node3"]
    with away.cut_off():
        done = cluster.master.kvmsec(
            "cluster", "modify", "--add-uids", "246020", timeout_s=MODIFY_S
        )
        assert "node3" in done.stdout + done.stderr
        assert cluster.pool_of(cluster.lab["node2"]) == "246000-246020"
        assert cluster.pool_of(away) == POOL
        assert "node3" in [one["node"] for one in cluster.errors()]
    cluster.wait_for_pool("246000-246020")
    cluster.master.kvmsec("cluster", "modify", "--remove-uids", "246020")


def test_an_order_to_a_node_that_missed_a_change_hands_it_the_change_first(
    cluster: Formation,
) -> None:
    away = cluster.lab["node4"]
    with away.cut_off():
        cluster.master.kvmsec("cluster", "modify", "--add-uids", "246020", timeout_s=MODIFY_S)

    cluster.start("web", away)

    assert cluster.pool_of(away) == "246000-246020"
    cluster.master.kvmsec("instance", "stop", "web", "--node", "node4", "--force")
    cluster.master.kvmsec("cluster", "modify", "--remove-uids", "246020")


def test_a_paused_node_holds_up_no_list_and_no_change(cluster: Formation) -> None:
    paused = cluster.lab["node5"]
    with paused.paused():
        listed = cluster.master.kvmsec("instance", "list", "--all-nodes", timeout_s=LIST_S)
        assert "node5" in listed.stdout + listed.stderr
        done = cluster.master.kvmsec(
            "cluster", "modify", "--add-uids", "246020", timeout_s=MODIFY_S
        )
        assert "node5" in done.stdout + done.stderr
    cluster.wait_for_pool("246000-246020")
    cluster.master.kvmsec("cluster", "modify", "--remove-uids", "246020")


def test_lost_packets_cost_time_and_nothing_else(cluster: Formation) -> None:
    lossy = cluster.lab["node2"]
    with lossy.losing(15):
        cluster.master.kvmsec("cluster", "modify", "--add-uids", "246020", timeout_s=MODIFY_S)
        cluster.master.kvmsec("instance", "list", "--all-nodes", timeout_s=LIST_S)
    cluster.wait_for_pool("246000-246020")
    cluster.master.kvmsec("cluster", "modify", "--remove-uids", "246020")
    cluster.wait_for_pool(POOL)


def test_uids_drain_until_the_node_that_is_away_has_said_that_it_has_no_holder(
    cluster: Formation,
) -> None:
    away = cluster.lab["node3"]
    cluster.start("web", away)
    [web] = away.json("instance", "list")
    with away.cut_off():
        drained = ("cluster", "modify", "--remove-uids", str(web["uid"]), "--drain")
        cluster.master.kvmsec(*drained, timeout_s=MODIFY_S)
        assert cluster.master.json("cluster", "info")["draining_uids"] == str(web["uid"])
        assert cluster.pool_of(away) == POOL
    cluster.master.kvmsec("cluster", "sync")
    assert cluster.master.json("cluster", "info")["draining_uids"] == str(web["uid"])

    cluster.master.kvmsec("instance", "stop", "web", "--node", "node3", "--force")
    cluster.master.kvmsec("cluster", "sync")
    assert cluster.master.json("cluster", "info")["draining_uids"] == ""
    cluster.master.kvmsec("cluster", "modify", "--add-uids", str(web["uid"]))
    cluster.wait_for_pool(POOL)
