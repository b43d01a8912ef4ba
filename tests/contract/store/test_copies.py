"""What every store keeps to on the nodes that have a copy of the master's state."""

from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from uuid import UUID

import pytest
from attrs import evolve

from kvmsec.errors import (
    ClusterExists,
    Conflict,
    CopyRefused,
    NotMaster,
    StoreTooNew,
    StoreUnreadable,
)
from kvmsec.model.cluster import FORMAT, Cluster, Member, Role, document_of, next_term
from kvmsec.store import Store
from kvmsec.store.file import FileStore
from kvmsec.store.identity import Identity
from uidpool.ranges import EMPTY, UidRanges

MASTER, OTHER, THIRD = UUID(int=1), UUID(int=2), UUID(int=3)
FIRST_TIME = datetime(2026, 11, 22, tzinfo=UTC)
LATER = datetime(2026, 11, 23, tzinfo=UTC)

Open = Callable[[str], Store]


def open_file_store(directory: Path) -> Open:
    def open_(node: str) -> Store:
        (directory / node).mkdir(exist_ok=True)
        return FileStore(directory / node / "cluster.json")

    return open_


@pytest.fixture(params=[open_file_store], ids=["file"])
def open_store(request: pytest.FixtureRequest, tmp_path: Path) -> Open:
    """Opens the store of a node, again and again, as one process after the other would."""
    made: Open = request.param(tmp_path)
    return made


def a_cluster(uuid: int = 100) -> Cluster:
    return Cluster(
        name="trial",
        uuid=UUID(int=uuid),
        uid_pool=UidRanges.parse("1000-5000"),
        draining=EMPTY,
        security_model=None,
        nodes=(
            Member("one", uuid=MASTER, address="one", role=Role.CANDIDATE),
            Member("two", uuid=OTHER, address="two", role=Role.CANDIDATE),
        ),
        master=MASTER,
        created_at=datetime(2026, 11, 21, tzinfo=UTC),
    )


def put(store: Store, cluster: Cluster, revision: int, at: datetime = FIRST_TIME) -> int:
    return store.put_copy(document_of(cluster), FORMAT, revision, at=at)


@pytest.fixture
def other(open_store: Open) -> Store:
    """The store of a node that has a uuid, and no cluster."""
    open_store("two").introduce(OTHER)
    return open_store("two")


def test_the_first_save_makes_this_node_the_master(open_store: Open) -> None:
    assert open_store("one").identity() is None
    open_store("one").save(a_cluster(), 0)

    assert open_store("one").identity() == Identity(uuid=MASTER, cluster_uuid=UUID(int=100))


def test_a_copy_is_loaded_as_the_master_saved_it(open_store: Open, other: Store) -> None:
    assert put(other, a_cluster(), 7) == 7

    assert open_store("two").load() == (a_cluster(), 7)
    assert open_store("two").identity() == Identity(
        uuid=OTHER, cluster_uuid=UUID(int=100), confirmed_at=FIRST_TIME
    )


def test_the_same_copy_again_is_only_confirmed(other: Store) -> None:
    put(other, a_cluster(), 7)
    assert put(other, a_cluster(), 7, LATER) == 7

    assert other.load() == (a_cluster(), 7)
    assert confirmed(other) == LATER


def confirmed(store: Store) -> datetime | None:
    identity = store.identity()
    assert identity is not None
    return identity.confirmed_at


def test_an_older_copy_is_refused_and_confirms_nothing(other: Store) -> None:
    put(other, a_cluster(), 7)
    with pytest.raises(CopyRefused, match="revision 6, and this node has revision 7"):
        put(other, evolve(a_cluster(), uid_pool=EMPTY), 6, LATER)

    assert other.load() == (a_cluster(), 7)
    assert confirmed(other) == FIRST_TIME


def test_two_states_of_one_revision_are_never_taken_for_one(other: Store) -> None:
    put(other, a_cluster(), 7)
    with pytest.raises(CopyRefused, match="two masters"):
        put(other, evolve(a_cluster(), uid_pool=EMPTY), 7)
    assert other.load() == (a_cluster(), 7)


def test_another_clusters_copy_is_refused(other: Store) -> None:
    put(other, a_cluster(), 7)
    with pytest.raises(CopyRefused, match="another's"):
        put(other, a_cluster(uuid=101), 8)
    assert other.load() == (a_cluster(), 7)


def test_a_copy_that_this_node_is_no_member_of_is_refused(open_store: Open) -> None:
    for name in ("three", "nobody"):
        store = open_store(name)
        if name == "three":
            store.introduce(THIRD)
        with pytest.raises(CopyRefused, match="no member"):
            put(store, a_cluster(), 7)
        assert store.load() == (None, 0)


