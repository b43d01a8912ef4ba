"""Which uids may be drawn, and the choice of one: pure, and quick for a million leases."""

from array import array
from bisect import bisect_left, bisect_right
from collections.abc import Callable, Iterable
from typing import Final

from uidpool.errors import PoolExhausted
from uidpool.ranges import LAST_UID, UidRanges
from uidpool.records import Rest

_DRAWABLE: Final = UidRanges.of((1, LAST_UID))


class Occupation:
    """The uids that are held, kept back or resting at one moment; `leased` is sorted."""

    def __init__(
        self,
        *,
        leased: "array[int]",
        quarantined: Iterable[int],
        rests: Iterable[Rest],
        now_ms: int,
    ) -> None:
        self._leased = leased
        self._quarantined = frozenset(quarantined)
        self._rests = [rest for rest in rests if not rest.is_over(now_ms)]

    def rests(self) -> list[Rest]:
        """The rests that are not over."""
        return self._rests

    def rests_of(self, uid: int) -> list[Rest]:
        return [rest for rest in self._rests if rest.uid == uid]

    def choose(self, uids: UidRanges, random_below: Callable[[int], int]) -> int:
        """One of the free uids, each as likely as the others; else the longest-rested one.

        `random_below(n)` gives a number from 0 to n - 1. Raises PoolExhausted.
        """
        uids = uids & _DRAWABLE
        leased = _inside(uids, self._leased)
        quarantined = {uid for uid in self._quarantined if uid in uids and not _has(leased, uid)}
        resting = [rest for rest in self._rests if rest.uid in uids and not _has(leased, rest.uid)]
        besides = sorted(quarantined.union(rest.uid for rest in resting))
        free = uids.size() - len(leased) - len(besides)
        if free:
            return _nth_free(uids, leased, besides, random_below(free))
        candidates = [rest for rest in resting if rest.uid not in quarantined]
        if candidates:
            return min(candidates, key=lambda rest: (rest.since_ms, rest.uid)).uid
        raise PoolExhausted(size=uids.size(), leased=len(leased), quarantined=len(quarantined))


def _inside(uids: UidRanges, ordered: "array[int]") -> "array[int]":
    """Those of some sorted uids that are in the set: slices, for there may be a million."""
    found = array(ordered.typecode)
    for first, last in uids.ranges:
        found += ordered[bisect_left(ordered, first) : bisect_right(ordered, last)]
    return found


def _has(ordered: "array[int]", uid: int) -> bool:
    place = bisect_left(ordered, uid)
    return place < len(ordered) and ordered[place] == uid


def _nth_free(uids: UidRanges, leased: "array[int]", besides: list[int], index: int) -> int:
    """The uid at `index` among those that are neither leased nor among the few `besides`.

    Both are sorted, inside `uids`, and have no uid in common.
    """

    def rank_unleased(place: int) -> int:
        return uids.index(besides[place]) - bisect_left(leased, besides[place])

    unleased = _skipping(index, len(besides), rank_unleased)
    return uids.nth(_skipping(unleased, len(leased), lambda place: uids.index(leased[place])))


def _skipping(index: int, count: int, rank: Callable[[int], int]) -> int:
    """The rank of what is at `index` once `count` elements, at ascending ranks, are left out.

    Before the one at place i there are (its rank - i) that stay, which never falls from one to the
    next: a binary search finds how many of those left out come before.
    """
    return index + bisect_right(range(count), index, key=lambda place: rank(place) - place)
