import random
import statistics
from collections import Counter

import pytest

from benchmarks import series


def test_a_series_is_told_by_its_median_and_a_tenth_on_either_side() -> None:
    found = series.summarise([float(value) for value in range(101)])

    assert (found.median, found.p10, found.p90, found.count) == (50, 10, 90, 101)


def test_the_order_of_a_series_does_not_matter() -> None:
    values = [float(value) for value in range(37)]
    shuffled = values.copy()
    random.Random(1).shuffle(shuffled)

    assert series.summarise(shuffled) == series.summarise(values)


def test_one_value_is_its_own_median_and_spread() -> None:
    assert series.summarise([7.0]) == series.Summary(7, 7, 7, 1)


def test_seconds_are_told_in_milliseconds() -> None:
    assert series.milliseconds([0.25]).median == 250


def test_nothing_has_no_median() -> None:
    with pytest.raises(ValueError, match="nothing"):
        series.summarise([])


def test_a_ratio_is_of_medians() -> None:
    assert series.ratio([1, 6, 100], [1, 3, 4]) == 2


def test_an_even_series_does_not_grow() -> None:
    assert series.growth([9.0] + [2.0] * 50) == 1
    assert series.slope([2.0] * 50) == 0


def test_growth_is_of_the_last_fifth_over_the_first() -> None:
    assert series.growth([float(value) for value in range(101)]) == statistics.median(
        range(81, 101)
    ) / statistics.median(range(1, 21))


def test_a_slope_is_what_comes_with_each_value() -> None:
    assert series.slope([3.0 * value for value in range(40)]) == pytest.approx(3)


def test_even_counts_are_uniform() -> None:
    found = series.uniformity(dict.fromkeys(range(50), 100), 50)

    assert (found.chi_squared, found.degrees) == (0, 49)
    assert found.p_value == pytest.approx(1)


def test_a_tail_of_the_distribution_is_as_in_the_tables() -> None:
    # The 95th percentile of chi-squared with 10 degrees of freedom is 18.307.
    expected, values = 1000.0, 11
    off = (18.307 * expected / 2) ** 0.5
    counts = dict.fromkeys(range(values), expected) | {0: expected + off, 1: expected - off}

    found = series.uniformity(counts, values)  # type: ignore[arg-type]

    assert found.chi_squared == pytest.approx(18.307)
    assert found.p_value == pytest.approx(0.05, abs=0.001)


def test_draws_of_a_fair_generator_pass_and_of_a_loaded_one_fail() -> None:
    chance = random.Random(42)
    fair = Counter(chance.randrange(100) for _ in range(20_000))
    loaded = Counter(min(chance.randrange(100), chance.randrange(100)) for _ in range(20_000))

    assert series.uniformity(fair, 100).p_value > 0.001
    assert series.uniformity(loaded, 100).p_value < 1e-6


def test_a_value_that_was_never_drawn_counts() -> None:
    assert series.uniformity(dict.fromkeys(range(90), 100), 100).p_value < 1e-6


def test_one_value_can_not_be_tested() -> None:
    with pytest.raises(ValueError, match="two values"):
        series.uniformity({1: 5}, 1)
