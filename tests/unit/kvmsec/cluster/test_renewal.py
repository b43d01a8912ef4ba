"""`cluster renew-crypto` over nodes that keep real key files and judge the master for real."""

import asyncio
import stat
from pathlib import Path

import pytest
from attrs import evolve

from kvmsec.cluster.renewal import operations
from kvmsec.cluster.renewal.errors import (
    NothingToAbort,
    NoWayBack,
    RenewalPending,
    RenewalStopped,
    TooFewAnswer,
    UnknownMember,
)
from kvmsec.cluster.renewal.journal import Direction
from kvmsec.cluster.renewal.operations import Wish
from kvmsec.linux.errors import LockBusy
from kvmsec.linux.locks import FileLock
from kvmsec.pki.certificates import anchors_of
from tests.unit.kvmsec.cluster.renewal_world import (
    Killed,
    World,
    anchors,
    assert_settled,
    make_world,
)


@pytest.fixture
def world(tmp_path: Path) -> World:
    return make_world(tmp_path)


def shown(world: World) -> dict[str, str]:
    return {name: box.shown for name, box in world.boxes.items()}


def test_a_new_cluster_certificate_is_in_force_on_every_node(world: World) -> None:
    before, old_anchors = shown(world), anchors(world)

    outcome = world.renew(new_cluster_certificate=True)

    assert outcome.is_at_its_end
    assert_settled(world)
    assert not set(shown(world).values()) & set(before.values())
    assert not set(anchors(world).values()) & set(old_anchors.values())


def test_new_node_certificates_leave_the_cluster_s_own_as_it_is(world: World) -> None:
    before, old_anchors = shown(world), anchors(world)

    assert world.renew().is_at_its_end

    assert_settled(world)
    assert anchors(world) == old_anchors
    assert not set(shown(world).values()) & set(before.values())


@pytest.mark.parametrize("name", ["n0", "n1", "n2"])
def test_one_node_alone_gets_a_new_certificate(world: World, name: str) -> None:
    before = shown(world)

    assert world.renew(node=name).is_at_its_end

    assert_settled(world)
    changed = [other for other in before if shown(world)[other] != before[other]]
    assert changed == [name]


def test_a_node_that_the_cluster_lacks_is_refused(world: World) -> None:
    with pytest.raises(UnknownMember, match="no node n9"):
        world.renew(node="n9")
    assert_settled(world)


def test_the_journal_holds_keys_and_is_its_owner_s_alone(world: World) -> None:
    world.kill_at(3)
    with pytest.raises(Killed):
        world.renew(new_cluster_certificate=True)

    assert stat.S_IMODE(world.journal.path.stat().st_mode) == 0o600
    renewal = world.journal.load()
    assert renewal is not None and "PRIVATE" not in repr(renewal)


# Away, and back --------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["n1", "n2"])
@pytest.mark.parametrize("whole", [True, False])
def test_a_node_that_was_away_catches_up(world: World, name: str, whole: bool) -> None:
    world[name].is_up = False
    outcome = world.renew(new_cluster_certificate=whole)
    assert dict(outcome.behind) == {name: f"{name} was not reached: no answer"}
    others = [other for other in world.boxes if other != name]
    assert world.estranged(others) == []
    assert world.cut_off() == []  # by the old pair, which the journal keeps

    world[name].is_up = True
    caught_up = world.catch_up(name)

    assert caught_up is not None and caught_up.is_at_its_end
    assert_settled(world)


def test_catching_up_with_nothing_is_nothing(world: World) -> None:
    assert world.catch_up() is None
    assert world.catch_up("n1") is None


def test_a_node_that_stays_away_is_forgotten_and_named(world: World) -> None:
    world["n1"].is_up = False
    world.renew(new_cluster_certificate=True)

    outcome = world.forget_offline()

    assert outcome.forgotten == ("n1",)
    assert world.journal.load() is None
    forgotten = world.state.named("n1")
    assert forgotten is not None and forgotten.certificates == ()
    assert world["n0"].keys.candidates().keys() == {world["n0"].member.uuid}
    assert world["n2"].copy == world.state
    # It holds the old key of the cluster, and signs nothing with it that anybody trusts.
    (new,) = anchors_of(world["n0"].keys.anchors())
    assert new not in anchors_of(world["n1"].keys.anchors())
    assert world.estranged(["n0", "n2"]) == []


def test_the_old_is_kept_while_half_of_the_nodes_are_away(tmp_path: Path) -> None:
    world = make_world(tmp_path, candidates=2, plain=2)
    world["n1"].is_up = world["n2"].is_up = False

    with pytest.raises(TooFewAnswer, match="n1, n2"):
        world.renew(new_cluster_certificate=True)
    assert len(world["n0"].keys.anchors_der()) == 2
    assert world.cut_off() == []

    world["n1"].is_up = world["n2"].is_up = True
    outcome = world.go_on()
    assert outcome is not None and outcome.is_at_its_end
    assert_settled(world)