def test_a_copy_of_a_later_format_or_of_none_is_refused(other: Store) -> None:
    put(other, a_cluster(), 7)
    with pytest.raises(StoreTooNew):
        other.put_copy(document_of(a_cluster()), FORMAT + 1, 8, at=LATER)
    for document in ({}, {"name": 7}, document_of(a_cluster()) | {"colour": "red"}):
        with pytest.raises(CopyRefused):
            other.put_copy(document, FORMAT, 8, at=LATER)
    assert other.load() == (a_cluster(), 7)


def test_only_the_master_changes_the_state_and_is_named(other: Store) -> None:
    put(other, a_cluster(), 7)
    with pytest.raises(NotMaster) as caught:
        other.save(evolve(a_cluster(), uid_pool=EMPTY), 7)
    assert caught.value.master == "one"
    assert "run the command on one" in (caught.value.hint or "")
    with pytest.raises(NotMaster):
        other.delete(a_cluster(), 7)
    assert other.load() == (a_cluster(), 7)


def test_a_candidate_that_takes_over_starts_a_new_term(open_store: Open, other: Store) -> None:
    master = open_store("one")
    old = master.save(a_cluster(), 0)
    put(other, a_cluster(), old)
    taken = evolve(a_cluster(), master=OTHER)

    revision = other.take_over(taken, old)
    assert revision == next_term(old)
    revision = other.save(evolve(taken, uid_pool=EMPTY), revision)

    # What the old master did unseen meanwhile doesn't make its state the newer one.
    master.save(evolve(a_cluster(), uid_pool=UidRanges.parse("7000")), old)
    put(master, evolve(taken, uid_pool=EMPTY), revision)
    assert master.load() == (evolve(taken, uid_pool=EMPTY), revision)
    with pytest.raises(NotMaster, match="two is"):
        master.save(a_cluster(), revision)


def test_nobody_takes_over_from_a_state_that_changed_or_for_somebody_else(other: Store) -> None:
    put(other, a_cluster(), 7)
    with pytest.raises(Conflict):
        other.take_over(evolve(a_cluster(), master=OTHER), 6)
    with pytest.raises(NotMaster):
        other.take_over(a_cluster(), 7)
    assert other.load() == (a_cluster(), 7)


def test_who_belongs_to_a_cluster_gets_no_other_uuid(other: Store) -> None:
    other.introduce(OTHER)
    put(other, a_cluster(), 7)
    with pytest.raises(ClusterExists):
        other.introduce(THIRD)
    assert confirmed(other) == FIRST_TIME


def test_who_left_may_join_another_cluster(other: Store) -> None:
    put(other, a_cluster(), 7)
    other.leave()
    other.leave()

    assert (other.load(), other.identity()) == ((None, 0), None)
    other.introduce(OTHER)
    put(other, a_cluster(uuid=101), 1)


def test_an_interrupted_first_copy_is_taken_by_the_same_cluster_only(
    open_store: Open, other: Store, tmp_path: Path
) -> None:
    put(other, a_cluster(), 7)
    (tmp_path / "two" / "cluster.json").unlink()

    with pytest.raises(CopyRefused, match="another's"):
        put(open_store("two"), a_cluster(uuid=101), 8)
    assert put(open_store("two"), a_cluster(), 7) == 7


@pytest.mark.parametrize("content", ["", "[]", "{}", '{"format": 1}', "[" * 100_000])
def test_a_garbled_identity_is_an_error_and_never_overwritten(
    other: Store, tmp_path: Path, content: str
) -> None:
    put(other, a_cluster(), 7)
    place = tmp_path / "two" / "node.json"
    place.write_text(content)

    with pytest.raises(StoreUnreadable, match=r"node\.json"):
        other.identity()
    with pytest.raises(StoreUnreadable):
        put(other, a_cluster(), 8)
    with pytest.raises(StoreUnreadable):
        other.save(a_cluster(), 7)
    assert place.read_text() == content


def test_a_member_that_lost_its_identity_changes_nothing(other: Store, tmp_path: Path) -> None:
    put(other, a_cluster(), 7)
    (tmp_path / "two" / "node.json").unlink()

    assert other.identity() is None
    with pytest.raises(NotMaster):
        other.save(a_cluster(), 7)
    with pytest.raises(CopyRefused, match="no member"):
        put(other, a_cluster(), 8)


def test_a_lone_node_of_an_earlier_release_is_the_master(open_store: Open, tmp_path: Path) -> None:
    store = open_store("one")
    alone = evolve(a_cluster(), nodes=a_cluster().nodes[:1])
    revision = store.save(alone, 0)
    (tmp_path / "one" / "node.json").unlink()

    identity = Identity(uuid=MASTER, cluster_uuid=UUID(int=100))
    assert store.identity() == identity
    store.save(a_cluster(), revision)
    assert store.identity() == identity
