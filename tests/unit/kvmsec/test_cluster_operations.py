"""init, info and destroy, over a real store and nodes that answer as they are told."""

import json
from pathlib import Path

import pytest

from kvmsec.cluster import operations
from kvmsec.errors import (
    ClusterExists,
    InstancesRun,
    NoCluster,
    PoolRefused,
    StoreNotWritten,
    StoreUnreadable,
    UidsInUse,
)
from kvmsec.linux.errors import Fault
from tests.unit.kvmsec.fake_node import (
    POOL,
    FakeNode,
    destroy,
    init,
    modify,
    node,
    ranges,
    store,
)

__all__ = ["node", "store"]


# init ----------------------------------------------------------------------------------------


def test_init_makes_a_cluster_and_puts_its_rules_in_force(node: FakeNode) -> None:
    cluster = init(node)

    assert node.store.load()[0] == cluster
    assert node.checked == [POOL]
    assert node.rules == POOL


def test_init_twice_is_refused_and_changes_nothing(node: FakeNode) -> None:
    cluster = init(node)

    with pytest.raises(ClusterExists) as caught:
        init(node, ranges("5000"))
    assert caught.value.name == "trial"
    assert node.store.load()[0] == cluster
    assert node.rules == POOL


def test_a_pool_with_unfit_uids_is_refused_with_every_reason(node: FakeNode) -> None:
    node.unfit = ranges("1003-1004")

    with pytest.raises(PoolRefused) as caught:
        init(node)
    assert caught.value.problems == ("uid 1003 has no user", "uid 1004 has no user")
    assert caught.value.hint == "provision it"
    assert node.store.load() == (None, 0)
    assert not node.rules


def test_an_init_whose_rules_are_refused_leaves_no_cluster(node: FakeNode) -> None:
    node.refuse_rules = True

    with pytest.raises(Fault, match="no packet filter"):
        init(node)
    assert node.store.load() == (None, 0)
    assert not node.rules


def test_what_fails_while_an_init_is_taken_back_does_not_hide_why_it_was(
    node: FakeNode, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> None:
        raise StoreNotWritten("cluster.json", "no space left")

    node.refuse_rules = True
    monkeypatch.setattr(node.store, "delete", refuse)
    with pytest.raises(Fault, match="no packet filter") as caught:
        init(node)
    assert "cluster.json can't be written: no space left" in caught.value.__notes__[0]


def test_init_over_an_unreadable_store_is_refused(node: FakeNode, tmp_path: Path) -> None:
    (tmp_path / "cluster.json").write_text("{")
    with pytest.raises(StoreUnreadable):
        init(node)
    assert (tmp_path / "cluster.json").read_text() == "{"


# info ----------------------------------------------------------------------------------------


def test_info_has_the_documented_shape(node: FakeNode) -> None:
    init(node)
    node.held = {1003: "instance web1"}
    modify(node, remove=ranges("1003"), drain=True)
    shown = json.loads(json.dumps(operations.info(node.store)))

    assert shown["name"] == "trial"
    assert shown["uid_pool"] == "1000-1002,1004-1009"
    assert shown["uid_pool_size"] == 9
    assert shown["draining_uids"] == "1003"
    assert shown["security_model"] == "pool"
    assert [one["name"] for one in shown["nodes"]] == ["node1"]
    assert (shown["nodes"][0]["role"], shown["master"]) == ("master", "node1")
    assert shown["created_at"].endswith("+00:00")


def test_info_without_a_cluster_says_so(node: FakeNode) -> None:
    with pytest.raises(NoCluster):
        operations.info(node.store)


# destroy -------------------------------------------------------------------------------------


def test_destroy_leaves_no_state_no_rules_and_no_rest(node: FakeNode, tmp_path: Path) -> None:
    init(node)
    destroy(node)

    assert node.store.load() == (None, 0)
    assert not node.rules
    assert node.forgot
    with pytest.raises(NoCluster):
        destroy(node)
    init(node)


def test_destroy_is_refused_while_instances_run(node: FakeNode) -> None:
    cluster = init(node)
    node.running = ["web2", "web1"]

    with pytest.raises(InstancesRun) as caught:
        destroy(node)
    assert caught.value.names == ("web1", "web2")
    assert node.store.load()[0] == cluster
    assert node.rules == POOL


def test_destroy_is_refused_while_a_uid_is_quarantined(node: FakeNode) -> None:
    cluster = init(node)
    node.held = {1003: "quarantined: a process is left"}

    with pytest.raises(UidsInUse) as caught:
        destroy(node)
    assert "uids release" in (caught.value.hint or "")
    assert node.store.load()[0] == cluster


def test_a_start_that_slipped_in_before_the_end_keeps_the_cluster(node: FakeNode) -> None:
    cluster = init(node)

    def start_late() -> None:
        if node.store.load()[0] is None:
            node.held = {1003: "instance web1"}

    node.before_held = start_late
    with pytest.raises(UidsInUse):
        destroy(node)
    assert node.store.load()[0] == cluster
    assert node.rules == POOL
