"""Which uids may be drawn, and the choice of one: pure, and quick for thousands of records."""

from bisect import bisect_left, bisect_right
from collections.abc import Callable, Iterable
from typing import Final

from uidpool.errors import PoolExhausted
from uidpool.ranges import LAST_UID, UidRanges
from uidpool.records import Rest

_DRAWABLE: Final = UidRanges.of((1, LAST_UID))


class Occupation:
    """The uids that are held, kept back or resting at one moment."""

    def __init__(
        self,
        *,
        leased: Iterable[int],
        quarantined: Iterable[int],
        rests: Iterable[Rest],
        now_ms: int,
    ) -> None:
        self._leased = frozenset(leased)
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
        kept_back = self._leased | self._quarantined
        resting = {rest.uid for rest in self._rests}
        taken = _inside(uids, kept_back | resting)
        free = uids.size() - len(taken)
        if free:
            return _nth_free(uids, taken, random_below(free))
        candidates = [
            rest for rest in self._rests if rest.uid in uids and rest.uid not in kept_back
        ]
        if candidates:
            return min(candidates, key=lambda rest: (rest.since_ms, rest.uid)).uid
        raise PoolExhausted(
            size=uids.size(),
            leased=len(_inside(uids, self._leased)),
            quarantined=len(_inside(uids, self._quarantined - self._leased)),
        )


def _inside(uids: UidRanges, chosen: Iterable[int]) -> list[int]:
    """Those of the chosen uids that are in the set, sorted."""
    ordered = sorted(chosen)
    found: list[int] = []
    for first, last in uids.ranges:
        found += ordered[bisect_left(ordered, first) : bisect_right(ordered, last)]
    return found


def _nth_free(uids: UidRanges, taken: list[int], index: int) -> int:
    """The uid at `index` among those not taken; `taken` is sorted and inside `uids`.

    Before the taken uid at place i there are (its own place in the set - i) free ones, which
    never falls from one to the next: a binary search finds how many taken ones come before.
    """
    before = bisect_right(range(len(taken)), index, key=lambda place: _rank(uids, taken, place))
    return uids.nth(index + before)


def _rank(uids: UidRanges, taken: list[int], place: int) -> int:
    return uids.index(taken[place]) - place
