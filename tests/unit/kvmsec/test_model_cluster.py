"""How a cluster is kept: read back as it was, from every format that ever was."""

from datetime import UTC, datetime
from uuid import UUID

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvmsec.model.cluster import (
    FORMAT,
    MIGRATIONS,
    Cluster,
    Document,
    Member,
    cluster_from,
    document_of,
    migrate,
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

uids = st.builds(UidRanges.of_uids, st.sets(st.integers(min_value=1, max_value=2**31 - 1)))


def test_what_the_first_release_wrote_is_read() -> None:
    cluster = cluster_from(migrate(FIRST, 1))

    assert cluster.uid_pool == UidRanges.parse("1000-5000,8000")
    assert cluster.draining == UidRanges.parse("5001")
    assert cluster.default_model is SecurityModel.POOL
    assert cluster.nodes == (Member("node1"),)
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
        nodes=(Member("node1"), Member("Node2.example.org")),
        created_at=at,
    )
    assert cluster_from(document_of(cluster)) == cluster


def test_a_uid_is_never_in_the_pool_and_draining_at_once() -> None:
    with pytest.raises(ValueError, match="at once"):
        cluster_from({**FIRST, "draining": "1000"})
