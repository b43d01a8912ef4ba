"""Who belongs to a cluster, and as what: over real stores, and killed at every moment."""

import asyncio
import itertools
from collections.abc import Callable
from typing import Any

import pytest
from attrs import evolve

from kvmsec.cluster.members.joining import add, readd
from kvmsec.cluster.members.leaving import remove
from kvmsec.cluster.members.master import Changed
from kvmsec.cluster.members.roles import demote, promote
from kvmsec.cluster.renewal.errors import RenewalPending
from kvmsec.errors import (
    InstancesRun,
    MemberRefused,
    NodeSilent,
    NotMaster,
    UnknownMember,
)
from kvmsec.linux.errors import Fault
from kvmsec.model.cluster import Cluster, Member, Role
from tests.unit.kvmsec.cluster.killing import was_killed_at
from tests.unit.kvmsec.fake_node import FakeCluster, cluster, ranges

__all__ = ["cluster"]


def do(cluster: FakeCluster, act: Any, *given: Any, **more: Any) -> Changed:
    on_step = more.pop("on_step", lambda step: None)
    changed: Changed = asyncio.run(act(cluster.master(on_step), *given, **more))
    return changed


def standing(cluster: FakeCluster) -> Cluster:
    found, _ = cluster.store.load()
    assert found is not None
    return found


def member(cluster: FakeCluster, name: str) -> Member:
    found = standing(cluster).named(name)
    assert found is not None
    return found


def watched(cluster: FakeCluster, moment: Callable[[str], None]) -> None:
    for node in cluster.nodes.values():
        node.before = moment


# add -----------------------------------------------------------------------------------------


def test_an_invited_node_becomes_a_plain_member(cluster: FakeCluster) -> None:
    cluster.make("node4")
    cluster.invitations.invite("node4")
    changed = do(cluster, add, "192.0.2.4", port=7)

    joined = member(cluster, "node4")
    assert changed.member == joined
    assert (joined.address, joined.port, joined.role) == ("192.0.2.4", 7, Role.PLAIN)
    assert len(joined.certificates) == 1
    assert not cluster.invitations.current()
    assert joined in cluster.require_converged().nodes


def test_who_is_not_invited_cannot_be_added(cluster: FakeCluster) -> None:
    cluster.make("node4")
    with pytest.raises(MemberRefused, match="no node is invited") as caught:
        do(cluster, add, "node4")
    assert "node invite" in (caught.value.hint or "")
    with pytest.raises(MemberRefused, match="not invited"):
        do(cluster, add, "192.0.2.4", name="node4")


def test_which_invitation_is_meant_must_be_clear(cluster: FakeCluster) -> None:
    for name in ("node4", "node5"):
        cluster.make(name)
        cluster.invitations.invite(name)

    with pytest.raises(MemberRefused, match="node4, node5"):
        do(cluster, add, "192.0.2.4")
    assert do(cluster, add, "node5").member.name == "node5"
    assert do(cluster, add, "192.0.2.4").member.name == "node4"


def test_a_node_that_does_not_answer_changes_nothing(cluster: FakeCluster) -> None:
    before = standing(cluster)
    cluster.make("node4").is_silent = True
    cluster.invitations.invite("node4")

    with pytest.raises(Fault, match="node4"):
        do(cluster, add, "node4")
    assert standing(cluster) == before
    assert cluster.invitations.is_current("node4")


def test_a_node_that_refuses_its_admission_is_no_member(cluster: FakeCluster) -> None:
    before = standing(cluster)
    cluster.make("node4").refuse_state = True
    cluster.invitations.invite("node4")

    with pytest.raises(Fault, match="disk is full"):
        do(cluster, add, "node4")
    assert standing(cluster) == before


def test_what_keeps_the_pool_from_a_new_node_is_told(cluster: FakeCluster) -> None:
    cluster.make("node4").unfit = ranges("1003")
    cluster.invitations.invite("node4")

    assert do(cluster, add, "node4").notes == ["node4: uid 1003 has no user (provision it)"]


def test_an_add_that_was_killed_past_its_invitation_is_finished_without_one(
    cluster: FakeCluster,
) -> None:
    cluster.make("node4")
    cluster.invitations.invite("node4")
    cluster.nodes["node2"].is_silent = True
    joined = do(cluster, add, "192.0.2.4", name="node4").member
    cluster.nodes["node2"].is_silent = False

    assert do(cluster, add, "192.0.2.4").member == joined
    assert do(cluster, add, "192.0.2.4", name="node4").member == joined
    assert joined in cluster.require_converged().nodes


