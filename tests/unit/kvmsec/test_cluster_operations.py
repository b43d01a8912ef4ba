"""init, modify, info and destroy, over a real store and nodes that answer as they are told."""

import asyncio
import json
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
from attrs import define, evolve, field

from kvmsec.cluster import operations
from kvmsec.cluster.changes import Change
from kvmsec.errors import (
    ChangeRefused,
    ClusterExists,
    InstancesRun,
    NoCluster,
    PoolRefused,
    StoreUnreadable,
    UidsInUse,
)
from kvmsec.linux.errors import Fault
from kvmsec.model.cluster import Cluster
from kvmsec.model.security import SecurityModel
from kvmsec.store import Store
from kvmsec.store.file import FileStore
from uidpool.ranges import EMPTY, UidRanges

POOL = UidRanges.parse("1000-1009")


@define
class Unfit:
    message: str
    hint: str | None = "provision it"


@define
class FakeNode:
    """A node whose rules are what the store said when they were last brought up to date."""

    store: Store
    name: str = "node1"
    held: dict[int, str] = field(factory=dict)
    running: list[str] = field(factory=list)
    unfit: UidRanges = EMPTY
    rules: UidRanges = EMPTY
    forgot: bool = False
    before_held: Callable[[], None] | None = None
    refuse_rules: bool = False
    checked: list[UidRanges] = field(factory=list)

    async def check_pool(self, uids: UidRanges) -> Sequence[Unfit]:
        self.checked.append(uids)
        return [Unfit(f"uid {uid} has no user") for uid in uids & self.unfit]

    async def held_uids(self) -> dict[int, str]:
        if self.before_held is not None:
            self.before_held()
        return dict(self.held)

    async def running_instances(self) -> list[str]:
        return list(self.running)

    async def sync_rules(self) -> None:
        if self.refuse_rules:
            self.refuse_rules = False
            raise Fault("no packet filter")
        cluster, _ = self.store.load()
        self.rules = cluster.guarded_uids if cluster is not None else EMPTY

    async def forget_resting(self) -> None:
        self.forgot = True


@pytest.fixture
def store(tmp_path: Path) -> FileStore:
    return FileStore(tmp_path / "cluster.json")


@pytest.fixture
def node(store: FileStore) -> FakeNode:
    return FakeNode(store)


def init(node: FakeNode, pool: UidRanges = POOL, **more: Any) -> Cluster:
    return asyncio.run(operations.init(node.store, node, "trial", uid_pool=pool, **more))


def modify(node: FakeNode, **change: Any) -> Cluster:
    return asyncio.run(operations.modify(node.store, [node], Change(**change)))


def destroy(node: FakeNode) -> None:
    asyncio.run(operations.destroy(node.store, [node]))


def standing(node: FakeNode) -> Cluster:
    cluster, _ = node.store.load()
    assert cluster is not None
    return cluster


def ranges(text: str) -> UidRanges:
    return UidRanges.parse(text)


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


def test_init_over_an_unreadable_store_is_refused(node: FakeNode, tmp_path: Path) -> None:
    (tmp_path / "cluster.json").write_text("{")
    with pytest.raises(StoreUnreadable):
        init(node)
    assert (tmp_path / "cluster.json").read_text() == "{"


# modify --------------------------------------------------------------------------------------


def test_modify_without_a_cluster_says_what_to_do_first(node: FakeNode) -> None:
    with pytest.raises(NoCluster, match="no cluster") as caught:
        modify(node, add=ranges("1"))
    assert "init" in (caught.value.hint or "")


def test_the_pool_is_set_added_to_and_removed_from(node: FakeNode) -> None:
    init(node)

    assert str(modify(node, add=ranges("1020")).uid_pool) == "1000-1009,1020"
    assert str(modify(node, remove=ranges("1003")).uid_pool) == "1000-1002,1004-1009,1020"
    assert str(modify(node, uid_pool=ranges("1100-1110")).uid_pool) == "1100-1110"
    assert node.rules == ranges("1100-1110")
    assert not standing(node).draining


def test_only_uids_that_are_new_are_asked_about_when_some_are_added(node: FakeNode) -> None:
    init(node)
    node.unfit = ranges("1003")  # its user was lost meanwhile, which is for `verify` to say

    modify(node, add=ranges("1020"))
    assert node.checked[-1] == ranges("1020")
    with pytest.raises(PoolRefused):
        modify(node, uid_pool=POOL)


def test_a_held_uid_cannot_leave_and_its_holder_is_named(node: FakeNode) -> None:
    cluster = init(node)
    node.held = {1003: "instance web1", 1005: "quarantined: a process is left"}

    with pytest.raises(UidsInUse) as caught:
        modify(node, remove=ranges("1003-1006"))
    assert caught.value.holders == node.held
    assert "instance web1" in caught.value.message
    assert "--drain" in (caught.value.hint or "")
    assert node.store.load()[0] == cluster
    assert node.rules == POOL


