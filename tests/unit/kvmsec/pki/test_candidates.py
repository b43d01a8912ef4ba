"""The list of those who may order: whole and unambiguous, or nobody is on it."""

from uuid import UUID

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvmsec.pki.candidates import format_candidates, parse_candidates
from kvmsec.pki.errors import BadCandidates

A = "a0000000-0000-4000-8000-000000000000"
B = "b0000000-0000-4000-8000-000000000000"
ONE, TWO, THREE = "1" * 64, "2" * 64, "3" * 64


def test_a_list_is_read_and_written_in_a_fixed_order() -> None:
    text = f"{A}={ONE}\n{A}={TWO}\n{B}={THREE}\n"
    candidates = {UUID(A): frozenset({ONE, TWO}), UUID(B): frozenset({THREE})}

    assert parse_candidates(text) == candidates
    assert format_candidates(candidates) == text
    assert parse_candidates(f"\n{B}={THREE}\n\n{A}={TWO}\n{A}={ONE}") == candidates


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "it is empty"),
        ("\n\n", "it is empty"),
        (f"{A}", "line 1"),
        (f"{A}=\n", "line 1"),
        (f"{A}={ONE[:-1]}\n", "line 1"),
        (f"{A}={ONE}0\n", "line 1"),
        (f"{A}={'A' * 64}\n", "lower case"),
        (f"{A.upper()}={ONE}\n", "lower case"),
        (f"{A.replace('-', '')}={ONE}\n", "line 1"),
        (f" {A}={ONE}\n", "line 1"),
        (f"{A}={ONE} \n", "line 1"),
        (f"{A}={ONE}\r\n", "line 1"),
        (f"{A}={chr(0x661) * 64}\n", "line 1"),
        (f"{A}={ONE}\n{B}={ONE}\n", f"the certificate of the node {A} under {B}"),
        (f"{A}={ONE}\n{A}={ONE}\n", "line 2 says again"),
        (f"{A}={ONE}\n{A}={TWO}\n{A}={THREE}\n", "third certificate"),
        (f"{A}={ONE}\n\0\n", "line 2"),
    ],
)
def test_a_list_with_a_fault_lets_nobody_in(text: str, words: str) -> None:
    with pytest.raises(BadCandidates) as caught:
        parse_candidates(text)
    message = caught.value.message
    assert words in message
    assert "ssconf_master_candidates_certs" in message
    assert "ssconf_master_candidate_certs" in message
    assert caught.value.hint


def test_every_fault_is_found_at_once() -> None:
    with pytest.raises(BadCandidates) as caught:
        parse_candidates(f"x\n{A}={ONE}\ny\x1b[2J\n{B}={ONE}\n")
    assert len(caught.value.problems) == 3
    assert "\x1b" not in caught.value.message


def test_a_huge_list_of_faults_is_cut_short() -> None:
    with pytest.raises(BadCandidates) as caught:
        parse_candidates("x\n" * 100_000)
    assert len(caught.value.message) < 10_000


def test_a_list_that_lets_nobody_in_is_not_written() -> None:
    for candidates in ({}, {UUID(A): frozenset[str]()}, {UUID(A): frozenset({"x"})}):
        with pytest.raises(BadCandidates):
            format_candidates(candidates)


@given(st.text(alphabet=f"{A}={ONE}\nB ", max_size=300))
def test_whatever_is_read_is_written_the_same_way(text: str) -> None:
    try:
        candidates = parse_candidates(text)
    except BadCandidates:
        return
    assert candidates
    assert parse_candidates(format_candidates(candidates)) == candidates
