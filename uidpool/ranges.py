"""The uid pool as text and as a set of inclusive ranges.

Nothing here ever expands a range: two thousand million uids cost as much as one.
"""

import re
from bisect import bisect_right
from collections.abc import Iterable, Iterator
from typing import Final, Self

from attrs import field, frozen

from uidpool.errors import RangeSyntaxError

Pairs = tuple[tuple[int, int], ...]

LAST_UID: Final = 2**31 - 1
"""The highest uid that a pool may hold.

Above it programs that keep a uid in a signed 32-bit word go wrong (systemd, Users, Groups, UIDs
and GIDs on systemd Systems), and 4294967295 means "no uid" to the kernel (setreuid(2)).
"""
_NO_UID: Final = 2**32 - 1
_TEXT_LIMIT: Final = 1 << 20
_PROBLEM_LIMIT: Final = 10
_EXCERPT_LIMIT: Final = 24
_BLANKS: Final = " \t\r\n"
_PART: Final = re.compile(r"([0-9]+)(?:[ \t\r\n]*-[ \t\r\n]*([0-9]+))?", re.ASCII)


@frozen
class SyntaxProblem:
    """One bad part of a pool's text: where it begins (in characters, from 0), how, and why."""

    offset: int
    text: str
    why: str

    def __str__(self) -> str:
        return f"at character {self.offset + 1}, {_excerpt(self.text)}: {self.why}"


def _merged(pairs: Iterable[tuple[int, int]]) -> Pairs:
    """The canonical form: sorted, disjoint, and neighbours joined."""
    merged: list[tuple[int, int]] = []
    for first, last in sorted(pairs):
        if not 0 <= first <= last <= _NO_UID:
            raise ValueError(f"{first}-{last} is not a range of uids")
        if merged and first <= merged[-1][1] + 1:
            merged[-1] = (merged[-1][0], max(last, merged[-1][1]))
        else:
            merged.append((first, last))
    return tuple(merged)


@frozen(repr=False)
class UidRanges:
    """A set of uids, kept as sorted, disjoint, inclusive ranges that do not touch each other.

    Two of them are equal when they hold the same uids. Made by `parse` and `of`; iterating goes
    through the uids one by one, which is for small sets only.
    """

    ranges: Pairs = field(default=(), converter=_merged)
    _firsts: tuple[int, ...] = field(init=False, eq=False)
    _counts: tuple[int, ...] = field(init=False, eq=False)  # of uids up to each range's end

    def __attrs_post_init__(self) -> None:
        counts, total = [], 0
        for first, last in self.ranges:
            total += last - first + 1
            counts.append(total)
        object.__setattr__(self, "_firsts", tuple(first for first, _ in self.ranges))
        object.__setattr__(self, "_counts", tuple(counts))

    @classmethod
    def parse(cls, text: str) -> Self:
        """Read a pool such as `1000-5000,8000,9000-9010`.

        Bounds are inclusive; blanks and empty parts are fine; the parts may overlap. Raises
        RangeSyntaxError, which names every bad part (the first ten of many).
        """
        if len(text) > _TEXT_LIMIT:
            why = f"is {len(text)} characters long, and {_TEXT_LIMIT} are the most"
            raise RangeSyntaxError([SyntaxProblem(0, text[: _EXCERPT_LIMIT + 1], why)])
        pairs, problems, left_out = _read_parts(text)
        if problems:
            raise RangeSyntaxError(problems, left_out)
        return cls(tuple(pairs))

    @classmethod
    def of(cls, *pairs: tuple[int, int]) -> Self:
        """The set of these inclusive ranges; raises ValueError for a pair that is not a range."""
        return cls(pairs)

    @classmethod
    def of_uids(cls, uids: Iterable[int]) -> Self:
        """The set of these single uids, in any order."""
        return cls(tuple((uid, uid) for uid in uids))

    def __str__(self) -> str:
        return ",".join(
            str(first) if first == last else f"{first}-{last}" for first, last in self.ranges
        )

    def __repr__(self) -> str:
        return f"UidRanges({str(self)!r})"

    def __bool__(self) -> bool:
        return bool(self.ranges)

    def __contains__(self, uid: object) -> bool:
        if not isinstance(uid, int):
            return False
        index = bisect_right(self._firsts, uid) - 1
        return index >= 0 and uid <= self.ranges[index][1]

    def __iter__(self) -> Iterator[int]:
        for first, last in self.ranges:
            yield from range(first, last + 1)

    def size(self) -> int:
        """How many uids there are."""
        return self._counts[-1] if self._counts else 0

    def nth(self, index: int) -> int:
        """The uid at `index` in ascending order, from 0; raises IndexError outside `size()`."""
        if not 0 <= index < self.size():
            raise IndexError(f"there is no element {index} among {self.size()} uids")
        which = bisect_right(self._counts, index)
        return self.ranges[which][1] - (self._counts[which] - 1 - index)

    def index(self, uid: int) -> int:
        """The place of a uid in ascending order, from 0; raises ValueError when it isn't there."""
        if uid not in self:
            raise ValueError(f"{uid} is not among the uids")
        which = bisect_right(self._firsts, uid) - 1
        return self._counts[which] - 1 - (self.ranges[which][1] - uid)

    def __or__(self, other: Self) -> Self:
        return type(self)(self.ranges + other.ranges)

    def __and__(self, other: Self) -> Self:
        common = []
        mine, theirs = list(reversed(self.ranges)), list(reversed(other.ranges))
        while mine and theirs:
            first = max(mine[-1][0], theirs[-1][0])
            last = min(mine[-1][1], theirs[-1][1])
            if first <= last:
                common.append((first, last))
            (mine if mine[-1][1] <= theirs[-1][1] else theirs).pop()
        return type(self)(tuple(common))

    def __sub__(self, other: Self) -> Self:
        return self & other.complement()

    def complement(self) -> Self:
        """Every 32-bit uid that is not in the set."""
        gaps, start = [], 0
        for first, last in self.ranges:
            if start < first:
                gaps.append((start, first - 1))
            start = last + 1
        if start <= _NO_UID:
            gaps.append((start, _NO_UID))
        return type(self)(tuple(gaps))

    def isdisjoint(self, other: Self) -> bool:
        """Whether no uid is in both."""
        return not self & other