def test_a_held_uid_may_drain_and_keeps_its_rules_until_it_is_free(node: FakeNode) -> None:
    init(node)
    node.held = {1003: "instance web1"}

    cluster = modify(node, remove=ranges("1003-1004"), drain=True)
    assert str(cluster.uid_pool) == "1000-1002,1005-1009"
    assert str(cluster.draining) == "1003"
    assert node.rules == ranges("1000-1003,1005-1009")

    node.held = {}
    settled = asyncio.run(operations.settle(node.store, [node]))
    assert not settled.draining
    assert node.rules == ranges("1000-1002,1005-1009")


def test_a_start_that_slipped_in_between_is_seen_and_the_change_taken_back(
    node: FakeNode,
) -> None:
    before = init(node)

    def draw_late() -> None:
        cluster, _ = node.store.load()
        if cluster is not None and cluster.draining:
            node.held = {1003: "instance web1"}

    node.before_held = draw_late
    with pytest.raises(UidsInUse):
        modify(node, remove=ranges("1003"), add=ranges("1020"))
    assert node.store.load()[0] == before
    assert node.rules == POOL


def test_a_change_whose_rules_are_refused_is_taken_back(node: FakeNode) -> None:
    before = init(node)
    node.refuse_rules = True

    with pytest.raises(Fault, match="no packet filter"):
        modify(node, add=ranges("1020"), remove=ranges("1003"))
    assert node.store.load()[0] == before
    assert node.rules == POOL


def test_what_a_killed_modify_left_draining_is_finished_by_the_next(node: FakeNode) -> None:
    before = init(node)
    _, revision = node.store.load()
    half_done = evolve(before, uid_pool=ranges("1000-1008"), draining=ranges("1009"))
    node.store.save(half_done, revision)

    assert not modify(node, add=ranges("1020")).draining
    assert node.rules == ranges("1000-1008,1020")


def test_an_unfit_added_uid_changes_nothing(node: FakeNode) -> None:
    before = init(node)
    node.unfit = ranges("1020")

    with pytest.raises(PoolRefused):
        modify(node, add=ranges("1020-1021"))
    assert node.store.load()[0] == before


def test_the_security_model_can_be_chosen(node: FakeNode) -> None:
    init(node, EMPTY)
    with pytest.raises(ChangeRefused):
        modify(node, security_model=SecurityModel.POOL)
    assert modify(node, security_model=SecurityModel.USER).default_model is SecurityModel.USER


def test_a_rivals_change_in_between_is_kept(node: FakeNode) -> None:
    init(node)
    once = [True]

    def modify_in_between() -> None:
        if once:
            once.clear()
            cluster, revision = node.store.load()
            assert cluster is not None
            node.store.save(evolve(cluster, uid_pool=cluster.uid_pool | ranges("1030")), revision)

    node.before_held = modify_in_between
    modify(node, remove=ranges("1003"), add=ranges("1020"))
    assert str(standing(node).uid_pool) == "1000-1002,1004-1009,1020,1030"


MODIFIER = """
import asyncio, sys
from pathlib import Path
from kvmsec.cluster.changes import Change
from kvmsec.cluster.operations import modify
from kvmsec.store.file import FileStore
from uidpool.ranges import UidRanges

class Node:
    name = "node1"
    async def check_pool(self, uids): return ()
    async def held_uids(self): return {}
    async def sync_rules(self): pass

for uid in sys.argv[2:]:
    change = Change(add=UidRanges.parse(uid), remove=UidRanges.parse(str(int(uid) - 1000)))
    asyncio.run(modify(FileStore(Path(sys.argv[1])), [Node()], change))
"""


def test_two_processes_that_modify_at_once_both_get_their_way(
    node: FakeNode, tmp_path: Path
) -> None:
    init(node, ranges("1000-1039"))
    shares = [range(2000, 2020), range(2020, 2040)]
    rivals = [
        subprocess.Popen(
            [sys.executable, "-c", MODIFIER, str(tmp_path / "cluster.json"), *map(str, share)]
        )
        for share in shares
    ]

    assert [rival.wait(60) for rival in rivals] == [0, 0]
    cluster, _ = node.store.load()
    assert cluster is not None
    assert str(cluster.uid_pool) == "2000-2039"
    assert not cluster.draining


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
    assert shown["nodes"] == [{"name": "node1"}]
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


# several nodes -------------------------------------------------------------------------------


def test_every_node_is_asked_and_named(store: FileStore) -> None:
    first, second = FakeNode(store, "node1"), FakeNode(store, "node2")
    init(first)
    second.held = {1003: "instance web1"}
    second.unfit = ranges("1020")
    nodes = [first, second]

    with pytest.raises(UidsInUse) as held:
        asyncio.run(operations.modify(store, nodes, Change(remove=ranges("1003"))))
    assert held.value.holders == {1003: "node2: instance web1"}
    with pytest.raises(PoolRefused) as refused:
        asyncio.run(operations.modify(store, nodes, Change(add=ranges("1020"))))
    assert refused.value.problems == ("node2: uid 1020 has no user",)
    asyncio.run(operations.modify(store, nodes, Change(add=ranges("1021"))))
    assert first.rules == second.rules == POOL | ranges("1021")