def test_a_renewal_of_one_node_that_is_away_can_be_taken_back(world: World) -> None:
    before = shown(world)
    world["n2"].is_up = False
    with pytest.raises(TooFewAnswer, match="n2"):
        world.renew(node="n2")

    world["n2"].is_up = True
    asyncio.run(operations.abort(world.work()))
    assert_settled(world)
    assert shown(world) == before


# Refusals, rivals ------------------------------------------------------------------------------


@pytest.mark.parametrize("what", ["prepare", "state", "commit"])
def test_a_node_that_refuses_stops_the_renewal_and_cuts_nobody_off(world: World, what: str) -> None:
    world["n2"].refuses = what
    with pytest.raises(RenewalStopped, match="no room"):
        world.renew(new_cluster_certificate=True)
    assert world.cut_off() == []
    assert world.estranged(world.boxes) == []

    world["n2"].refuses = None
    outcome = world.go_on()
    assert outcome is not None and outcome.is_at_its_end
    assert_settled(world)


def test_a_second_renewal_waits_for_the_first(world: World) -> None:
    world["n2"].is_up = False
    world.renew()
    with pytest.raises(RenewalPending, match="waits for n2"):
        world.renew(new_cluster_certificate=True)


def test_going_on_with_nothing_says_so(world: World) -> None:
    assert world.go_on() is None
    assert_settled(world)


def test_a_rival_change_of_the_state_is_kept(world: World) -> None:
    changed = []

    def rival() -> None:
        if not changed:
            changed.append(True)
            world.store.cluster = evolve(world.state, name="renamed")
            world.store.revision += 1

    world.store.before_save = rival
    world.renew(new_cluster_certificate=True)
    assert world.state.name == "renamed"
    assert_settled(world)


# Back ------------------------------------------------------------------------------------------


def test_a_renewal_is_taken_back_before_the_old_is_dropped(world: World) -> None:
    before = shown(world), anchors(world), world.state
    world["n2"].refuses = "commit"
    with pytest.raises(RenewalStopped):
        world.renew(new_cluster_certificate=True)
    assert shown(world)["n1"] != before[0]["n1"]

    assert world.abort().is_at_its_end

    assert_settled(world)
    assert (shown(world), anchors(world), world.state) == before


def test_nothing_is_taken_back_once_the_old_is_dropped(world: World) -> None:
    world["n2"].is_up = False
    outcome = world.renew(new_cluster_certificate=True)
    assert outcome.direction is Direction.DROPPING
    with pytest.raises(NoWayBack):
        world.abort()


def test_there_is_nothing_to_abort_or_forget(world: World) -> None:
    with pytest.raises(NothingToAbort):
        world.abort()
    with pytest.raises(NothingToAbort):
        world.forget_offline()


# Looked at, and joined by others -----------------------------------------------------------------


def test_a_preview_says_what_and_who_is_away_and_changes_nothing(world: World) -> None:
    before = shown(world), anchors(world), world.state, world.store.revision
    world["n2"].is_up = False

    told = asyncio.run(operations.preview(world.work(), Wish(node="n1")))

    assert [one.node for one in told] == ["n0", "n1", "n2"]
    assert "make a key" in told[1].what and "make a key" not in told[0].what
    assert told[1].problem is None and "no answer" in (told[2].problem or "")
    assert asyncio.run(operations.preview(world.work(), None)) == ()
    assert not world.journal.is_there()
    assert (shown(world), anchors(world), world.state, world.store.revision) == before


def test_a_preview_of_going_on_says_what_is_left(world: World) -> None:
    world["n2"].is_up = False
    world.renew(new_cluster_certificate=True)
    told = {one.node: one.what for one in asyncio.run(operations.preview(world.work(), None))}
    assert told["n0"] == told["n1"] == "nothing"
    assert told["n2"].endswith("drop the old")


def test_a_member_that_left_is_waited_for_no_more(world: World) -> None:
    world["n2"].is_up = False
    world.renew(new_cluster_certificate=True)
    left = tuple(one for one in world.state.nodes if one.name != "n2")
    world.store.cluster = evolve(world.state, nodes=left)
    world.store.revision += 1

    outcome = world.go_on()
    assert outcome is not None and outcome.is_at_its_end
    assert not world.journal.is_there()


def test_who_changes_the_members_is_told_to_wait(world: World) -> None:
    operations.require_none_pending(world.work())
    world["n2"].is_up = False
    world.renew()
    with pytest.raises(RenewalPending):
        operations.require_none_pending(world.work())


def test_two_renewals_at_once_are_refused(world: World) -> None:
    with FileLock(world.journal.lock_path), pytest.raises(LockBusy):
        world.renew()
    world["n2"].is_up = False
    world.renew()
    world["n2"].is_up = True
    with FileLock(world.journal.lock_path):
        assert world.catch_up() is None  # that other command sees to it
    assert world.journal.is_there()