EMPTY: Final = UidRanges()


def _read_parts(text: str) -> tuple[list[tuple[int, int]], list[SyntaxProblem], int]:
    """The ranges, the first bad parts, and how many more bad ones there are."""
    pairs: list[tuple[int, int]] = []
    problems: list[SyntaxProblem] = []
    left_out = 0
    offset = 0
    for raw in text.split(","):
        part = raw.strip(_BLANKS)
        if part:
            found = _read_part(part)
            if not isinstance(found, str):
                pairs.append(found)
            elif len(problems) < _PROBLEM_LIMIT:
                start = offset + len(raw) - len(raw.lstrip(_BLANKS))
                problems.append(SyntaxProblem(start, part[: _EXCERPT_LIMIT + 1], found))
            else:
                left_out += 1
        offset += len(raw) + 1
    return pairs, problems, left_out


def _read_part(part: str) -> tuple[int, int] | str:
    """The range that a part stands for, or what is wrong with it."""
    match = _PART.fullmatch(part)
    if match is None:
        return _why_not_a_range(part)
    low, high = match[1], match[2] or match[1]
    for digits in dict.fromkeys((low, high)):
        if why := _why_not_a_uid(digits):
            return why
    first, last = int(low), int(high)
    if first > last:
        return f"the range ends at {last}, before it begins at {first}"
    return first, last


def _why_not_a_uid(digits: str) -> str | None:
    digits = digits.lstrip("0")
    if not digits:
        return "uid 0 is root, which no instance may be"
    if len(digits) > len(str(_NO_UID)) or int(digits) > _NO_UID:
        return "there is no such uid: a uid is a 32-bit number"
    if int(digits) == _NO_UID:
        return "4294967295 is the kernel's word for no uid at all"
    if int(digits) > LAST_UID:
        return f"uids from {LAST_UID + 1} (2^31) on are not safe to use"
    return None


def _why_not_a_range(part: str) -> str:
    if part.startswith("-"):
        return "the range has no beginning (a uid is never negative)"
    if part.endswith("-") and part.count("-") == 1:
        return "the range has no end"
    if part.count("-") > 1:
        return "more than one '-': a range is FIRST-LAST"
    if any(not (one.isascii() and one.isdigit()) for one in part if one not in "-" + _BLANKS):
        return "only the digits 0-9, '-' and ',' belong in a pool"
    return "a ',' is missing between two numbers"


def _excerpt(text: str) -> str:
    """The text as a short literal; control characters come out escaped."""
    short = ascii(text[:_EXCERPT_LIMIT])
    return short if len(text) <= _EXCERPT_LIMIT else short + "..."