@pytest.mark.parametrize(
    ("address", "name"), [("192.0.2.4", None), ("192.0.2.4", "node4"), ("192.0.2.5", "node4")]
)
def test_an_add_of_a_silent_member_says_that_it_is_one(
    cluster: FakeCluster, address: str, name: str | None
) -> None:
    joining = cluster.make("node4")
    cluster.invitations.invite("node4")
    do(cluster, add, "192.0.2.4", name="node4")
    joining.is_silent = True

    with pytest.raises(MemberRefused, match="node4 is a member already") as caught:
        do(cluster, add, address, name=name)
    assert "`kvmsec node readd node4`" in (caught.value.hint or "")


def test_a_silent_member_keeps_no_invited_node_from_its_address(cluster: FakeCluster) -> None:
    old = cluster.make("node4")
    cluster.invitations.invite("node4")
    do(cluster, add, "192.0.2.4")
    old.is_silent = True
    cluster.make("node5")
    cluster.invitations.invite("node5")

    assert do(cluster, add, "192.0.2.4").member.name == "node5"


def test_a_spent_invitation_lets_nobody_join_again(cluster: FakeCluster) -> None:
    joining = cluster.make("node4")
    cluster.invitations.invite("node4")
    do(cluster, add, "node4")
    joining.store.leave()

    with pytest.raises(MemberRefused, match="node4 is a member already"):
        do(cluster, add, "node4")
    assert joining.store.load()[0] is None


def test_an_add_killed_at_any_moment_is_finished_by_the_next(cluster: FakeCluster) -> None:
    for moment in itertools.count():
        name = f"new{moment}"
        cluster.make(name)
        cluster.invitations.invite(name)

        def act(at: Callable[[str], None], name: str = name) -> None:
            watched(cluster, at)
            do(cluster, add, name, on_step=at)

        killed = was_killed_at(moment, act)
        if killed:
            do(cluster, add, name)
        else:
            cluster.settle()  # The rules of these nodes are in memory: they were the child's.
        assert not cluster.invitations.current()
        assert cluster.require_converged().named(name) is not None
        if not killed:
            break
        do(cluster, remove, name)
    assert moment > 8


# remove --------------------------------------------------------------------------------------


def test_a_removed_node_forgets_the_cluster_and_is_forgotten(cluster: FakeCluster) -> None:
    changed = do(cluster, remove, "node3")

    assert not changed.behind
    assert cluster.nodes["node3"].store.load() == (None, 0)
    assert not cluster.nodes["node3"].rules
    assert [node.name for node in cluster.require_converged().nodes] == ["node1", "node2"]
    with pytest.raises(UnknownMember):
        do(cluster, remove, "node3")


def test_a_node_that_runs_instances_stays(cluster: FakeCluster) -> None:
    before = standing(cluster)
    cluster.nodes["node2"].running = ["web1"]

    with pytest.raises(InstancesRun, match="web1"):
        do(cluster, remove, "node2")
    assert cluster.require_converged() == before


def test_a_silent_node_is_taken_out_by_force_only(cluster: FakeCluster) -> None:
    before = standing(cluster)
    cluster.nodes["node2"].is_silent = True

    with pytest.raises(NodeSilent) as caught:
        do(cluster, remove, "node2")
    assert "--force" in (caught.value.hint or "")
    assert standing(cluster) == before
    changed = do(cluster, remove, "node2", force=True)
    assert any("node leave" in note for note in changed.notes)
    assert any("renew-crypto" in note for note in changed.notes)
    assert [node.name for node in standing(cluster).nodes] == ["node1", "node3"]


def test_the_master_can_be_neither_removed_nor_demoted(cluster: FakeCluster) -> None:
    for act in (remove, demote):
        with pytest.raises(MemberRefused, match="master") as caught:
            do(cluster, act, "node1")
        assert "master-failover" in (caught.value.hint or "")


def test_a_removal_killed_at_any_moment_is_finished_by_the_next(cluster: FakeCluster) -> None:
    for moment in itertools.count():
        name = f"old{moment}"
        cluster.join(name, Role.CANDIDATE)

        def act(at: Callable[[str], None], name: str = name) -> None:
            watched(cluster, at)
            do(cluster, remove, name, on_step=at)

        killed = was_killed_at(moment, act)
        if standing(cluster).named(name) is not None:
            do(cluster, remove, name)
        cluster.settle()
        assert cluster.require_converged().named(name) is None
        assert cluster.nodes[name].store.load() == (None, 0)
        if not killed:
            break
    assert moment > 8


def test_nobody_takes_the_orders_of_a_node_from_the_moment_that_it_is_being_removed(
    cluster: FakeCluster,
) -> None:
    second = member(cluster, "node2")
    seen: list[bool] = []

    def look(call: str) -> None:
        if call == "leave":
            third, _ = cluster.nodes["node3"].store.load()
            assert third is not None
            seen.append(second.uuid in third.orderers)

    cluster.nodes["node2"].before = look
    do(cluster, remove, "node2")
    assert seen == [False]


