"""Statistics of a series of measurements; pure."""

import math
import statistics
from collections.abc import Collection, Mapping, Sequence

from attrs import frozen


@frozen
class Summary:
    """A series in three numbers: its median, and what a tenth lies below and above."""

    median: float
    p10: float
    p90: float
    count: int


def summarise(values: Collection[float], *, scale: float = 1.0) -> Summary:
    """A series, each value times `scale`. Raises ValueError for an empty one."""
    if not values:
        raise ValueError("there is no median of nothing")
    ordered = sorted(value * scale for value in values)
    tenth = len(ordered) // 10
    return Summary(statistics.median(ordered), ordered[tenth], ordered[-1 - tenth], len(ordered))


def milliseconds(seconds: Collection[float]) -> Summary:
    return summarise(seconds, scale=1e3)


def ratio(values: Collection[float], base: Collection[float]) -> float:
    """How many times the median of `base` the median of `values` is."""
    return statistics.median(values) / statistics.median(base)


def growth(values: Sequence[float]) -> float:
    """The median of a series' last fifth over that of its first, without the very first value."""
    settled = values[1:] if len(values) > 5 else values
    fifth = max(len(settled) // 5, 1)
    return statistics.median(settled[-fifth:]) / statistics.median(settled[:fifth])


def slope(values: Sequence[float]) -> float:
    """Growth from one value to the next by least squares, without the first tenth."""
    settled = values[len(values) // 10 :]
    if len(settled) < 2:
        return 0.0
    return statistics.linear_regression(range(len(settled)), settled).slope


@frozen
class Uniformity:
    """Whether counts look as if each value had the same chance.

    `p_value`: how often a uniform draw would be at least as uneven as this.
    """

    chi_squared: float
    degrees: int
    p_value: float


def uniformity(counts: Mapping[int, int], values: int) -> Uniformity:
    """Pearson's chi-squared test that each of `values` values was as likely; the absent count too.

    The tail of the distribution is Wilson and Hilferty's approximation (1931), good to three
    digits from ten degrees of freedom. Raises ValueError below two values, or for no draw.
    """
    draws, degrees = sum(counts.values()), values - 1
    if degrees < 1 or not draws:
        raise ValueError("a test of uniformity needs two values and a draw")
    expected = draws / values
    squares = sum((count - expected) ** 2 for count in counts.values())
    squares += (values - len(counts)) * expected**2
    found = squares / expected
    variance = 2 / (9 * degrees)
    deviation = ((found / degrees) ** (1 / 3) - (1 - variance)) / math.sqrt(variance)
    return Uniformity(found, degrees, 0.5 * math.erfc(deviation / math.sqrt(2)))
