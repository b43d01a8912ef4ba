"""Pools that are none, users that are missing, uids that are taken: each is said, none is used."""

import os
import signal
import subprocess
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from kvmsec.errors import PoolRefused, SecurityRefused
from kvmsec.linux.children import Child, start_child
from kvmsec.linux.credentials import Credentials
from kvmsec.model.security import SecurityModel
from kvmsec.node.identities import MissingUser
from uidpool import provision
from uidpool.errors import NoCleanUid, PoolExhausted, RangeSyntaxError
from uidpool.ranges import UidRanges
from uidpool.snapshot import Snapshot

pytestmark = pytest.mark.kvm

MISSING = "246000-246004"


def pool_of(place: Any) -> str:
    return str(place.lab.run(_uid_pool))


async def _uid_pool(node: Any) -> UidRanges:
    pool: UidRanges = node.host.store.load()[0].uid_pool
    return pool


# Texts -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "status", "words"),
    [
        ("-5", 2, "at character 1, '-5'"),
        ("5-", 2, "at character 1, '5-'"),
        ("5-3", 2, "at character 1, '5-3'"),
        ("1-2-3", 2, "at character 1, '1-2-3'"),
        ("4294967295", 2, "4294967295"),
        ("\N{ARABIC-INDIC DIGIT THREE}", 2, "at character 1"),
        ("1_000", 2, "at character 1, '1_000'"),
        ("245000,,x,5-3", 2, "at character 9, 'x'"),
        ("1," * 60000 + "x", 2, "at character 120001"),
        ("0", 2, "uid 0 is root"),
        ("64055", 1, "64055"),
        (MISSING, 1, MISSING),
    ],
)
def test_a_bad_pool_is_refused_and_the_old_one_stands(
    place: Any, text: str, status: int, words: str
) -> None:
    before = pool_of(place)
    with place.unchanged():
        place.kvmsec("cluster", "modify", "--uid-pool", text).refused(words, status=status)
        assert pool_of(place) == before


def test_a_text_of_megabytes_is_refused_in_a_line() -> None:
    with pytest.raises(RangeSyntaxError) as caught:
        UidRanges.parse("1000-2000," * 400_000)
    assert "is 4000000 characters long" in caught.value.message
    assert len(caught.value.message) < 300


def test_a_refused_pool_says_how_to_make_its_users(place: Any) -> None:
    said = place.kvmsec("cluster", "modify", "--add-uids", MISSING).refused(MISSING)
    assert "kvmsec uids provision" in said


def test_a_cluster_with_a_bad_pool_is_not_made(make_lab: Callable[..., Any]) -> None:
    lab = make_lab()
    lab.destroy()
    with pytest.raises(PoolRefused):
        lab.init(uid_pool=UidRanges.parse(MISSING))
    assert not lab.paths.cluster.exists()
    assert lab.rules() == ""


def test_two_changes_at_once_are_both_made(place: Any) -> None:
    place.lab.modify(remove=UidRanges.parse("245010-245029"))
    command = place.command("cluster", "modify", "--add-uids")
    parts = ("245010-245014", "245015-245019")
    rivals = [subprocess.Popen([*command, part], stdout=subprocess.DEVNULL) for part in parts]
    assert [rival.wait(60) for rival in rivals] == [0, 0]
    assert pool_of(place) == "245000-245019"
    assert place.lab.rules() == "245000-245019"


# Users -------------------------------------------------------------------------------------------


def test_the_model_pool_without_a_pool_is_refused(place: Any) -> None:
    place.lab.modify(uid_pool=UidRanges.parse(""), security_model=SecurityModel.NONE)
    error = place.refused(SecurityRefused, security_model="pool")
    assert "cluster modify --uid-pool" in error.hint


@pytest.fixture
def own_users() -> Iterator[UidRanges]:
    """Users that a test may take away."""
    pool = UidRanges.parse(MISSING)
    provision.apply(provision.plan(pool, Snapshot.read()))
    yield pool
    provision.remove(provision.plan_removal(pool, Snapshot.read()))


def test_a_user_that_was_deleted_is_missed_before_anything_runs_as_its_uid(
    place: Any, own_users: UidRanges
) -> None:
    place.lab.modify(uid_pool=own_users)
    for uid in own_users:
        subprocess.run(["userdel", f"kvmsec-{uid}"], check=True, capture_output=True)
    error = place.refused(MissingUser)
    assert error.uid in own_users
    assert error.hint == f"make it with `kvmsec uids provision {error.uid}`"
    provision.apply(provision.plan(own_users, Snapshot.read()))
    assert place.lab.start().uid in own_users
    place.lab.stop()


# Uids that are taken -----------------------------------------------------------------------------


@pytest.fixture
def occupy() -> Iterator[Callable[[int], None]]:
    """Lets a process of nobody's business have a uid."""
    children: list[Child] = []

    def have(uid: int) -> None:
        reader, writer = os.pipe()

        def stay() -> None:
            os.write(writer, b"!")
            signal.pause()

        children.append(
            start_child(stay, what="an occupant", credentials=Credentials(uid, uid), keep=[writer])
        )
        os.close(writer)
        assert os.read(reader, 1)
        os.close(reader)

    yield have
    for child in children:
        child.close()


def test_a_uid_that_somebody_has_is_quarantined_and_another_drawn(
    place: Any, occupy: Callable[[int], None]
) -> None:
    place.lab.modify(uid_pool=UidRanges.parse("245000-245001"))
    occupy(245000)
    drawn = set()
    while 245000 not in {one.uid for one in place.lab.claims.quarantined()}:
        drawn.add(place.lab.start().uid)
        place.lab.stop()
    assert drawn <= {245001}
    (held,) = place.lab.claims.quarantined()
    assert "processes" in held.reason
    # Whoever releases it says that what it has may be ended.
    assert place.kvmsec("uids", "release", "245000").status == 0


def test_a_pool_of_taken_uids_is_told_before_anything_is_touched(
    place: Any, occupy: Callable[[int], None]
) -> None:
    place.lab.modify(uid_pool=UidRanges.parse("245000"))
    occupy(245000)
    with pytest.raises(NoCleanUid) as caught:
        place.lab.start()
    assert list(caught.value.reasons) == [245000]
    assert place.kvmsec("instance", "start", "web", "--accel", "tcg").refused("1 quarantined")
    assert place.kvmsec("uids", "release", "245000").status == 0


def test_an_exhausted_pool_is_told_before_anything_is_touched(place: Any) -> None:
    place.lab.modify(uid_pool=UidRanges.parse("245000-245001"))
    place.lab.start("one")
    place.lab.start("two")
    # The bridge does not exist: what is wrong with it would be found once taps are made.
    nics = [{"bridge": "nobridge"}]
    error = place.refused(PoolExhausted, nics=nics, disks=[{"path": "/nowhere"}])
    assert "of 2, 2 leased, 0 resting, 0 quarantined" in error.message
    place.lab.stop("one")
    place.lab.stop("two")
