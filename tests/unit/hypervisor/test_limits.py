"""Resource limits: what is set, and how /proc shows it."""

import resource
from pathlib import Path

import pytest

from hypervisor.limits import UNLIMITED, Bound, ProcessLimits, parse_limits


def test_the_kernels_own_table_is_read() -> None:
    found = parse_limits(Path("/proc/self/limits").read_text())
    for name, number in (("Max open files", resource.RLIMIT_NOFILE), ("Max nice priority", 13)):
        soft, hard = resource.getrlimit(number)
        shown = ["unlimited" if value == UNLIMITED else str(value) for value in (soft, hard)]
        assert found[name] == tuple(shown)
    names = {bound.name for bound in ProcessLimits(processes=1).bounds}
    assert names <= set(found), "each limit has the kernel's name"


@pytest.mark.parametrize("text", ["", "\n", "Limit\n\n", "Limit Soft Hard\nMax open files\n"])
def test_a_table_cut_short_shows_nothing(text: str) -> None:
    assert parse_limits(text) == {}


def test_processes_are_limited_only_where_the_uid_is_the_instances_own() -> None:
    numbers = [bound.resource for bound in ProcessLimits().bounds]
    assert resource.RLIMIT_NPROC not in numbers
    assert len(set(numbers)) == len(numbers)
    own = [bound for bound in ProcessLimits(processes=97).bounds if bound.name == "Max processes"]
    assert [(bound.resource, bound.value) for bound in own] == [(resource.RLIMIT_NPROC, 97)]


def test_a_size_beyond_what_the_kernel_counts_is_its_largest() -> None:
    (size,) = (b for b in ProcessLimits(file_bytes=2**70).bounds if b.name == "Max file size")
    assert (size.value, size.shown) == (2**63 - 1, str(2**63 - 1))


def test_what_proc_shows_otherwise_is_told() -> None:
    problems = ProcessLimits(open_files=7, oom_score_adjust=-999).problems_of("self")
    assert any(problem.startswith("Max open files (") for problem in problems)
    assert any(problem.startswith("oom_score_adj ") for problem in problems)
    assert any(problem.startswith("coredump_filter 0x") for problem in problems)


@pytest.mark.parametrize(
    ("found", "exactly", "at_most"),
    [
        (("5", "5"), True, True),
        (("4", "4"), False, True),
        (("0", "0"), False, True),
        (("6", "6"), False, False),
        (("4", "5"), False, False),
        (("unlimited", "unlimited"), False, False),
        (None, False, False),
    ],
)
def test_lower_than_asked_does_only_where_it_is_said_to(
    found: tuple[str, str] | None, exactly: bool, at_most: bool
) -> None:
    assert Bound(1, "Max file size", 5).agrees_with(found) is exactly
    assert Bound(1, "Max file size", 5, may_be_lower=True).agrees_with(found) is at_most


def test_without_bound_is_nothing_less() -> None:
    assert Bound(1, "Max file size", UNLIMITED).agrees_with(("unlimited", "unlimited"))
    assert not Bound(1, "Max file size", UNLIMITED).agrees_with(("5", "5"))
