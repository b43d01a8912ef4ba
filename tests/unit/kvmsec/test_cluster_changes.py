"""What a change makes of a cluster, for every pool and every change."""

from datetime import UTC, datetime
from typing import Any
from uuid import UUID

import pytest
from attrs import evolve
from hypothesis import assume, given
from hypothesis import strategies as st

from kvmsec.cluster.changes import (
    Change,
    plan_init,
    plan_modify,
    taken_back,
    without_drained,
)
from kvmsec.errors import BadName, ChangeRefused
from kvmsec.model.cluster import Cluster, Member, Role
from kvmsec.model.security import SecurityModel
from uidpool.ranges import EMPTY, UidRanges


def init(name: str = "trial", node: str = "node1", **given_: Any) -> Cluster:
    fixed = {"uuid": UUID(int=1), "created_at": datetime(2026, 11, 21, tzinfo=UTC)}
    wanted: dict[str, Any] = {"uid_pool": EMPTY, "security_model": None, **fixed, **given_}
    member = Member(node, uuid=UUID(int=2), address=node, role=Role.CANDIDATE)
    return plan_init(name, node=member, **wanted)


def a_cluster(pool: str = "", draining: str = "", model: SecurityModel | None = None) -> Cluster:
    base = init()
    return evolve(
        base,
        uid_pool=UidRanges.parse(pool),
        draining=UidRanges.parse(draining),
        security_model=model,
    )


def ranges(text: str) -> UidRanges:
    return UidRanges.parse(text)


uids = st.builds(UidRanges.of_uids, st.sets(st.integers(min_value=1, max_value=30)))


@st.composite
def clusters(draw: st.DrawFn) -> Cluster:
    pool = draw(uids)
    model = draw(st.sampled_from([None, SecurityModel.NONE, SecurityModel.USER]))
    return evolve(init(), uid_pool=pool, draining=draw(uids) - pool, security_model=model)


def test_the_default_model_is_none_before_a_pool_is_set_and_pool_after() -> None:
    cluster = init()
    assert cluster.default_model is SecurityModel.NONE

    changed = plan_modify(cluster, Change(uid_pool=ranges("1000-1009"))).cluster
    assert changed.default_model is SecurityModel.POOL
    assert init(uid_pool=ranges("1000")).default_model is SecurityModel.POOL


def test_a_chosen_model_stays_whatever_becomes_of_the_pool() -> None:
    cluster = init(security_model=SecurityModel.USER)
    changed = plan_modify(cluster, Change(add=ranges("1000"))).cluster

    assert changed.default_model is SecurityModel.USER


def test_the_model_pool_wants_a_pool() -> None:
    with pytest.raises(ChangeRefused):
        init(security_model=SecurityModel.POOL)
    with pytest.raises(ChangeRefused):
        plan_modify(init(), Change(security_model=SecurityModel.POOL))


def test_taking_the_last_uid_never_makes_none_the_default_unasked() -> None:
    cluster = init(uid_pool=ranges("1000-1009"))

    for change in (Change(remove=ranges("1000-1009")), Change(uid_pool=EMPTY)):
        with pytest.raises(ChangeRefused) as caught:
            plan_modify(cluster, change)
        assert caught.value.hint is not None
        asked = plan_modify(cluster, evolve(change, security_model=SecurityModel.NONE)).cluster
        assert asked.default_model is SecurityModel.NONE


@pytest.mark.parametrize("name", ["", "../x", "-x", "A", "a" * 64, "a\n"])
def test_a_cluster_has_a_name_that_may_stand_anywhere(name: str) -> None:
    with pytest.raises(BadName):
        init(name)
    with pytest.raises(BadName):
        init(node=name if name not in ("A", "a" * 64) else "")


def test_one_uid_taken_out_of_a_range_leaves_two_ranges() -> None:
    plan = plan_modify(a_cluster("1000-1010"), Change(remove=ranges("1003")))

    assert str(plan.cluster.uid_pool) == "1000-1002,1004-1010"
    assert str(plan.cluster.draining) == str(plan.leaving) == "1003"
    assert not plan.entering


