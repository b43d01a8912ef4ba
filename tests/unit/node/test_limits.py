"""An instance's limits: its wishes within what its node allows, and what may be missing."""

from typing import Any

import pytest

from hypervisor.cgroup_limits import HugePageLimit
from hypervisor.cgroups import Lack
from hypervisor.limits import UNLIMITED
from hypervisor.machine import Limits, Machine
from kvmsec.config import Config, LimitSettings, QemuSettings
from kvmsec.model.security import SecurityModel
from kvmsec.node.grants import Lent
from kvmsec.node.limits import (
    Allotment,
    NoCgroup,
    allot,
    decide,
    largest_file_bytes,
    memory_bytes,
    problems_of,
    require,
)

MEMORY, PIDS, CPU = (Lack.of(name, "not there") for name in ("memory", "pids", "cpu"))
NONE = Lack("cgroup", "nothing is mounted")


def granted(wishes: dict[str, Any], **settings: Any) -> Limits:
    return decide(Limits(**wishes), LimitSettings(**settings))


def test_who_asks_for_nothing_on_a_node_that_says_nothing_is_killed_before_the_nodes_own() -> None:
    assert granted({}) == Limits(oom_score_adjust=100)


def test_a_wish_goes_before_the_nodes_default() -> None:
    wishes = {"cpu_weight": 50, "oom_score_adjust": 7}
    defaults = {"cpu_weight": 200, "io_weight": 300, "cpu_quota_percent": 80}
    assert granted(wishes, **defaults) == Limits(
        cpu_weight=50, io_weight=300, cpu_quota_percent=80, oom_score_adjust=7
    )


def test_the_most_cpu_time_bounds_who_asks_for_none() -> None:
    assert granted({}, max_cpu_quota_percent=150).cpu_quota_percent == 150
    assert granted({"cpu_quota_percent": 20}, max_cpu_quota_percent=150).cpu_quota_percent == 20


@pytest.mark.parametrize(("most", "weight"), [(50, 50), (100, 100), (500, 100)])
def test_a_weight_that_nobody_set_is_within_the_bound_too(most: int, weight: int) -> None:
    assert granted({}, max_cpu_weight=most).cpu_weight == weight
    assert granted({}, max_io_weight=most).io_weight == weight


def test_a_default_beyond_its_own_bound_counts_as_the_bound() -> None:
    found = granted(
        {}, cpu_weight=900, max_cpu_weight=300, oom_score_adjust=-5, min_oom_score_adjust=10
    )
    assert (found.cpu_weight, found.oom_score_adjust) == (300, 10)


def test_every_wish_over_the_nodes_bounds_is_named() -> None:
    wishes = Limits(cpu_weight=11, cpu_quota_percent=101, io_weight=21, oom_score_adjust=-1)
    settings = LimitSettings(max_cpu_weight=10, max_cpu_quota_percent=100, max_io_weight=20)
    assert list(problems_of(wishes, settings)) == [
        "limits.cpu_weight: 11 is more than the 10 that this node allows",
        "limits.cpu_quota_percent: 101 is more than the 100 that this node allows",
        "limits.io_weight: 21 is more than the 20 that this node allows",
        "limits.oom_score_adjust: -1 is less than the 0 that this node allows",
    ]
    edge = Limits(cpu_weight=10, cpu_quota_percent=100, io_weight=20, oom_score_adjust=0)
    assert list(problems_of(edge, settings)) == []
    assert (
        list(problems_of(Limits(cpu_weight=10_000, oom_score_adjust=1000), LimitSettings())) == []
    )


@pytest.mark.parametrize(
    ("lacks", "tolerated"),
    [
        ((), ()),
        ((MEMORY,), ("cgroup-memory",)),
        ((MEMORY, PIDS), ("cgroup-memory", "cgroup-pids")),
        ((NONE, MEMORY, PIDS), ("cgroup",)),
        ((MEMORY, PIDS), ("cgroup",)),
    ],
)
def test_what_the_node_says_may_be_missing_may(
    lacks: tuple[Lack, ...], tolerated: tuple[str, ...]
) -> None:
    require(lacks, tolerated)


