"""When a copy of the state is good enough to draw a uid from."""

from datetime import UTC, datetime, timedelta
from uuid import UUID

import pytest
from attrs import evolve

from kvmsec.errors import StaleCopy
from kvmsec.model.cluster import Cluster, Member, Role
from kvmsec.store.freshness import SKEW_S, require_confirmed, require_revision
from kvmsec.store.identity import Identity
from uidpool.ranges import EMPTY

NOW = datetime(2026, 11, 22, tzinfo=UTC)
CLUSTER = Cluster(
    name="trial",
    uuid=UUID(int=100),
    uid_pool=EMPTY,
    draining=EMPTY,
    security_model=None,
    nodes=(
        Member("one", uuid=UUID(int=1), address="one", role=Role.CANDIDATE),
        Member("two", uuid=UUID(int=2), address="two"),
    ),
    master=UUID(int=1),
    created_at=NOW,
)


def check(cluster: Cluster = CLUSTER, *, uuid: int = 2, age_s: float | None = None) -> None:
    at = None if age_s is None else NOW - timedelta(seconds=age_s)
    identity = Identity(uuid=UUID(int=uuid), cluster_uuid=cluster.uuid, confirmed_at=at)
    require_confirmed(cluster, 7, identity, now=NOW, copy_valid_s=60)


@pytest.mark.parametrize("age_s", [0, 60, -SKEW_S])
def test_a_copy_that_was_confirmed_lately_is_good(age_s: float) -> None:
    check(age_s=age_s)


@pytest.mark.parametrize(
    ("age_s", "words"),
    [(None, "never"), (60.5, "not confirmed"), (-SKEW_S - 1, "in the future")],
)
def test_a_copy_that_was_not_is_refused_and_the_master_named(
    age_s: float | None, words: str
) -> None:
    with pytest.raises(StaleCopy, match=words) as caught:
        check(age_s=age_s)
    assert "the master, one," in caught.value.message
    assert "cluster sync" in (caught.value.hint or "")


def test_the_masters_state_and_a_lone_nodes_need_no_confirmation() -> None:
    check(uuid=1)
    check(evolve(CLUSTER, nodes=CLUSTER.nodes[:1]), uuid=9)


def test_a_member_without_an_identity_has_no_good_copy() -> None:
    with pytest.raises(StaleCopy, match="never"):
        require_confirmed(CLUSTER, 7, None, now=NOW)


def test_an_order_of_a_newer_state_is_refused() -> None:
    require_revision(7, 0)
    require_revision(7, 7)
    with pytest.raises(StaleCopy) as caught:
        require_revision(7, 8)
    assert (caught.value.found, caught.value.wanted) == (7, 8)
