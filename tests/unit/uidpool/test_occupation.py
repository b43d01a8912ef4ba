"""Which uid is drawn: every free one with the same chance, resting ones last."""

from array import array
from collections import Counter
from collections.abc import Iterable

import pytest
from hypothesis import given
from hypothesis import strategies as st

from uidpool.errors import PoolExhausted
from uidpool.occupation import Occupation
from uidpool.ranges import EMPTY, UidRanges
from uidpool.records import Rest

uids = st.integers(1, 60)
uid_sets = st.frozensets(uids, max_size=40)


def occupation(
    leased: Iterable[int] = (), quarantined: Iterable[int] = (), rests: Iterable[Rest] = ()
) -> Occupation:
    held = array("I", sorted(leased))
    return Occupation(leased=held, quarantined=quarantined, rests=rests, now_ms=100_000)


@given(uid_sets, uid_sets, uid_sets, uid_sets)
def test_every_free_uid_is_drawn_by_exactly_one_number(
    pool: frozenset[int],
    leased: frozenset[int],
    quarantined: frozenset[int],
    resting: frozenset[int],
) -> None:
    free = pool - leased - quarantined - resting
    rests = [Rest(uid, 90_000 + uid, 60_000) for uid in resting]
    now = occupation(leased, quarantined, rests)
    asked: list[int] = []
    for number in range(max(len(free), 1)):
        try:
            chosen = now.choose(
                UidRanges.of_uids(pool), lambda below, number=number: asked.append(below) or number
            )
        except PoolExhausted as exhausted:
            assert not free and not (pool & resting) - leased - quarantined
            assert exhausted.leased == len(pool & leased)
            assert exhausted.quarantined == len((pool & quarantined) - leased)
            assert exhausted.size == len(pool)
            return
        if free:
            assert chosen == sorted(free)[number]
            assert asked[-1] == len(free)
        else:
            assert chosen == min((pool & resting) - leased - quarantined)


def test_draws_are_spread_evenly() -> None:
    import secrets

    pool = UidRanges.parse("10-14,20-24")
    now = occupation(leased=[11, 20])
    drawn = Counter(now.choose(pool, secrets.randbelow) for _ in range(8000))
    assert set(drawn) == {10, 12, 13, 14, 21, 22, 23, 24}
    assert all(800 < count < 1200 for count in drawn.values())


def test_the_uid_that_rested_longest_is_drawn_when_nothing_else_is_free() -> None:
    rests = [Rest(1, 99_000, 60_000), Rest(2, 98_000, 60_000), Rest(3, 97_000, 60_000)]
    now = occupation(leased=[3], rests=rests)
    assert now.choose(UidRanges.parse("1-3"), lambda below: 0) == 2


def test_a_rest_that_is_over_makes_the_uid_free() -> None:
    now = occupation(rests=[Rest(1, 39_999, 60_000), Rest(2, 40_001, 60_000)])
    assert now.choose(UidRanges.parse("1-2"), lambda below: below - 1) == 1


def test_an_exhausted_pool_says_why() -> None:
    with pytest.raises(PoolExhausted) as caught:
        occupation(leased=[1, 2, 9], quarantined=[3]).choose(UidRanges.parse("1-3"), lambda _: 0)
    assert "of 3, 2 leased, 0 resting, 1 quarantined" in caught.value.message
    assert "add uids" in (caught.value.hint or "")


@pytest.mark.parametrize("pool", [EMPTY, UidRanges.of((0, 0)), UidRanges.of((2**31, 2**32 - 1))])
def test_root_and_unsafe_uids_are_never_drawn(pool: UidRanges) -> None:
    with pytest.raises(PoolExhausted):
        occupation().choose(pool, lambda _: 0)


@given(uids, st.integers(0, 10**15), st.integers(0, 10**12))
def test_a_rest_is_read_back_from_its_name(uid: int, since_ms: int, delay_ms: int) -> None:
    rest = Rest(uid, since_ms, delay_ms)
    assert Rest.from_name(rest.name) == rest


@given(st.text(max_size=20))
def test_no_name_upsets_the_reading_of_rests(name: str) -> None:
    rest = Rest.from_name(name)
    assert rest is None or rest.uid >= 0
