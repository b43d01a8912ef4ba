"""The checks among the benchmarks, which can fail a run: what they see, and what they let pass."""

import pytest

from benchmarks import peers
from benchmarks.draw import double_draws
from benchmarks.long_run import differences
from benchmarks.rule_sets import FIRST, Pool


def test_a_uid_that_is_had_by_two_at_once_is_seen() -> None:
    assert double_draws([(7, 0.0, 1.0, 3.0), (7, 0.0, 2.0, 4.0)]) == 1


def test_a_uid_that_was_given_back_may_be_drawn_again() -> None:
    assert double_draws([(7, 0.0, 2.0, 3.0), (8, 0.0, 1.0, 9.0), (7, 0.0, 1.0, 2.0)]) == 0


def test_what_is_not_as_before_is_told() -> None:
    before = {"descriptors": 9, "packet rules": "75, 0123abcd"}

    assert differences(before, before) == ()
    assert differences(before, {**before, "descriptors": 10}) == (
        "descriptors: 9 before, 10 after",
    )


def test_what_is_the_whole_hosts_is_held_against_nobody() -> None:
    assert differences({"groups": "(3)"}, {"groups": "(4)"}) == ()


def test_uids_that_lie_each_by_itself_never_touch() -> None:
    assert Pool(3, is_scattered=True).pairs == tuple((FIRST + n, FIRST + n) for n in (0, 2, 4))
    assert Pool(3, is_scattered=False).pairs == ((FIRST, FIRST + 2),)


def test_a_peer_that_is_not_there_is_told_with_what_to_do(
    monkeypatch: pytest.MonkeyPatch, tmp_path: object
) -> None:
    monkeypatch.setattr(peers, "TREE", tmp_path)

    assert "--install-peers" in (peers.lacks_libvirt() or "")
    assert "--install-peers" in (peers.lacks_ganeti() or "")
