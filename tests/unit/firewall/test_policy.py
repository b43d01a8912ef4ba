"""A policy is valid or it isn't made."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from firewall.errors import PolicyError
from firewall.policy import MARK, LogSettings, Policy, format_uids

pairs = st.lists(
    st.tuples(st.integers(1, 300), st.integers(0, 40)).map(lambda p: (p[0], p[0] + p[1])),
    max_size=8,
)


@given(pairs)
def test_ranges_are_sorted_disjoint_and_cover_the_same_uids(given_pairs):
    policy = Policy(tuple(given_pairs))
    expected = {uid for first, last in given_pairs for uid in range(first, last + 1)}
    assert {uid for uid in range(400) if policy.covers(uid)} == expected
    for (_, last), (first, _) in zip(policy.uids, policy.uids[1:], strict=False):
        assert first > last + 1


def test_a_pool_of_two_thousand_million_uids_costs_nothing():
    policy = Policy(((1, 2_000_000_000),))
    assert policy.covers(1_999_999_999)
    assert not policy.covers(2_000_000_001)


@pytest.mark.parametrize("pair", [(0, 5), (5, 4), (-3, 4), (1, 2**32 - 1), (2**32, 2**32 + 1)])
def test_uids_that_no_instance_may_have_are_refused(pair):
    with pytest.raises(PolicyError):
        Policy((pair,))


@pytest.mark.parametrize("tag", ["", "KVMSEC", "kvmsec_", "kvmsec_0123abc", "kvmsec; drop", "x"])
def test_a_tag_names_a_rule_set_of_ours(tag):
    with pytest.raises(PolicyError):
        Policy((), tag=tag)


def test_all_problems_are_named_at_once():
    with pytest.raises(PolicyError) as caught:
        LogSettings(prefix="x" * 30, group=65536, per_minute=0)
    assert len(caught.value.problems) == 3
    assert caught.value.hint


@pytest.mark.parametrize(
    "prefix",
    [
        "",
        "   ",
        "p" * 30,
        "ganeti uid pool user network traffic",
        'say "no"',
        "it's",
        "back\\slash",
        "$variable",
        "new\nline",
        "tab\t",
        "nul\0",
        "é",
        "\x7f",
        "\udc80",
    ],
)
def test_a_prefix_that_a_backend_would_cut_or_misread_is_refused(prefix):
    with pytest.raises(PolicyError):
        LogSettings(prefix=prefix)


@given(st.text(st.sampled_from([chr(code) for code in range(33, 127)]), min_size=1, max_size=29))
def test_other_printable_prefixes_are_taken(prefix):
    if set(prefix) & set("\"'\\$"):
        with pytest.raises(PolicyError):
            LogSettings(prefix=prefix)
    else:
        assert LogSettings(prefix=prefix).prefix == prefix


@pytest.mark.parametrize("group", [0, 1, 65535])
def test_log_groups_of_the_kernel_are_taken(group):
    assert LogSettings(group=group).group == group


def test_uids_are_written_as_people_write_them():
    assert format_uids(((1000, 5000), (8000, 8000))) == "1000-5000,8000"
    assert format_uids(()) == ""


def test_the_mark_leaves_room_for_others():
    assert MARK < 2**31
    assert MARK & 0xFFFF == 0
    assert MARK.bit_count() == 10
