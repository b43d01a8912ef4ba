"""How a cluster is kept: read back as it was, from every format that ever was."""

from datetime import UTC, datetime
from typing import Any
from uuid import UUID, uuid5

import pytest
from attrs import evolve
from hypothesis import given
from hypothesis import strategies as st

from kvmsec.model.cluster import (
    FORMAT,
    MIGRATIONS,
    Cluster,
    Document,
    Member,
    Role,
    cluster_from,
    document_of,
    migrate,
    next_term,
)
from kvmsec.model.security import SecurityModel
from uidpool.ranges import UidRanges

# As the first release wrote it. It never changes: what is on disks doesn't either.
FIRST: Document = {
    "name": "trial",
    "uuid": "00000000-0000-0000-0000-000000000001",
    "uid_pool": "1000-5000,8000",
    "draining": "5001",
    "security_model": None,
    "nodes": [{"name": "node1"}],
    "created_at": "2026-11-21T12:00:00Z",
}

ONE = Member(
    "node1",
    uuid=UUID(int=1),
    address="192.0.2.1",
    role=Role.CANDIDATE,
    certificates=("a" * 64, "c" * 64),
)
TWO = Member("Node2.example.org", uuid=UUID(int=2), address="::1", port=2, certificates=("b" * 64,))

uids = st.builds(UidRanges.of_uids, st.sets(st.integers(min_value=1, max_value=2**31 - 1)))


def test_what_the_first_release_wrote_is_read() -> None:
    cluster = cluster_from(migrate(FIRST, 1))

    assert cluster.uid_pool == UidRanges.parse("1000-5000,8000")
    assert cluster.draining == UidRanges.parse("5001")
    assert cluster.default_model is SecurityModel.POOL
    (node,) = cluster.nodes
    assert (node.name, node.address, node.port) == ("node1", "node1", 1811)
    assert node.uuid == uuid5(UUID(int=1), "node1")
    assert cluster.master_member == node
    assert not node.certificates
    assert cluster.created_at == datetime(2026, 11, 21, 12, tzinfo=UTC)


def test_every_format_before_this_one_has_a_way_up() -> None:
    assert sorted(MIGRATIONS) == list(range(1, FORMAT))


def test_a_document_goes_through_one_format_after_the_other() -> None:
    steps = {
        1: lambda document: {**document, "two": True},
        2: lambda document: {**document, "three": document["two"]},
    }

    assert migrate({}, 1, steps) == {"two": True, "three": True}
    assert migrate({"two": 2}, 2, steps) == {"two": 2, "three": 2}
    assert migrate({}, 3, steps) == {}
    for unknown in (0, 4):
        with pytest.raises(ValueError, match=f"no format {unknown}"):
            migrate({}, unknown, steps)


def a_cluster(*nodes: Member) -> Cluster:
    return Cluster(
        name="trial",
        uuid=UUID(int=7),
        uid_pool=UidRanges.parse("1000"),
        draining=UidRanges.parse("2000"),
        security_model=None,
        nodes=nodes,
        master=nodes[0].uuid,
        created_at=datetime(2026, 11, 21, tzinfo=UTC),
    )


@given(
    uids,
    uids,
    st.sampled_from([None, *SecurityModel]),
    st.datetimes(timezones=st.just(UTC)),
)
def test_every_cluster_is_read_back_as_it_was(
    pool: UidRanges, draining: UidRanges, model: SecurityModel | None, at: datetime
) -> None:
    cluster = Cluster(
        name="trial",
        uuid=UUID(int=7),
        uid_pool=pool,
        draining=draining - pool,
        security_model=model,
        nodes=(ONE, TWO),
        master=ONE.uuid,
        created_at=at,
    )
    assert cluster_from(document_of(cluster)) == cluster


def test_a_uid_is_never_in_the_pool_and_draining_at_once() -> None:
    with pytest.raises(ValueError, match="at once"):
        cluster_from({**migrate(FIRST, 1), "draining": "1000"})


@pytest.mark.parametrize("nodes", [[], None, ["node1"], [{}], 7])
def test_a_first_document_that_no_release_wrote_is_refused(nodes: object) -> None:
    with pytest.raises(ValueError):
        cluster_from(migrate({**FIRST, "nodes": nodes}, 1))


@pytest.mark.parametrize(
    ("others", "what"),
    [
        ({"name": "NODE1"}, "name"),
        ({"uuid": str(UUID(int=1))}, "uuid"),
        ({"certificates": ["a" * 64]}, "certificate"),
        ({"certificates": ["b" * 64] * 2}, "distinct"),
        ({"certificates": ["B" * 64]}, "64 hex"),
        ({"address": "-x"}, "address"),
        ({"port": 65536}, "port"),
    ],
)
def test_two_members_never_share_what_tells_them_apart(others: dict[str, Any], what: str) -> None:
    document = document_of(a_cluster(ONE, TWO))
    one, two = document["nodes"]  # type: ignore[misc]
    document["nodes"] = [one, {**two, **others}]

    with pytest.raises(ValueError, match=what):
        cluster_from(document)


def test_the_master_is_one_of_the_candidates() -> None:
    with pytest.raises(ValueError, match="master"):
        evolve(a_cluster(ONE, TWO), master=TWO.uuid)
    with pytest.raises(ValueError, match="master"):
        evolve(a_cluster(ONE, TWO), master=UUID(int=9))


def test_members_are_found_by_uuid_and_by_name() -> None:
    cluster = a_cluster(ONE, TWO)

    assert cluster.named("node2.EXAMPLE.org") == TWO
    assert cluster.named("node3") is None
    assert cluster.member(TWO.uuid) == TWO
    assert cluster.candidates == (ONE,)


def test_a_new_term_is_above_all_that_the_old_one_may_reach() -> None:
    assert next_term(7) > 7 + 1000
    assert next_term(next_term(7)) > next_term(7) + 1000
    assert next_term(next_term(7) - 1) == next_term(7)
