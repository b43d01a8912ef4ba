"""A master's daemon keeps a courier, which has the node's key: it goes with the cluster."""

import time
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.root.daemon.cluster_of_two import DEADLINE_S, is_there
from tests.root.daemon.node_by_command import Node

pytestmark = pytest.mark.root


def couriers(node: Node) -> list[int]:
    """The couriers of a node's daemon."""
    assert node.daemon is not None
    pid = node.daemon.process.pid
    children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    return [int(child) for child in children if is_courier(int(child))]


def is_courier(pid: int) -> bool:
    try:
        return b"kvmsec-courier" in Path(f"/proc/{pid}/cmdline").read_bytes()
    except OSError:
        return False


def the_courier(node: Node) -> int:
    deadline = time.monotonic() + DEADLINE_S
    while not (found := couriers(node)):
        assert time.monotonic() < deadline
        time.sleep(0.02)
    (pid,) = found
    return pid


@pytest.fixture
def other(master: Node, bring_in: Callable[[str], Node]) -> Node:
    """A member beside the master, whose daemon has called it."""
    other = bring_in("node2")
    assert master.daemon is not None
    master.daemon.end()
    master.serve()  # It calls all members first of all.
    master.daemon.says("serving other nodes")
    return other


def test_it_goes_with_a_cluster_that_is_destroyed(master: Node, other: Node) -> None:
    courier = the_courier(master)
    master.do("node", "remove", "node2")
    assert is_there(courier)

    master.do("cluster", "destroy", "--yes")
    assert not is_there(courier)
    assert couriers(master) == []


def test_it_goes_with_an_old_master_that_is_removed(master: Node, other: Node) -> None:
    courier = the_courier(master)
    name = master.state()["master"]
    master.do("node", "promote", "node2")
    other.do("cluster", "master-failover", "--force")
    assert is_there(courier)

    other.do("node", "remove", name)
    assert not master.has("client.pem")
    assert not is_there(courier)
    assert couriers(master) == []


def test_it_goes_where_the_files_are_taken_away_without_a_word(master: Node, other: Node) -> None:
    courier = the_courier(master)
    for path in (master.root / "var/lib/kvmsec").glob("*.pem"):
        path.unlink()
    deadline = time.monotonic() + DEADLINE_S
    while is_there(courier):
        assert time.monotonic() < deadline
        time.sleep(0.05)
