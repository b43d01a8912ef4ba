"""The bounds of instances' control groups, held by the kernel and read back."""

import os
import time
from pathlib import Path

import pytest

from hypervisor.cgroup_limits import GroupLimits
from hypervisor.cgroup_tree import pids_below
from hypervisor.cgroups import Hierarchy, InstanceCgroup
from tests.root.hypervisor.grouped import FULL, SLEEP, Join, join, parent

__all__ = ["join", "parent"]

pytestmark = pytest.mark.root


def test_who_wants_more_memory_than_its_bound_is_killed_and_that_is_counted(
    parent: str, join: Join
) -> None:
    limits = GroupLimits(memory_bytes=24 << 20, tasks=8)
    group = Hierarchy.detect().create("kvmsec_1", "hungry", parent, limits)
    _require_or_skip(group)
    assert group.oom_kills() == 0
    process = join(group, "held = b'x' * (256 << 20)")
    assert process.wait(30) == -9
    assert group.oom_kills() >= 1  # Twice for one process where the whole group is killed.


def test_a_fork_bomb_stops_at_its_bound(parent: str, join: Join) -> None:
    group = Hierarchy.detect().create("kvmsec_1", "bomb", parent, GroupLimits(tasks=20))
    _require_or_skip(group)
    breeding = (
        "import os, time\n"
        "born = 0\n"
        "try:\n"
        "    while born < 1000:\n"
        "        if os.fork() == 0: time.sleep(60)\n"
        "        born += 1\n"
        "except BlockingIOError: print(born, flush=True)\n"
        "time.sleep(60)\n"
    )
    process = join(group, breeding)
    assert process.stdout is not None
    assert int(process.stdout.readline()) == 19
    assert max(len(pids_below(path)) for path in group.paths) == 20
    assert group.kill(10)
    group.remove()
    assert not any(map(os.path.exists, group.paths))


def test_a_quota_is_held(parent: str, join: Join) -> None:
    """A tenth of one CPU, spent by two that only count: the kernel says that it held them back."""
    group = Hierarchy.detect().create("kvmsec_1", "busy", parent, GroupLimits(cpu_quota_percent=10))
    if any(lack.piece == "cgroup-cpu" for lack in group.lacks):
        pytest.skip(f"this kernel has no CPU controller: {group.problem}")
    join(group, "import os\nos.fork()\nwhile True: pass")
    quota = next(path for path, setting in group.held if setting.controller == "cpu")
    stat = Path(quota).with_name("cpu.stat")
    end = time.monotonic() + 20
    while _throttled(stat) < 2:
        assert time.monotonic() < end, stat.read_text()
        time.sleep(0.05)


def _throttled(stat: Path) -> int:
    return int(dict(map(str.split, stat.read_text().splitlines()))["nr_throttled"])


def test_every_bound_is_read_back_and_who_is_not_in_the_group_is_seen(
    parent: str, join: Join
) -> None:
    group = Hierarchy.detect().create("kvmsec_1", "guest", parent, FULL)
    _require_or_skip(group)
    found = {setting.file: Path(path).read_text().split() for path, setting in group.held}
    assert found["pids.max"] == ["30"]
    memory = found.get("memory.max") or found["memory.limit_in_bytes"]
    assert memory == [str(32 << 20)]
    process = join(group, SLEEP)
    assert group.problems_of(process.pid) == []
    outside = group.problems_of(os.getpid())
    assert len(outside) == len(group.paths)
    assert all("not in the control group" in problem for problem in outside)


@pytest.mark.parametrize(("weight", "percent"), [(1, 1), (99, 99), (101, 101), (10_000, 819_200)])
def test_the_ends_of_each_range_are_taken_and_read_back(
    parent: str, join: Join, weight: int, percent: int
) -> None:
    limits = GroupLimits(
        memory_bytes=1 << 45,
        tasks=4_000_000,
        cpu_weight=weight,
        cpu_quota_percent=percent,
        io_weight=weight,
    )
    group = Hierarchy.detect().create("kvmsec_1", "guest", parent, limits)
    _require_or_skip(group)
    assert group.problems_of(join(group, SLEEP).pid) == []


def test_a_bound_that_somebody_changed_is_seen(parent: str, join: Join) -> None:
    group = Hierarchy.detect().create("kvmsec_1", "guest", parent, FULL)
    process = join(group, SLEEP)
    path, _ = next(one for one in group.held if one[1].file == "pids.max")
    Path(path).write_text("max")
    assert group.problems_of(process.pid) == [f"{path} holds 'max', wanted '30'"]
    process.kill()
    process.wait()
    group.remove()
    assert any(f"{path} holds 'nothing'" in one for one in group.problems_of(process.pid))


def test_cpu_and_io_have_no_group_where_nobody_asks(parent: str) -> None:
    hierarchy = Hierarchy.detect()
    plain = hierarchy.create(
        "kvmsec_1", "plain", parent, GroupLimits(memory_bytes=1 << 24, tasks=9)
    )
    full = hierarchy.create("kvmsec_1", "full", parent, FULL)
    assert {setting.controller for _, setting in plain.held} <= {"memory", "pids"}
    assert len(plain.held) < len(full.held)
    assert set(hierarchy.leaked("kvmsec_1", [], parent)) == {"plain", "full"}
    for group in (plain, full):
        group.remove()
    assert hierarchy.leaked("kvmsec_1", [], parent) == {}


def _require_or_skip(group: InstanceCgroup) -> None:
    if group.lacks:
        pytest.skip(f"this kernel can't hold it: {group.problem}")
