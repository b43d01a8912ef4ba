"""A candidate that becomes the master when the old one is gone, or by force."""

import asyncio
import itertools
from collections.abc import Callable
from typing import Any

import pytest
from attrs import evolve

from kvmsec.cluster import handing
from kvmsec.cluster.members.roles import promote
from kvmsec.cluster.members.takeover import Taken, take_over
from kvmsec.errors import MemberRefused, NotMaster
from kvmsec.linux.errors import Fault
from tests.unit.kvmsec.cluster.killing import was_killed_at
from tests.unit.kvmsec.fake_node import FakeCluster, cluster, ranges

__all__ = ["cluster"]


def fail_over(cluster: FakeCluster, name: str = "node2", **more: Any) -> Taken:
    cluster.here_name = name
    return asyncio.run(take_over(cluster.store, cluster, **more))


def test_a_candidate_takes_over_from_a_master_that_is_gone(cluster: FakeCluster) -> None:
    cluster.nodes["node1"].is_silent = True
    taken = fail_over(cluster)

    assert taken.cluster.master_member.name == "node2"
    assert (taken.source, set(taken.unheard), set(taken.behind)) == ("node2", {"node1"}, {"node1"})
    cluster.modify(add=ranges("1020"))
    assert str(cluster.nodes["node3"].rules) == "1000-1009,1020"

    # Back again, the old one learns that it is the master no more.
    cluster.nodes["node1"].is_silent = False
    cluster.settle()
    cluster.require_converged()
    cluster.here_name = "node1"
    with pytest.raises(NotMaster, match="node2 is"):
        cluster.modify(add=ranges("1030"))


def test_a_master_that_answers_is_left_alone_unless_forced(cluster: FakeCluster) -> None:
    before = cluster.require_converged()
    with pytest.raises(MemberRefused, match="node1, answers"):
        fail_over(cluster)
    assert cluster.require_converged() == before

    fail_over(cluster, force=True)
    assert cluster.require_converged().master_member.name == "node2"


def test_only_a_candidate_takes_over(cluster: FakeCluster) -> None:
    with pytest.raises(MemberRefused, match="no master candidate") as caught:
        fail_over(cluster, "node3")
    assert "node1, node2" in (caught.value.hint or "")


def test_the_newest_copy_among_the_candidates_wins(cluster: FakeCluster) -> None:
    asyncio.run(promote(cluster.master(), "node3"))
    cluster.nodes["node2"].is_silent = True
    cluster.modify(add=ranges("1020"))
    _, newest = cluster.store.load()
    cluster.nodes["node2"].is_silent = False
    cluster.nodes["node1"].is_silent = True

    taken = fail_over(cluster)
    assert (taken.source, taken.copied) == ("node3", newest)
    assert str(taken.cluster.uid_pool) == "1000-1009,1020"
    assert str(cluster.nodes["node2"].rules) == "1000-1009,1020"


def test_what_a_cut_off_master_did_alone_is_lost_and_never_comes_back(
    cluster: FakeCluster,
) -> None:
    for name in ("node2", "node3"):
        cluster.nodes[name].is_silent = True
    for uid in ("1020", "1021", "1022"):
        cluster.modify(add=ranges(uid))
    for name in ("node2", "node3"):
        cluster.nodes[name].is_silent = False
    cluster.nodes["node1"].is_silent = True
    fail_over(cluster)

    cluster.nodes["node1"].is_silent = False
    cluster.settle()
    assert str(cluster.require_converged().uid_pool) == "1000-1009"


def test_of_two_masters_the_nodes_follow_the_first_and_name_the_other(
    cluster: FakeCluster,
) -> None:
    asyncio.run(promote(cluster.master(), "node3"))
    nodes = cluster.nodes
    nodes["node1"].is_silent = nodes["node3"].is_silent = True
    fail_over(cluster, "node2")
    nodes["node3"].is_silent, nodes["node2"].is_silent = False, True
    fail_over(cluster, "node3")
    nodes["node1"].is_silent = nodes["node2"].is_silent = False

    cluster.here_name = "node2"
    with pytest.raises(Fault, match="two masters"):
        cluster.settle()
    fail_over(cluster, "node3", force=True)
    assert cluster.require_converged().master_member.name == "node3"


def test_a_candidate_that_the_newest_copy_has_demoted_does_not_take_over(
    cluster: FakeCluster,
) -> None:
    asyncio.run(promote(cluster.master(), "node3"))
    standing, revision = cluster.store.load()
    assert standing is not None
    cluster.nodes["node2"].is_silent = True
    plain = evolve(standing.nodes[1], role=standing.nodes[1].role.PLAIN)
    nodes = (standing.nodes[0], plain, standing.nodes[2])
    cluster.store.save(evolve(standing, nodes=nodes), revision)
    cluster.settle()
    cluster.nodes["node2"].is_silent, cluster.nodes["node1"].is_silent = False, True

    with pytest.raises(MemberRefused, match="no master candidate"):
        fail_over(cluster)


def test_the_master_itself_takes_over_by_force_only(cluster: FakeCluster) -> None:
    with pytest.raises(MemberRefused, match="already"):
        fail_over(cluster, "node1")
    fail_over(cluster, "node1", force=True)
    cluster.require_converged()


def test_a_takeover_killed_at_any_moment_is_finished_by_the_next(cluster: FakeCluster) -> None:
    cluster.nodes["node1"].is_silent = True
    cluster.here_name = "node2"

    def run(at: Callable[[str], None]) -> None:
        for node in cluster.nodes.values():
            node.before = at
        asyncio.run(take_over(cluster.store, cluster, force=True, on_step=at))

    for moment in itertools.count():
        killed = was_killed_at(moment, run)
        fail_over(cluster, force=True)
        third, _ = cluster.nodes["node3"].store.load()
        assert third == cluster.store.load()[0]
        if not killed:
            break
    assert moment > 4
    cluster.nodes["node1"].is_silent = False
    member = cluster.require_cluster().named("node1")
    assert member is not None
    asyncio.run(handing.catch_up(cluster.store, cluster, member))
    assert cluster.require_converged().master_member.name == "node2"
