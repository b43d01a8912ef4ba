"""Leases on disk: drawn, released, rested, quarantined."""

import os
import time

import pytest

from kvmsec.linux.processes import boot_id, identify, myself
from tests.unit.uidpool.node import POOL, Node, draw, resting
from uidpool.claims import LeaseKey, Quarantined, Released, State
from uidpool.errors import (
    ClaimsError,
    NoCleanUid,
    PoolExhausted,
    UidHeld,
)
from uidpool.ranges import UidRanges
from uidpool.usage import Usage
from uidpool.waiting import WaitingClaims


def test_a_lease_says_who_holds_the_uid_and_who_drew_it(node: Node) -> None:
    lease = draw(node.claims("/srv/trial"))
    assert lease.uid in POOL
    assert (lease.instance, lease.generation, lease.root) == ("vm", "g1", "/srv/trial")
    assert lease.launcher == myself() == identify(os.getpid())
    assert lease.boot_id == boot_id()
    assert node.claims().leases() == (lease,)
    path = node.leases / str(lease.uid)
    assert path.stat().st_mode & 0o7777 == 0o600
    for directory in (node.leases, node.state, *node.state.iterdir()):
        assert directory.stat().st_mode & 0o7777 == 0o700


def test_no_uid_is_drawn_twice_and_an_exhausted_pool_says_so(node: Node) -> None:
    drawn = {draw(node.claims(root)).uid for root in ("/", "/", "/a", "/b")}
    assert drawn == set(POOL)
    with pytest.raises(PoolExhausted, match="4 leased"):
        draw(node.claims())


def test_a_leased_uid_that_leaves_the_pool_is_draining(node: Node) -> None:
    draw(node.claims())
    assert [one.state for one in node.claims().states(draining=POOL)] == [State.DRAINING]


def test_a_released_uid_rests_while_another_is_free(node: Node) -> None:
    claims = node.claims()
    pool = UidRanges.parse("210000-210001")
    first = draw(claims, pool=pool)
    assert claims.release(first.key) == Released()
    assert resting(claims) == [first.uid]
    second = draw(claims, pool=pool)
    assert second.uid != first.uid
    third = draw(claims, pool=pool)
    assert third.uid == first.uid
    assert resting(claims) == []


def test_a_rest_outlives_the_process_and_ends(node: Node) -> None:
    lease = draw(node.claims(), reuse_delay_s=0.05)
    node.claims().release(lease.key)
    (resting,) = node.claims().states()
    assert (resting.uid, resting.state) == (lease.uid, State.RESTING)
    time.sleep(0.06)
    assert node.claims().states() == ()
    draw(node.claims())
    assert len(node.files()) == 1


def test_without_a_delay_a_uid_does_not_rest(node: Node) -> None:
    lease = draw(node.claims(), reuse_delay_s=0)
    assert node.claims().release(lease.key) == Released()
    assert node.files() == []


def test_a_rest_that_begins_in_the_future_begins_now(node: Node) -> None:
    lease = draw(node.claims(), reuse_delay_s=60)
    node.claims().release(lease.key)
    (name,) = node.files()
    ahead = f"{lease.uid}.{int(time.time() * 1000) + 10**11}.60000"
    (node.state / "resting" / name).rename(node.state / "resting" / ahead)
    draw(node.claims())
    (state,) = [one for one in node.claims().states() if one.state is State.RESTING]
    assert state.until is not None
    assert abs(state.until.timestamp() - 60 - time.time()) < 10


def test_a_second_release_does_nothing(node: Node) -> None:
    claims = node.claims()
    lease = draw(claims)
    claims.release(lease.key)
    before = node.files()
    assert claims.release(lease.key) == Released()
    assert node.cleaned == [lease.uid]
    assert node.files() == before


def test_a_release_of_an_earlier_start_never_frees_or_cleans_the_next_holder(node: Node) -> None:
    claims, pool = node.claims(), UidRanges.parse("210000")
    first = claims.draw(pool, instance="vm", generation="g1", reuse_delay_s=0)
    claims.release(first.key)
    second = claims.draw(pool, instance="vm", generation="g2")
    node.cleaned.clear()
    assert claims.release(first.key) == Released()
    assert claims.release(LeaseKey(first.uid, "other", "g2")) == Released()
    assert claims.leases() == (second,)
    assert node.cleaned == []