def test_setting_a_pool_has_every_uid_checked_and_adding_to_it_the_added_ones() -> None:
    cluster = a_cluster("1000-1010")

    assert plan_modify(cluster, Change(uid_pool=ranges("1005-1020"))).entering == ranges(
        "1005-1020"
    )
    assert plan_modify(cluster, Change(add=ranges("1005-1020"))).entering == ranges("1005-1020")


@pytest.mark.parametrize("change", [Change(add=ranges("1003")), Change(uid_pool=ranges("1003"))])
def test_adding_a_draining_uid_keeps_it(change: Change) -> None:
    plan = plan_modify(a_cluster("1003-1005", draining="1001-1002"), evolve(change))
    assert 1003 in plan.cluster.uid_pool

    plan = plan_modify(a_cluster("1000", draining="1003"), change)
    assert 1003 in plan.cluster.uid_pool
    assert 1003 not in plan.cluster.draining


def test_contradictions_are_refused() -> None:
    cluster = a_cluster("1000-1010", draining="1020")
    contradictions = [
        Change(uid_pool=ranges("1000"), add=ranges("1001")),
        Change(uid_pool=ranges("1000"), remove=ranges("1001")),
        Change(add=ranges("1001-1003"), remove=ranges("1003")),
        Change(remove=ranges("1005,2000")),
    ]
    for change in contradictions:
        with pytest.raises(ChangeRefused):
            plan_modify(cluster, change)


def test_removing_what_drains_already_changes_nothing() -> None:
    cluster = a_cluster("1000", draining="1020")
    assert plan_modify(cluster, Change(remove=ranges("1020"))).cluster == cluster


def test_a_pool_of_two_thousand_million_uids_is_planned_as_quickly_as_one() -> None:
    cluster = a_cluster("1-2000000000")
    plan = plan_modify(cluster, Change(remove=ranges("1000000000"), add=ranges("2000000001")))
    assert plan.cluster.uid_pool.size() == 2_000_000_000


@given(clusters(), uids, uids)
def test_adding_and_removing_is_set_arithmetic(
    cluster: Cluster, added: UidRanges, removed: UidRanges
) -> None:
    removed = (removed & cluster.guarded_uids) - added
    assume((cluster.uid_pool | added) - removed)
    plan = plan_modify(cluster, Change(add=added, remove=removed))

    assert plan.cluster.uid_pool == (cluster.uid_pool | added) - removed
    assert plan.leaving == cluster.uid_pool - plan.cluster.uid_pool
    assert plan.cluster.draining == (cluster.draining | plan.leaving) - plan.cluster.uid_pool


@given(clusters(), uids)
def test_no_uid_loses_its_rules_before_it_was_seen_free(cluster: Cluster, pool: UidRanges) -> None:
    assume(pool)
    plan = plan_modify(cluster, Change(uid_pool=pool))

    assert not cluster.guarded_uids - plan.cluster.guarded_uids


@given(clusters(), uids)
def test_a_draining_uid_leaves_once_nobody_holds_it(cluster: Cluster, held: UidRanges) -> None:
    settled = without_drained(cluster, held)

    assert settled.draining == cluster.draining & held
    assert settled.uid_pool == cluster.uid_pool


@given(clusters(), uids, uids)
def test_a_change_taken_back_leaves_the_cluster_as_it_was(
    cluster: Cluster, pool: UidRanges, held: UidRanges
) -> None:
    assume(pool)
    plan = plan_modify(cluster, Change(uid_pool=pool, security_model=SecurityModel.USER))

    assert taken_back(plan.cluster, cluster, plan) == cluster
    settled = without_drained(plan.cluster, held)
    back = taken_back(settled, cluster, plan)
    assert back.uid_pool == cluster.uid_pool
    assert back.security_model is cluster.security_model


@given(clusters(), uids, uids)
def test_taking_a_change_back_keeps_what_others_changed_since(
    cluster: Cluster, pool: UidRanges, others: UidRanges
) -> None:
    assume(pool)
    plan = plan_modify(cluster, Change(uid_pool=pool))
    theirs = others - (plan.cluster.guarded_uids | cluster.guarded_uids)
    since = plan_modify(plan.cluster, Change(add=theirs)).cluster

    assert taken_back(since, cluster, plan).uid_pool == cluster.uid_pool | theirs