# promote and demote --------------------------------------------------------------------------


def test_a_promoted_node_has_the_key_and_is_on_every_list(cluster: FakeCluster) -> None:
    do(cluster, promote, "node3")

    third = member(cluster, "node3")
    assert third.is_candidate
    assert cluster.nodes["node3"].has("server.key")
    assert third.uuid in cluster.require_converged().orderers


def test_a_node_that_does_not_answer_is_not_promoted(cluster: FakeCluster) -> None:
    before = standing(cluster)
    cluster.nodes["node3"].is_silent = True
    with pytest.raises(Fault, match="node3"):
        do(cluster, promote, "node3")
    assert standing(cluster) == before


def test_a_node_without_a_certificate_is_not_promoted(cluster: FakeCluster) -> None:
    found, revision = cluster.store.load()
    assert found is not None
    bare = evolve(found.nodes[2], certificates=())
    cluster.store.save(evolve(found, nodes=(*found.nodes[:2], bare)), revision)
    with pytest.raises(MemberRefused, match="no certificate"):
        do(cluster, promote, "node3")


def test_a_demoted_node_is_on_no_list_and_has_no_key(cluster: FakeCluster) -> None:
    do(cluster, promote, "node3")
    changed = do(cluster, demote, "node3")

    third = member(cluster, "node3")
    assert not third.is_candidate
    assert not cluster.nodes["node3"].has("server.key")
    assert third.uuid not in cluster.require_converged().orderers
    assert any("renew-crypto --new-cluster-certificate" in note for note in changed.notes)


def test_a_demotion_that_a_node_does_not_hear_of_is_told(cluster: FakeCluster) -> None:
    cluster.nodes["node3"].is_silent = True
    changed = do(cluster, demote, "node2")

    assert set(changed.behind) == {"node3"}
    assert any("still take its orders: node3" in note for note in changed.notes)


def test_a_silent_node_is_demoted_and_its_key_is_told_of(cluster: FakeCluster) -> None:
    do(cluster, promote, "node3")
    cluster.nodes["node3"].is_silent = True
    changed = do(cluster, demote, "node3")

    assert not member(cluster, "node3").is_candidate
    assert any("by hand" in note for note in changed.notes)


@pytest.mark.parametrize(("act", "is_candidate"), [(promote, True), (demote, False)])
def test_a_change_of_role_killed_at_any_moment_is_finished_by_the_next(
    cluster: FakeCluster, act: Any, is_candidate: bool
) -> None:
    other = demote if act is promote else promote
    for moment in itertools.count():
        do(cluster, other, "node3")

        def run(at: Callable[[str], None]) -> None:
            watched(cluster, at)
            do(cluster, act, "node3", on_step=at)

        killed = was_killed_at(moment, run)
        watched(cluster, lambda call: None)
        do(cluster, act, "node3")
        assert cluster.nodes["node3"].has("server.key") is is_candidate
        cluster.require_converged()
        assert member(cluster, "node3").is_candidate is is_candidate
        if not killed:
            break
    assert moment > 6


# readd ---------------------------------------------------------------------------------------


def test_a_member_that_answers_gets_everything_again(cluster: FakeCluster) -> None:
    second = cluster.nodes["node2"]
    do(cluster, readd, "node2")

    assert (second.place / "server.pem").read_text() == "anchors"
    assert second.has("server.key")
    cluster.require_converged()


def test_a_member_that_was_lost_joins_again_under_its_uuid(cluster: FakeCluster) -> None:
    before = member(cluster, "node3")
    cluster.nodes["node3"].store.leave()
    with pytest.raises(NodeSilent) as caught:
        do(cluster, readd, "node3")
    assert "node invite node3 --readd" in (caught.value.hint or "")

    cluster.invitations.invite("node3")
    after = do(cluster, readd, "node3").member
    assert (after.uuid, after.role) == (before.uuid, before.role)
    assert after.certificates != before.certificates
    cluster.require_converged()


def test_only_the_master_changes_the_members(cluster: FakeCluster) -> None:
    cluster.here_name = "node2"
    for act in (remove, promote, demote, readd, add):
        with pytest.raises(NotMaster):
            do(cluster, act, "node3")


@pytest.mark.parametrize("act", [add, readd, promote, demote])
def test_nobody_joins_or_changes_its_role_during_a_renewal(cluster: FakeCluster, act: Any) -> None:
    def refuse() -> None:
        raise RenewalPending(["node3"])

    before = standing(cluster)
    master = evolve(cluster.master(), require_none_pending=refuse)
    with pytest.raises(RenewalPending, match="it waits for node3"):
        asyncio.run(act(master, "node2"))
    assert standing(cluster) == before
