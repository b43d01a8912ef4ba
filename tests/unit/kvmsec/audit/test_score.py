"""The sum of exposures, and the word for it."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvmsec.audit.score import Finding, rating, score


def finding(exposure: float) -> Finding:
    return Finding(code="x", exposure=exposure, weight=10.0, state="exposed", message="m", why="w")


@pytest.mark.parametrize(
    ("value", "word"),
    [
        (0.0, "PERFECT"),
        (0.04, "PERFECT"),
        (0.1, "SAFE"),
        (0.94, "SAFE"),
        (0.96, "OK"),  # it is shown as 1.0
        (4.9, "OK"),
        (5.0, "MEDIUM"),
        (7.5, "EXPOSED"),
        (9.0, "UNSAFE"),
        (10.0, "DANGEROUS"),
    ],
)
def test_the_words_are_systemd_s(value: float, word: str) -> None:
    assert rating(value) == word


@given(st.lists(st.floats(0, 3)))
def test_a_score_is_between_nothing_and_ten_and_grows_with_each_finding(
    exposures: list[float],
) -> None:
    scores = [score(map(finding, exposures[:count])) for count in range(len(exposures) + 1)]

    assert scores == sorted(scores)
    assert all(0.0 <= one <= 10.0 for one in scores)
    assert scores[0] == 0.0
