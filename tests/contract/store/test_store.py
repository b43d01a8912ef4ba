"""What every store keeps to: the same suite over each of them."""

from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from uuid import UUID, uuid4

import pytest
from attrs import evolve

from kvmsec.errors import Conflict
from kvmsec.model.cluster import Cluster, Member, Role
from kvmsec.model.security import SecurityModel
from kvmsec.store import Store
from kvmsec.store.file import FileStore
from uidpool.ranges import EMPTY, UidRanges

NODE = UUID(int=1)

Open = Callable[[], Store]


def open_file_store(directory: Path) -> Open:
    return lambda: FileStore(directory / "cluster.json")


@pytest.fixture(params=[open_file_store], ids=["file"])
def open_store(request: pytest.FixtureRequest, tmp_path: Path) -> Open:
    """Opens the same place again and again, as one process after the other would."""
    made: Open = request.param(tmp_path)
    return made


def a_cluster(uuid: UUID | None = None) -> Cluster:
    return Cluster(
        name="trial",
        uuid=uuid or uuid4(),
        uid_pool=UidRanges.parse("1000-5000,8000"),
        draining=UidRanges.parse("5001"),
        security_model=SecurityModel.USER,
        nodes=(Member("Node-1.example.org", uuid=NODE, address="::1", role=Role.CANDIDATE),),
        master=NODE,
        created_at=datetime(2026, 11, 21, 12, 0, 1, tzinfo=UTC),
    )


def test_there_is_no_cluster_before_one_is_saved(open_store: Open) -> None:
    assert open_store().load() == (None, 0)


def test_what_was_saved_is_loaded_again_by_anyone(open_store: Open) -> None:
    cluster = a_cluster()
    revision = open_store().save(cluster, 0)

    assert revision > 0
    assert open_store().load() == (cluster, revision)


def test_a_cluster_with_nothing_set_is_kept_as_well(open_store: Open) -> None:
    cluster = evolve(a_cluster(), uid_pool=EMPTY, draining=EMPTY, security_model=None)
    open_store().save(cluster, 0)

    assert open_store().load()[0] == cluster


def test_each_change_has_a_higher_revision(open_store: Open) -> None:
    cluster = a_cluster()
    first = open_store().save(cluster, 0)
    second = open_store().save(evolve(cluster, draining=EMPTY), first)

    assert second > first
    assert open_store().load() == (evolve(cluster, draining=EMPTY), second)


def test_a_change_from_a_stale_revision_is_refused_and_changes_nothing(open_store: Open) -> None:
    cluster = a_cluster()
    first = open_store().save(cluster, 0)
    second = open_store().save(evolve(cluster, draining=EMPTY), first)

    for stale in (0, first, second + 1):
        with pytest.raises(Conflict) as caught:
            open_store().save(cluster, stale)
        assert (caught.value.expected, caught.value.found) == (stale, second)
    assert open_store().load() == (evolve(cluster, draining=EMPTY), second)


def test_a_second_cluster_never_replaces_the_first(open_store: Open) -> None:
    first = a_cluster()
    revision = open_store().save(first, 0)

    for expected in (0, revision):
        with pytest.raises(Conflict):
            open_store().save(a_cluster(), expected)
    assert open_store().load() == (first, revision)


def test_a_deleted_cluster_leaves_room_for_a_new_one(open_store: Open) -> None:
    first = a_cluster()
    open_store().delete(first, open_store().save(first, 0))
    assert open_store().load() == (None, 0)

    second = a_cluster()
    open_store().save(second, 0)
    assert open_store().load()[0] == second


def test_a_stale_deletion_is_refused(open_store: Open) -> None:
    cluster = a_cluster()
    first = open_store().save(cluster, 0)
    second = open_store().save(evolve(cluster, draining=EMPTY), first)

    for stale in (0, first):
        with pytest.raises(Conflict):
            open_store().delete(cluster, stale)
    assert open_store().load()[1] == second


def test_who_knew_an_earlier_cluster_can_neither_change_nor_delete_the_one_made_anew(
    open_store: Open,
) -> None:
    old = a_cluster()
    old_revision = open_store().save(old, 0)
    open_store().delete(old, old_revision)
    new = a_cluster()
    new_revision = open_store().save(new, 0)

    for revision in {old_revision, new_revision}:
        with pytest.raises(Conflict):
            open_store().save(old, revision)
        with pytest.raises(Conflict):
            open_store().delete(old, revision)
    assert open_store().load() == (new, new_revision)
