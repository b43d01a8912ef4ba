"""A node's daemon that dies: its instances live on, and are found again."""

import pytest

from tests.cluster.lab.formation import POOL, Formation
from tests.cluster.lab.node import Node

pytestmark = pytest.mark.kvm


def test_instances_live_on_through_the_daemon_s_end_and_are_found_again(
    cluster: Formation,
) -> None:
    node = cluster.lab["node2"]
    cluster.start("web", node)
    [before] = node.json("instance", "list")

    cluster.kill_daemon(node)
    listed = cluster.master.kvmsec("instance", "list", "--all-nodes")
    assert "node2" in listed.stdout + listed.stderr
    cluster.serve(node)

    [after] = cluster.master.json("instance", "list", "--all-nodes")
    assert (after["pid"], after["uid"], after["state"]) == (
        before["pid"],
        before["uid"],
        "running",
    )
    assert "1 running instances found" in cluster.daemons["node2"].said
    cluster.master.kvmsec("instance", "stop", "web", "--node", "node2", "--force")


def test_an_instance_that_died_without_a_daemon_is_told_and_cleaned_up(cluster: Formation) -> None:
    node = cluster.lab["node2"]
    cluster.start("web", node)
    [web] = node.json("instance", "list")

    cluster.kill_daemon(node)
    node.run("sh", "-c", f"kill -9 {web['pid']}")
    daemon = cluster.serve(node)

    cluster.wait_until(lambda: "instance web crashed" in daemon.said)
    cluster.wait_until(
        lambda: [one for one in node.json("uids", "list") if one["state"] == "leased"] == []
    )


def test_a_front_that_is_killed_is_replaced(cluster: Formation) -> None:
    node = cluster.lab["node2"]
    front = _fronts(node)
    node.run("sh", "-c", f"kill -9 {' '.join(front)}")

    cluster.wait_until(lambda: _reached(cluster))
    assert not set(front) & set(_fronts(node))


def _fronts(node: Node) -> list[str]:
    """The pids of what runs as the front's user."""
    show = "for one in /proc/[0-9]*; do stat -c '%U %n' $one; done"
    words = [line.split() for line in node.run("sh", "-c", show, status=None).stdout.splitlines()]
    return [path.removeprefix("/proc/") for user, path in words if user == "kvmsec-front"]


def _reached(cluster: Formation) -> bool:
    return bool(cluster.master.json("node", "info", "node2")["answer"] == "yes")


def test_a_node_that_is_switched_off_and_on_is_a_member_as_before(cluster: Formation) -> None:
    node = cluster.lab["node4"]
    cluster.start("web", node)
    cluster.daemons.pop(node.name)
    node.reboot()
    with node.cut_off():  # Nobody orders it to put its rules in force.
        cluster.serve(node)
        assert cluster.pool_of(node) == POOL

    assert node.json("uids", "list") == []
    cluster.start("web", node)
    cluster.master.kvmsec("instance", "stop", "web", "--node", "node4", "--force")
