"""A change of the pool over several nodes: all take it or none, and no silent node holds it up."""

import asyncio
import itertools
from collections.abc import Callable
from typing import Any

import pytest
from attrs import evolve

from kvmsec.cluster import handing, operations
from kvmsec.errors import MembersLeft, NotMaster, PoolRefused, UidsInUse
from kvmsec.linux.errors import Fault
from kvmsec.rpc.messages import State
from tests.unit.kvmsec.cluster.killing import was_killed_at
from tests.unit.kvmsec.fake_node import POOL, FakeCluster, FakeNode, Silence, cluster, ranges
from uidpool.ranges import UidRanges

AFTER = UidRanges.parse("1000-1002,1005-1009,1020")

__all__ = ["cluster"]


def test_a_change_reaches_every_node(cluster: FakeCluster) -> None:
    done = cluster.modify(add=ranges("1020"), remove=ranges("1003"))

    assert not done.silent
    assert str(cluster.require_converged().uid_pool) == "1000-1002,1004-1009,1020"
    assert not done.cluster.draining


def test_every_nodes_reasons_are_told_and_nothing_changes(cluster: FakeCluster) -> None:
    before = cluster.require_converged()
    cluster.nodes["node1"].unfit = ranges("1020")
    cluster.nodes["node3"].unfit = ranges("1020-1021")

    with pytest.raises(PoolRefused) as caught:
        cluster.modify(add=ranges("1020-1022"))
    assert caught.value.by_node == {
        "node1": ["uid 1020 has no user"],
        "node3": ["uid 1020 has no user", "uid 1021 has no user"],
    }
    assert "node3: uid 1021 has no user" in caught.value.problems
    assert cluster.require_converged() == before


