"""modify, over a real store and nodes that answer as they are told."""

import asyncio
import errno
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from attrs import evolve

from kvmsec.cluster import operations
from kvmsec.cluster.nodes import Alone
from kvmsec.errors import (
    ChangeRefused,
    NoCluster,
    PoolRefused,
    UidsInUse,
)
from kvmsec.linux.errors import Fault
from kvmsec.model.security import SecurityModel
from tests.unit.kvmsec.fake_node import (
    POOL,
    FakeNode,
    init,
    modify,
    node,
    ranges,
    standing,
    store,
)
from uidpool.ranges import EMPTY

__all__ = ["node", "store"]


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
    settled = asyncio.run(operations.settle(node.store, Alone(node))).cluster
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


def test_what_fails_while_a_change_is_taken_back_does_not_hide_why_it_was(
    node: FakeNode, monkeypatch: pytest.MonkeyPatch
) -> None:
    init(node)
    save, saved = node.store.save, []

    def save_once(*arguments: Any) -> int:
        if saved:
            raise OSError(errno.EIO, "Input/output error")
        saved.append(arguments)
        return save(*arguments)

    node.refuse_rules = True
    monkeypatch.setattr(node.store, "save", save_once)
    with pytest.raises(Fault, match="no packet filter") as caught:
        modify(node, add=ranges("2000"))
    assert "Input/output error" in caught.value.__notes__[0]


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
from kvmsec.cluster.nodes import Alone
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
    asyncio.run(modify(FileStore(Path(sys.argv[1])), Alone(Node()), change))
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
