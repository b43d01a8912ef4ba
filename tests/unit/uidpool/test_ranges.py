"""The pool's text and its set arithmetic, held against plain sets of numbers."""

import itertools
import time

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from uidpool.errors import RangeSyntaxError
from uidpool.ranges import EMPTY, LAST_UID, UidRanges

UNIVERSE = 60
pairs = st.tuples(st.integers(1, UNIVERSE), st.integers(0, 8)).map(
    lambda pair: (pair[0], min(pair[0] + pair[1], UNIVERSE))
)
pair_lists = st.lists(pairs, max_size=12)
blanks = st.sampled_from(["", " ", "\t", "\n", "  "])


def expand(chosen: list[tuple[int, int]]) -> set[int]:
    return {uid for first, last in chosen for uid in range(first, last + 1)}


@given(pair_lists)
def test_a_set_of_ranges_holds_the_same_uids_as_a_plain_set(chosen: list[tuple[int, int]]) -> None:
    ranges, model = UidRanges.of(*chosen), expand(chosen)
    assert list(ranges) == sorted(model)
    assert ranges.size() == len(model)
    assert bool(ranges) == bool(model)
    assert [uid in ranges for uid in range(UNIVERSE + 2)] == [
        uid in model for uid in range(UNIVERSE + 2)
    ]
    assert [ranges.nth(index) for index in range(ranges.size())] == sorted(model)


@given(pair_lists)
def test_the_canonical_form_is_sorted_disjoint_and_has_no_neighbours(
    chosen: list[tuple[int, int]],
) -> None:
    canonical = UidRanges.of(*chosen).ranges
    assert all(first <= last for first, last in canonical)
    assert all(left[1] + 1 < right[0] for left, right in itertools.pairwise(canonical))


@given(pair_lists, pair_lists)
def test_arithmetic_agrees_with_plain_sets(
    one: list[tuple[int, int]], two: list[tuple[int, int]]
) -> None:
    a, b, model_a, model_b = UidRanges.of(*one), UidRanges.of(*two), expand(one), expand(two)
    assert set(a | b) == model_a | model_b
    assert set(a & b) == model_a & model_b
    assert set(a - b) == model_a - model_b
    assert a.isdisjoint(b) == model_a.isdisjoint(model_b)
    assert (a == b) == (model_a == model_b)
    assert hash(a | b) == hash(b | a)


@given(pair_lists, st.data())
def test_what_is_written_is_read_back(chosen: list[tuple[int, int]], data: st.DataObject) -> None:
    ranges = UidRanges.of(*chosen)
    assert UidRanges.parse(str(ranges)) == ranges
    loose = ",".join(
        f"{data.draw(blanks)}{first}{data.draw(blanks)}-{data.draw(blanks)}{last}"
        f"{data.draw(blanks)}{data.draw(st.sampled_from(['', ',', ' ,']))}"
        for first, last in chosen
    )
    assert UidRanges.parse(loose) == ranges


@given(st.text(alphabet="0123456789-, \n٣x_+", max_size=30))
@example("")
@example(",,")
def test_a_text_is_either_a_pool_or_a_parse_error(text: str) -> None:
    try:
        ranges = UidRanges.parse(text)
    except RangeSyntaxError as error:
        assert error.problems
        assert all(
            text[problem.offset :].startswith(problem.text[:25]) for problem in error.problems
        )
    else:
        assert all(1 <= first <= last <= LAST_UID for first, last in ranges.ranges)


def test_removing_one_uid_from_a_range_leaves_two_ranges() -> None:
    left = UidRanges.parse("1000-1010") - UidRanges.parse("1003")
    assert str(left) == "1000-1002,1004-1010"


def test_overlapping_and_touching_parts_become_one_range() -> None:
    assert str(UidRanges.parse("1005-1010, ,1000-1004,,1008-1020 ")) == "1000-1020"


def test_a_pool_of_two_thousand_million_uids_costs_nothing() -> None:
    started = time.perf_counter()
    pool = UidRanges.parse(f"1-{LAST_UID}")
    assert pool.size() == LAST_UID
    assert pool.nth(LAST_UID - 1) == LAST_UID
    assert (pool - UidRanges.parse("1000000")).size() == LAST_UID - 1
    assert time.perf_counter() - started < 0.1


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("-5", "no beginning"),
        ("5-", "no end"),
        ("5-3", "before it begins"),
        ("1-2-3", "more than one '-'"),
        ("0", "root"),
        ("0-5", "root"),
        ("4294967295", "no uid at all"),
        ("4294967296", "32-bit"),
        ("2147483648", "2^31"),
        ("1000-4294967294", "2^31"),
        ("٣", "only the digits"),
        ("1_000", "only the digits"),
        ("+5", "only the digits"),
        ("0x10", "only the digits"),
        ("1 000", "',' is missing"),
        ("1\xa0", "only the digits"),
        ("9" * 5000, "32-bit"),
        ("1--2", "more than one '-'"),
        ("-", "no beginning"),
    ],
)
def test_a_bad_part_is_refused_with_its_reason(text: str, reason: str) -> None:
    with pytest.raises(RangeSyntaxError, match=r".") as caught:
        UidRanges.parse(text)
    assert reason in caught.value.message
    assert "1000-5000,8000" in (caught.value.hint or "")


def test_every_bad_part_is_named_with_its_place() -> None:
    with pytest.raises(RangeSyntaxError) as caught:
        UidRanges.parse("1000, -5,7, 0\n,9-8")
    places = [(problem.offset, problem.text) for problem in caught.value.problems]
    assert places == [(6, "-5"), (12, "0"), (15, "9-8")]


@pytest.mark.parametrize("text", ["x," * 400_000, "٣" * 3_000_000, "9" * 900_000, "1,-," * 200_000])
def test_megabytes_of_nonsense_get_a_short_answer_quickly(text: str) -> None:
    started = time.perf_counter()
    with pytest.raises(RangeSyntaxError) as caught:
        UidRanges.parse(text)
    assert len(caught.value.message) < 2000
    assert time.perf_counter() - started < 2


def test_control_characters_of_a_bad_part_are_escaped() -> None:
    with pytest.raises(RangeSyntaxError) as caught:
        UidRanges.parse("\x1b[2Jhello")
    assert "\x1b" not in caught.value.message


@pytest.mark.parametrize("pair", [(5, 3), (-1, 4), (0, 2**32)])
def test_a_pair_that_is_no_range_is_a_programming_error(pair: tuple[int, int]) -> None:
    with pytest.raises(ValueError, match="not a range"):
        UidRanges.of(pair)


def test_an_element_outside_the_set_is_an_index_error() -> None:
    with pytest.raises(IndexError):
        UidRanges.parse("5-6").nth(2)
    with pytest.raises(IndexError):
        EMPTY.nth(0)
    with pytest.raises(IndexError):
        UidRanges.parse("5-6").nth(-1)