def test_the_state_is_made_once_for_all_nodes_it_is_handed_to(
    cluster: FakeCluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    made: list[int] = []
    make = handing.state_of

    def counted(state: Any, revision: int) -> State:
        made.append(revision)
        return make(state, revision)

    monkeypatch.setattr(handing, "state_of", counted)
    cluster.modify(add=ranges("1020"))

    assert len(made) == 1  # Who has it when all is settled is not sent it once more.
    assert cluster.require_converged().uid_pool == ranges("1000-1009,1020")


def test_every_node_is_asked_at_once(cluster: FakeCluster) -> None:
    asked: list[str] = []
    for node in cluster.nodes.values():
        node.before = lambda call, name=node.name: asked.append(f"{name} {call}")  # type: ignore[misc]
    cluster.modify(add=ranges("1020"))

    assert sorted(asked[:3]) == [f"node{number} check_pool" for number in (1, 2, 3)]


def test_a_uid_that_a_node_holds_cannot_leave_and_the_node_is_named(cluster: FakeCluster) -> None:
    before = cluster.require_converged()
    cluster.nodes["node2"].held = {1003: "instance web1"}
    cluster.nodes["node3"].held = {1003: "instance db", 1005: "instance web2"}

    with pytest.raises(UidsInUse) as caught:
        cluster.modify(remove=ranges("1003"))
    assert caught.value.holders == {1003: "node2: instance web1, node3: instance db"}
    assert cluster.require_converged() == before


def test_a_uid_drains_until_every_node_has_said_that_it_is_free(cluster: FakeCluster) -> None:
    second, third = cluster.nodes["node2"], cluster.nodes["node3"]
    second.held = third.held = {1003: "instance web1"}
    assert str(cluster.modify(remove=ranges("1003"), drain=True).cluster.draining) == "1003"

    second.held = {}
    assert str(cluster.settle().cluster.draining) == "1003"
    third.held, third.is_silent = {}, True
    done = cluster.settle()
    assert str(done.cluster.draining) == "1003"
    assert set(done.silent) == {"node3"}
    third.is_silent = False
    assert not cluster.settle().cluster.draining
    assert not cluster.require_converged().draining


def test_a_start_that_slipped_in_on_another_node_has_the_change_taken_back(
    cluster: FakeCluster,
) -> None:
    before = cluster.require_converged()
    second = cluster.nodes["node2"]

    def draw_late() -> None:
        standing, _ = second.store.load()
        if standing is not None and standing.draining:
            second.held = {1003: "instance web1"}

    second.before_held = draw_late
    with pytest.raises(UidsInUse, match="node2: instance web1"):
        cluster.modify(remove=ranges("1003"), add=ranges("1020"))
    assert cluster.require_converged() == before


# Silent nodes --------------------------------------------------------------------------------


def test_a_silent_node_is_named_and_catches_up_later(cluster: FakeCluster) -> None:
    third = cluster.nodes["node3"]
    third.is_silent = True
    done = cluster.modify(add=ranges("1020"), remove=ranges("1003"))

    assert done.silent == {"node3": "node3 can't be reached"}
    assert str(done.cluster.draining) == "1003"
    assert str(cluster.nodes["node2"].rules) == "1000-1009,1020"
    assert third.rules == POOL

    third.is_silent = False
    member = done.cluster.named("node3")
    assert member is not None
    revision = asyncio.run(handing.catch_up(cluster.store, cluster, member))
    assert revision == cluster.store.load()[1]
    assert str(cluster.require_converged().draining) == "1003"
    assert not cluster.settle().cluster.draining


@pytest.mark.parametrize("call", ["check_pool", "put_state", "held_uids", "sync_rules"])
def test_a_node_that_falls_silent_in_any_phase_holds_nothing_up(
    cluster: FakeCluster, call: str
) -> None:
    third = cluster.nodes["node3"]

    def fall_silent(what: str) -> None:
        if what == call:
            third.is_silent = True

    third.before = fall_silent
    done = cluster.modify(add=ranges("1020"), remove=ranges("1003"))
    assert set(done.silent) == {"node3"}
    assert str(done.cluster.uid_pool) == "1000-1002,1004-1009,1020"

    third.is_silent, third.before = False, lambda what: None
    cluster.settle()
    assert not cluster.require_converged().draining


def test_a_silent_node_is_asked_once_only(cluster: FakeCluster) -> None:
    third = cluster.nodes["node3"]
    third.is_silent = True
    calls: list[str] = []
    third.before = calls.append
    cluster.modify(add=ranges("1020"), remove=ranges("1003"))

    assert calls == ["check_pool"]


# Refusals ------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["node1", "node2"])
def test_a_node_whose_rules_are_refused_has_the_change_taken_back_on_all(
    cluster: FakeCluster, name: str
) -> None:
    before = cluster.require_converged()
    cluster.nodes[name].refuse_rules = True

    with pytest.raises(Fault, match="no packet filter"):
        cluster.modify(add=ranges("1020"), remove=ranges("1003"))
    assert cluster.require_converged() == before


def test_a_node_that_refuses_its_copy_has_the_change_taken_back_on_all(
    cluster: FakeCluster,
) -> None:
    before = cluster.require_converged()
    second = cluster.nodes["node2"]
    second.refuse_state = True

    with pytest.raises(Fault, match="node2: the disk is full") as caught:
        cluster.modify(add=ranges("1020"))
    assert "could not be taken back wholly" in caught.value.__notes__[-1]
    assert cluster.store.load()[0] == before
    assert cluster.nodes["node3"].store.load()[0] == before
    assert cluster.nodes["node3"].rules == POOL

    second.refuse_state = False
    cluster.settle()
    assert cluster.require_converged() == before


def test_a_node_that_is_not_the_master_is_told_where_to_go(cluster: FakeCluster) -> None:
    cluster.here_name = "node2"
    for act in (lambda: cluster.modify(add=ranges("1020")), cluster.settle):
        with pytest.raises(NotMaster, match="node1 is"):
            act()
    with pytest.raises(NotMaster):
        asyncio.run(operations.destroy(cluster.store, cluster.here))


def test_a_cluster_does_not_end_under_its_members(cluster: FakeCluster) -> None:
    with pytest.raises(MembersLeft) as caught:
        asyncio.run(operations.destroy(cluster.store, cluster.here))
    assert caught.value.names == ("node2", "node3")
    cluster.require_converged()


# Rivals --------------------------------------------------------------------------------------


def test_a_rivals_newer_state_on_a_node_is_no_refusal(cluster: FakeCluster) -> None:
    third, once = cluster.nodes["node3"], [True]

    def rival(call: str) -> None:
        if call == "put_state" and once:
            once.clear()
            standing, revision = cluster.store.load()
            assert standing is not None
            wider = evolve(standing, uid_pool=standing.uid_pool | ranges("1030"))
            revision = cluster.store.save(wider, revision)
            third.store.put_copy(**copy_of(cluster), at=wider.created_at)

    third.before = rival
    cluster.modify(add=ranges("1020"))
    assert str(cluster.require_converged().uid_pool) == "1000-1009,1020,1030"


def copy_of(cluster: FakeCluster) -> dict[str, Any]:
    standing, revision = cluster.store.load()
    assert standing is not None
    state = handing.state_of(standing, revision)
    return {"document": state.document, "version": state.format, "revision": state.revision}


def test_two_changes_at_once_both_come_about(cluster: FakeCluster) -> None:
    async def both() -> None:
        for name, node in cluster.nodes.items():
            cluster.nodes[name] = SlowNode(node.store, name, rules=node.rules)
        await asyncio.gather(
            operations.modify(cluster.store, cluster, operations.Change(add=ranges("1020"))),
            operations.modify(
                cluster.store,
                cluster,
                operations.Change(add=ranges("1030"), remove=ranges("1003")),
            ),
        )

    asyncio.run(both())
    cluster.settle()
    assert str(cluster.require_converged().uid_pool) == "1000-1002,1004-1009,1020,1030"


class SlowNode(FakeNode):
    """Lets others run in each call, so that rivals meet."""

    async def check_pool(self, uids: UidRanges) -> Any:
        await asyncio.sleep(0)
        return await FakeNode.check_pool(self, uids)

    async def held_uids(self) -> dict[int, str]:
        await asyncio.sleep(0)
        return await FakeNode.held_uids(self)

    async def put_state(self, state: State) -> int:
        await asyncio.sleep(0)
        return await FakeNode.put_state(self, state)

    async def sync_rules(self) -> None:
        await asyncio.sleep(0)
        await FakeNode.sync_rules(self)


# Killed --------------------------------------------------------------------------------------


def modify_with(cluster: FakeCluster, moment: Callable[[str], None]) -> None:
    for node in cluster.nodes.values():
        node.before = moment
    cluster.modify(uid_pool=AFTER, drain=True, on_step=moment)


def test_killed_at_any_moment_and_run_again_the_cluster_converges(
    cluster: FakeCluster,
) -> None:
    for moment in itertools.count():
        killed = was_killed_at(moment, lambda moment_: modify_with(cluster, moment_))
        cluster.modify(uid_pool=AFTER, drain=True)
        assert str(cluster.require_converged().uid_pool) == str(AFTER)
        if not killed:
            break
        cluster.modify(uid_pool=POOL)
    assert moment > 12


def test_killed_at_any_moment_the_next_settling_finishes_or_never_begins_it(
    cluster: FakeCluster,
) -> None:
    for moment in itertools.count():
        killed = was_killed_at(moment, lambda moment_: modify_with(cluster, moment_))
        cluster.settle()
        standing = cluster.require_converged()
        assert str(standing.uid_pool) in (str(POOL), str(AFTER))
        assert not standing.draining
        if not killed:
            break
        cluster.modify(uid_pool=POOL)


@pytest.mark.parametrize("step", ["ask", "save", "hand out", "settle"])
def test_a_failure_at_any_step_leaves_the_cluster_as_it_was(
    cluster: FakeCluster, step: str
) -> None:
    before = cluster.require_converged()

    def fail(name: str) -> None:
        if name == step:
            raise Silence("the power is gone")

    with pytest.raises(Fault, match="power"):
        cluster.modify(add=ranges("1020"), remove=ranges("1003"), on_step=fail)
    assert cluster.require_converged() == before