@pytest.mark.parametrize(
    ("lacks", "tolerated", "refused"),
    [
        ((MEMORY,), (), (MEMORY,)),
        ((MEMORY, PIDS), ("cgroup-memory",), (PIDS,)),
        ((NONE, MEMORY, PIDS), ("cgroup-memory", "cgroup-pids"), (NONE,)),
        ((NONE, CPU), ("cgroup",), (CPU,)),
        ((CPU,), ("cgroup", "cgroup-cpu"), (CPU,)),
    ],
)
def test_what_else_is_missing_is_refused_by_name(
    lacks: tuple[Lack, ...], tolerated: tuple[str, ...], refused: tuple[Lack, ...]
) -> None:
    with pytest.raises(NoCgroup) as caught:
        require(lacks, tolerated)
    assert caught.value.lacks == refused
    assert all(str(lack) in caught.value.message for lack in refused)
    assert caught.value.hint is not None
    may_help = "may_be_missing" in caught.value.hint
    assert may_help == (CPU not in refused), "no setting spares what somebody asks for"


def bounds(
    *extra: str,
    model: SecurityModel = SecurityModel.POOL,
    pools: tuple[int, ...] = (),
    **keys: Any,
) -> Allotment:
    return allot(config_with(*extra), Machine(name="web", **keys), model, pools)


def memory(*extra: str, **keys: Any) -> int:
    return memory_bytes(config_with(*extra), Machine(name="web", **keys), "kvm", ())


def config_with(*extra: str) -> Config:
    return Config(qemu=QemuSettings(extra_arguments=extra))


def largest_file(**keys: Any) -> int:
    return largest_file_bytes(Config(), Machine(name="web", **keys), Lent())


def test_a_uid_of_its_own_is_bounded_as_its_group_is() -> None:
    own = bounds(vcpus=3)
    assert own.groups.tasks == own.process.processes == 3 + 64 + 32
    for model in (SecurityModel.USER, SecurityModel.NONE):
        shared = bounds(vcpus=3, model=model)
        assert (shared.groups.tasks, shared.process.processes) == (99, None)


def test_memory_of_huge_pages_is_a_file_and_the_only_ones_that_it_gets() -> None:
    without = bounds(memory_mib=4096, pools=(2, 1024))
    assert without.groups.huge_pages == (HugePageLimit("2MB", 0), HugePageLimit("1GB", 0))
    assert largest_file(memory_mib=4096) < 4096 << 20
    huge = bounds(memory_mib=4096, hugepages="1G", pools=(2,))
    wanted = HugePageLimit("1GB", 4096 << 20)
    assert huge.groups.huge_pages == (HugePageLimit("2MB", 0), wanted)
    assert largest_file(memory_mib=4096, hugepages="1G") == 4096 << 20
    assert huge.process.file_bytes is None, "it is told once the disks are known"
    assert "hugetlb" in huge.groups.controllers
    assert "hugetlb" not in bounds().groups.controllers


def test_the_margin_is_the_nodes_and_sizes_are_whole_pages() -> None:
    most = memory(memory_mib=100)
    assert most % (1 << 20) == 0
    assert most >> 20 == 100 + (64 + 3 + 1 + 2) + 64, "2 are for its output"


def test_memory_that_is_to_be_locked_may_be_and_has_room_for_every_stack() -> None:
    plain = ("-overcommit", "mem-lock=off,cpu-pm=on")
    locked = ("-overcommit", "cpu-pm=on,mem-lock=on")
    lockable = [bounds(*extra).process.locked_bytes for extra in (plain, locked)]
    assert lockable == [8 << 20, UNLIMITED]
    assert memory(*locked) == memory(*plain) + ((8 * 97 + 256) << 20)