def test_what_can_not_be_cleaned_is_quarantined_until_it_can(node: Node) -> None:
    claims = node.claims()
    lease = draw(claims)
    node.dirty[lease.uid] = Usage(lease.uid, files=("/tmp/x",), file_count=1)
    outcome = claims.release(lease.key)
    assert outcome == Quarantined("files '/tmp/x'")
    assert claims.release(lease.key) == outcome
    (state,) = claims.states()
    assert (state.uid, state.state, state.instance) == (lease.uid, State.QUARANTINED, "vm")
    assert state.reason == "files '/tmp/x'"
    assert claims.retry(lease.uid) == outcome
    assert lease.uid not in {draw(claims).uid for _ in range(3)}
    with pytest.raises(PoolExhausted, match="3 leased, 0 resting, 1 quarantined"):
        draw(claims)
    del node.dirty[lease.uid]
    assert claims.retry(lease.uid) == Released()
    assert draw(claims).uid == lease.uid


def test_a_drawn_uid_that_is_dirty_is_quarantined_and_another_drawn(node: Node) -> None:
    for uid in (210000, 210001, 210002):
        node.dirty[uid] = Usage(uid, keys=1)
    assert draw(node.claims()).uid == 210003
    assert {one.reason for one in node.claims().quarantined()} <= {"1 keys in the kernel"}


def test_a_pool_of_dirty_uids_names_each_reason(node: Node) -> None:
    for uid in POOL:
        node.dirty[uid] = Usage(uid, keys=uid)
    with pytest.raises(NoCleanUid) as caught:
        draw(node.claims())
    assert caught.value.reasons == {uid: f"{uid} keys in the kernel" for uid in POOL}
    assert len(node.claims().quarantined()) == 4
    assert node.claims().leases() == ()


def test_a_look_that_can_not_be_finished_does_not_use_the_pool_up(node: Node) -> None:
    for uid in POOL:
        node.dirty[uid] = Usage(uid, incomplete="no /proc")
    with pytest.raises(NoCleanUid, match="no /proc"):
        draw(node.claims())
    assert len(node.claims().quarantined()) == 1


def test_files_of_others_in_the_way_use_nothing_up(node: Node) -> None:
    for uid in POOL:
        node.dirty[uid] = Usage(uid, incomplete="too many files", is_crowded=True)
    with pytest.raises(NoCleanUid, match="too many files"):
        draw(node.claims())
    assert node.claims().states() == ()


def test_an_error_while_looking_gives_the_uid_back(node: Node) -> None:
    def fail(uid: int) -> Usage:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        draw(WaitingClaims(node.leases, node.state, root="/", inspect=fail))
    assert node.files() == []


def test_retry_refuses_what_is_held_and_what_is_free(node: Node) -> None:
    claims = node.claims()
    lease = draw(claims)
    with pytest.raises(UidHeld, match="'vm'"):
        claims.retry(lease.uid)
    with pytest.raises(ClaimsError, match="not quarantined"):
        claims.retry(209999)
    assert node.cleaned == []


def test_rests_of_a_destroyed_cluster_are_forgotten_and_others_kept(node: Node) -> None:
    mine, theirs = node.claims("/mine"), node.claims("/theirs")
    for claims in (mine, theirs):
        lease = draw(claims)
        claims.release(lease.key)
    mine.forget_resting()
    assert resting(mine) == [lease.uid]


def test_unused_directories_are_removed_and_made_again(node: Node) -> None:
    claims = node.claims()
    lease = draw(claims, reuse_delay_s=0)
    assert not claims.remove_if_unused()
    claims.release(lease.key)
    assert claims.remove_if_unused()
    assert not node.leases.exists()
    assert not node.state.exists()
    draw(claims)


def test_nothing_is_there_before_the_first_draw(node: Node) -> None:
    claims = node.claims()
    assert claims.leases() == claims.states() == claims.quarantined() == ()
    assert claims.release(LeaseKey(210000, "vm", "g1")) == Released()
