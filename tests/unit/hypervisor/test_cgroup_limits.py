"""What an instance's control groups are to hold, in the words of either version."""

import pytest

from hypervisor.cgroup_limits import (
    GroupLimits,
    HugePageLimit,
    Setting,
    bfq_weight,
    settings_for,
    shares,
)

_ALL = GroupLimits(
    memory_bytes=256 << 20, tasks=100, cpu_weight=50, cpu_quota_percent=150, io_weight=1000
)
_EVERY = frozenset({"memory", "pids", "cpu", "io"})


def written(
    limits: GroupLimits, version: int, controllers: frozenset[str] = _EVERY
) -> dict[str, str]:
    return {one.file: one.value for one in settings_for(limits, controllers, version)}


def test_version_two_in_full() -> None:
    assert written(_ALL, 2) == {
        "memory.max": "268435456",
        "memory.swap.max": "0",
        "memory.oom.group": "1",
        "pids.max": "100",
        "cpu.weight": "50",
        "cpu.max": "150000 100000",
        "io.weight": "1000",
        "io.bfq.weight": "181",
    }


def test_version_one_in_full_and_in_an_order_that_it_takes() -> None:
    found = written(_ALL, 1)
    assert found == {
        "memory.limit_in_bytes": "268435456",
        "memory.memsw.limit_in_bytes": "268435456",
        "memory.swappiness": "0",
        "pids.max": "100",
        "cpu.shares": "512",
        "cpu.cfs_period_us": "100000",
        "cpu.cfs_quota_us": "150000",
        "blkio.bfq.weight": "181",
        "blkio.weight": "181",
    }
    order = list(found)
    assert order.index("memory.limit_in_bytes") < order.index("memory.memsw.limit_in_bytes")
    assert order.index("cpu.cfs_period_us") < order.index("cpu.cfs_quota_us")


@pytest.mark.parametrize("version", [1, 2])
def test_a_hierarchy_gets_what_its_controllers_take_and_nothing_unasked(version: int) -> None:
    assert set(written(_ALL, version, frozenset({"pids"}))) == {"pids.max"}
    assert written(GroupLimits(), version) == {}


def test_huge_pages_are_bounded_with_what_is_reserved_of_them() -> None:
    limits = GroupLimits(huge_pages=(HugePageLimit("2MB", 4 << 20), HugePageLimit("1GB", 0)))
    assert written(limits, 2, frozenset({"hugetlb"})) == {
        "hugetlb.2MB.max": "4194304",
        "hugetlb.2MB.rsvd.max": "4194304",
        "hugetlb.1GB.max": "0",
        "hugetlb.1GB.rsvd.max": "0",
    }
    assert written(limits, 1, frozenset({"hugetlb"})) == {
        "hugetlb.2MB.limit_in_bytes": "4194304",
        "hugetlb.2MB.rsvd.limit_in_bytes": "4194304",
        "hugetlb.1GB.limit_in_bytes": "0",
        "hugetlb.1GB.rsvd.limit_in_bytes": "0",
    }


def test_memory_and_tasks_are_always_bounded_and_the_rest_where_somebody_asks() -> None:
    assert GroupLimits().controllers == ("memory", "pids")
    assert GroupLimits(cpu_weight=100).controllers == ("memory", "pids", "cpu")
    assert GroupLimits(cpu_quota_percent=10).controllers == ("memory", "pids", "cpu")
    assert GroupLimits(io_weight=100).controllers == ("memory", "pids", "io")


@pytest.mark.parametrize(
    ("weight", "in_shares", "in_bfq"),
    [(1, 10, 1), (50, 512, 50), (100, 1024, 100), (200, 2048, 109), (10000, 102400, 1000)],
)
def test_weights_are_what_systemd_makes_of_them(weight: int, in_shares: int, in_bfq: int) -> None:
    assert (shares(weight), bfq_weight(weight)) == (in_shares, in_bfq)


@pytest.mark.parametrize(
    ("value", "read", "agrees"),
    [
        ("100", "100\n", True),
        ("100", "default 100\n", True),
        ("150000 100000", "150000 100000\n", True),
        ("100", "max\n", False),
        ("0", "default 100\n", False),
        ("100", "", False),
    ],
)
def test_what_is_read_back_must_be_what_was_written(value: str, read: str, agrees: bool) -> None:
    assert Setting("pids", "pids.max", value).agrees_with(read) is agrees
