"""What becomes of a renewal when another candidate takes over in its middle."""

from pathlib import Path

import pytest
from attrs import evolve

from kvmsec.cluster.renewal.errors import BadJournal, NoWayBack, RenewalPending
from kvmsec.errors import NotMaster
from kvmsec.pki.certificates import anchors_of
from tests.unit.kvmsec.cluster.renewal_world import (
    Killed,
    World,
    anchors,
    assert_settled,
    make_world,
)
from tests.unit.kvmsec.cluster.test_renewal_invariant import Files, disk

__all__ = ["disk"]


def take_over(world: World, name: str) -> None:
    """As `cluster master-failover` does: from the copy that the new master has."""
    box = world[name]
    world.store.cluster = evolve(box.copy, master=box.member.uuid)
    world.store.revision = box.revision + 1000
    world.master = name


def killed_at(directory: Path, number: int) -> tuple[World, bool]:
    world = make_world(directory, candidates=2, plain=1)
    world.kill_at(number)
    try:
        world.renew(new_cluster_certificate=True)
    except Killed:
        world.let_live()
        return world, True
    return world, False


def test_whenever_the_master_dies_its_successor_ends_the_renewal(
    tmp_path: Path, disk: Files
) -> None:
    for number in range(0, 200):
        directory = tmp_path / str(number)
        directory.mkdir()
        world, was_killed = killed_at(directory, number)
        if not was_killed:
            break
        take_over(world, "n1")
        world["n0"].is_up = False
        assert world.cut_off() == [] or world.cut_off()[0].startswith("n0:")

        outcome = world.go_on()

        others = ["n1", "n2"]
        if outcome is None:
            # It began no further than that some nodes have one anchor more; a new one sweeps it up.
            outcome = world.renew(new_cluster_certificate=True)
            assert set(outcome.behind) == {"n0"}
        else:
            assert set(outcome.behind) <= {"n0"}, (number, outcome, world.steps)
            with pytest.raises(NoWayBack):
                world.abort()
        assert len({anchors(world)[name] for name in others}) == 1
        assert world.estranged(others) == []

        world["n0"].is_up = True
        world.catch_up()
        # What the old master still has of its renewal counts for nothing.
        assert world.cut_off() == []
        take_back(world)
    assert number > 40


def take_back(world: World) -> None:
    """The old master takes over again, with the journal of then."""
    world["n0"].take(*world.store.load())  # type: ignore[arg-type]
    take_over(world, "n0")
    world.go_on()
    for box in world.boxes.values():
        box.take(*world.store.load())  # type: ignore[arg-type]
    assert_settled(world)


def test_a_new_renewal_waits_until_what_another_master_began_is_ended(tmp_path: Path) -> None:
    world, _ = killed_at(tmp_path, 30)
    take_over(world, "n1")
    with pytest.raises(RenewalPending):
        world.renew(new_cluster_certificate=True)


def test_a_node_that_is_not_the_master_renews_nothing(tmp_path: Path) -> None:
    world = make_world(tmp_path)
    work = world.work()
    world.master = "n1"
    with pytest.raises(NotMaster, match="n0"):
        world.renew()
    assert work.journal.load() is None


def test_a_candidate_that_missed_a_renewal_can_t_take_over(tmp_path: Path) -> None:
    """It holds the old key of the cluster, and nobody trusts what that has signed."""
    world = make_world(tmp_path)
    world["n1"].is_up = False
    world.renew(new_cluster_certificate=True)
    world["n1"].is_up = True

    take_over(world, "n1")
    assert {line.partition(":")[0] for line in world.cut_off()} == {"n0", "n2"}
    assert all("chain" in line for line in world.cut_off())
    assert anchors_of(world["n1"].keys.anchors()) != anchors_of(world["n0"].keys.anchors())


def test_a_journal_that_can_t_be_read_is_left_and_shows_no_key(tmp_path: Path) -> None:
    world, _ = killed_at(tmp_path, 10)
    path = world.journal.path
    path.write_text(path.read_text()[:-200])
    with pytest.raises(BadJournal) as caught:
        world.go_on()
    assert "BEGIN" not in caught.value.message
    assert path.exists()
