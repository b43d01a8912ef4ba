"""Control groups of instances, in the host's own hierarchies: tags and parents are the test's."""

import contextlib
import os
import secrets
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from hypervisor import cgroup_tree
from hypervisor.cgroup_limits import GroupLimits
from hypervisor.cgroup_mounts import Mount, mounted
from hypervisor.cgroup_tree import pids_below
from hypervisor.cgroups import CgroupBusy, Hierarchy, InstanceCgroup

pytestmark = pytest.mark.root

_USABLE = [
    mount for mount in mounted() if mount.version == 2 or mount.controllers & {"memory", "pids"}
]
Join = Callable[[InstanceCgroup, str], subprocess.Popen[bytes]]


@pytest.fixture
def parent() -> Iterator[str]:
    """A parent group of the test's own, gone from every hierarchy afterwards."""
    name = f"kvmsec-test-{secrets.token_hex(4)}"
    yield name
    for mount in mounted():
        top = f"{mount.path}/{name}"
        groups = [path for path, _, _ in os.walk(top, topdown=False)]
        InstanceCgroup(tuple(groups)).kill(5)
        for path in groups:
            os.rmdir(path)


@pytest.fixture(params=_USABLE, ids=lambda mount: mount.path)
def one(request: pytest.FixtureRequest) -> Hierarchy:
    """A host that has only one of this host's hierarchies."""
    mount: Mount = request.param
    return Hierarchy((mount,))


@pytest.fixture
def join() -> Iterator[Join]:
    """Start a Python program that joins a group, and return once it says that it is in."""
    with contextlib.ExitStack() as stack:

        def start(group: InstanceCgroup, code: str) -> subprocess.Popen[bytes]:
            files = [f"{path}/cgroup.procs" for path in group.paths]
            joining = f"for path in {files}: open(path, 'w').write('0')\n"
            said = "print('in', flush=True)\n"
            process = subprocess.Popen(
                [sys.executable, "-I", "-S", "-c", joining + said + code], stdout=subprocess.PIPE
            )
            stack.callback(process.wait)
            stack.callback(process.kill)
            assert process.stdout is not None
            stack.callback(process.stdout.close)
            assert process.stdout.readline() == b"in\n"
            return process

        yield start


_SLEEP = "import time; time.sleep(60)"


def test_a_group_is_made_joined_ended_and_removed(one: Hierarchy, parent: str, join: Join) -> None:
    group = one.create("kvmsec_1", "guest.a", parent)
    (path,) = group.paths
    assert path == f"{one.mounts[0].path}/{parent}/kvmsec_1/vm-guest_a"
    process = join(group, _SLEEP)
    procs = Path(path, "cgroup.procs")
    assert procs.read_text().split() == [str(process.pid)]
    assert group.kill(5)
    assert process.wait(5) == -9
    assert not procs.read_text()
    group.remove()
    assert not os.path.exists(os.path.dirname(path))
    assert os.path.isdir(f"{one.mounts[0].path}/{parent}"), "a configured parent isn't ours"


def test_only_the_group_itself_is_ended(one: Hierarchy, parent: str, join: Join) -> None:
    first, second = (one.create("kvmsec_1", name, parent) for name in ("one", "two"))
    victim, neighbour = join(first, _SLEEP), join(second, _SLEEP)
    assert first.kill(5)
    assert victim.wait(5) == -9
    assert neighbour.poll() is None
    first.remove()
    with pytest.raises(CgroupBusy) as caught:
        second.remove()
    assert caught.value.pids == (neighbour.pid,)


def test_a_process_that_keeps_forking_is_ended(one: Hierarchy, parent: str, join: Join) -> None:
    group = one.create("kvmsec_1", "bomb", parent)
    breeding = (
        "import os, time\n"
        "for _ in range(24):\n"
        "    if os.fork() == 0:\n"
        "        while True:\n"
        "            if os.fork(): os._exit(0)\n"
        "            time.sleep(0.002)\n"
        "time.sleep(60)\n"
    )
    join(group, breeding)
    assert group.kill(20)
    group.remove()
    assert not os.path.exists(group.paths[0])


def test_what_somebody_made_below_it_is_ended_and_removed_too(
    one: Hierarchy, parent: str, join: Join
) -> None:
    group = one.create("kvmsec_1", "guest", parent)
    below = InstanceCgroup((f"{group.paths[0]}/sub",))
    os.mkdir(below.paths[0])
    process = join(below, _SLEEP)
    assert group.kill(5)
    assert process.wait(5) == -9
    group.remove()
    assert not os.path.exists(group.paths[0])


def test_removing_and_ending_twice_is_fine(one: Hierarchy, parent: str) -> None:
    group = one.create("kvmsec_1", "guest", parent)
    for _ in range(2):
        assert group.kill(1)
        group.remove()
    assert group.oom_kills() == 0


def test_an_empty_leftover_is_replaced_and_a_populated_one_is_not_taken_over(
    one: Hierarchy, parent: str, join: Join
) -> None:
    left = one.create("kvmsec_1", "guest", parent)
    inode = os.stat(left.paths[0]).st_ino
    again = one.create("kvmsec_1", "guest", parent)
    assert again.paths == left.paths
    assert os.stat(again.paths[0]).st_ino != inode
    join(again, _SLEEP)
    refused = one.create("kvmsec_1", "guest", parent)
    assert (refused.paths, refused.lacks[0].piece) == ((), "cgroup")
    assert refused.problem is not None
    assert "earlier start" in refused.problem


def test_a_leftover_is_found_and_is_waited_for_by_who_removes_it(
    one: Hierarchy, parent: str, join: Join, monkeypatch: pytest.MonkeyPatch
) -> None:
    waits: list[float] = []

    def wait(path: str, deadline: float) -> bool:
        waits.append(deadline - time.monotonic())
        return False

    assert one.leftover("kvmsec_1", "guest", parent).paths == ()
    assert one.leftover("kvmsec_1", "guest", "../elsewhere").paths == ()
    made = one.create("kvmsec_1", "gu.est", parent)
    assert one.leftover("kvmsec_1", "gu.est", parent).paths == made.paths
    join(made, _SLEEP)
    monkeypatch.setattr(cgroup_tree, "wait_until_empty", wait)
    assert one.create("kvmsec_1", "gu.est", parent).paths == ()
    assert max(waits) <= 0
    with pytest.raises(CgroupBusy):
        made.remove()
    assert max(waits) > 0


def test_without_its_version_two_group_it_has_not_all_that_ends_it(parent: str, join: Join) -> None:
    """The others count and bound it; to end it at once and to know it empty takes that one."""
    hierarchy = Hierarchy.detect()
    left = hierarchy.create("kvmsec_1", "guest", parent)
    assert left.unified is not None
    join(InstanceCgroup((left.unified,)), _SLEEP)
    refused = hierarchy.create("kvmsec_1", "guest", parent)
    assert refused.unified is None
    assert refused.lacks[0].piece == "cgroup"
    assert f"{left.unified}: processes of an earlier start" in refused.lacks[0].problem


def test_leaked_groups_are_those_of_the_tag_that_nobody_knows(parent: str) -> None:
    hierarchy = Hierarchy.detect()
    made = {name: hierarchy.create("kvmsec_1", name, parent) for name in ("a.b", "a-b", "tasks")}
    hierarchy.create("kvmsec_2", "other", parent)
    leaked = hierarchy.leaked("kvmsec_1", ["a-b"], parent)
    assert {name: set(group.paths) for name, group in leaked.items()} == {
        name: set(made[name].paths) for name in ("a.b", "tasks")
    }
    assert hierarchy.leaked("kvmsec_3", [], parent) == {}


def test_under_the_default_parent_nothing_is_left(join: Join) -> None:
    tag = f"kvmsec_test_{secrets.token_hex(4)}"
    group = Hierarchy.detect().create(tag, "guest")
    try:
        assert group.paths
        assert group.problem is None
        own = Path("/proc/self/cgroup").read_text()
        process = join(group, _SLEEP)
        assert f"/kvmsec/{tag}/vm-guest" in Path(f"/proc/{process.pid}/cgroup").read_text()
        assert Path("/proc/self/cgroup").read_text() == own
    finally:
        group.kill(5)
        group.remove()
    assert not any(os.path.exists(os.path.dirname(path)) for path in group.paths)


def test_starts_and_ends_at_once_do_not_take_each_others_parents_away(parent: str) -> None:
    hierarchy = Hierarchy.detect()
    children = []
    for number in range(4):
        child = os.fork()
        if child == 0:
            status = 1
            try:
                for _ in range(200):
                    limits = _FULL if number % 2 else None
                    group = hierarchy.create("kvmsec_1", f"guest{number}", parent, limits)
                    assert group.lacks == ()
                    group.remove()
                status = 0
            finally:
                os._exit(status)
        children.append(child)
    assert [os.waitpid(child, 0)[1] for child in children] == [0] * 4


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


_FULL = GroupLimits(
    memory_bytes=32 << 20, tasks=30, cpu_weight=50, cpu_quota_percent=150, io_weight=400
)


def test_every_bound_is_read_back_and_who_is_not_in_the_group_is_seen(
    parent: str, join: Join
) -> None:
    group = Hierarchy.detect().create("kvmsec_1", "guest", parent, _FULL)
    _require_or_skip(group)
    found = {setting.file: Path(path).read_text().split() for path, setting in group.held}
    assert found["pids.max"] == ["30"]
    memory = found.get("memory.max") or found["memory.limit_in_bytes"]
    assert memory == [str(32 << 20)]
    process = join(group, _SLEEP)
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
    assert group.problems_of(join(group, _SLEEP).pid) == []


def test_a_bound_that_somebody_changed_is_seen(parent: str, join: Join) -> None:
    group = Hierarchy.detect().create("kvmsec_1", "guest", parent, _FULL)
    process = join(group, _SLEEP)
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
    full = hierarchy.create("kvmsec_1", "full", parent, _FULL)
    assert {setting.controller for _, setting in plain.held} <= {"memory", "pids"}
    assert len(plain.held) < len(full.held)
    assert set(hierarchy.leaked("kvmsec_1", [], parent)) == {"plain", "full"}
    for group in (plain, full):
        group.remove()
    assert hierarchy.leaked("kvmsec_1", [], parent) == {}


def test_version_two_is_used_to_end_it_wherever_it_is_mounted(parent: str, join: Join) -> None:
    unified = [mount for mount in mounted() if mount.version == 2]
    if not unified:
        pytest.skip("this kernel has version 1 alone")
    group = Hierarchy.detect().create("kvmsec_1", "guest", parent)
    assert group.unified == group.paths[0] == f"{unified[0].path}/{parent}/kvmsec_1/vm-guest"
    assert group.tasks_files == tuple(f"{path}/tasks" for path in group.paths[1:])
    join(group, _SLEEP)
    assert InstanceCgroup(tuple(reversed(group.paths))).kill(5)
    assert "populated 0" in Path(group.unified, "cgroup.events").read_text()
    group.remove()
    assert group.unified is None


def _require_or_skip(group: InstanceCgroup) -> None:
    if group.lacks:
        pytest.skip(f"this kernel can't hold it: {group.problem}")


def test_what_cannot_be_ended_in_time_is_said(
    one: Hierarchy, parent: str, join: Join, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Stands for a process that the kernel can't end: the signal goes astray."""
    group = one.create("kvmsec_1", "stuck", parent)
    join(group, _SLEEP)
    monkeypatch.setattr("hypervisor.cgroup_tree.processes.kill", lambda pidfd: None)
    monkeypatch.setattr("hypervisor.cgroup_tree.os.write", lambda descriptor, data: len(data))
    started = time.monotonic()
    assert not group.kill(0.2)
    assert 0.15 < time.monotonic() - started < 3


def test_a_group_that_is_removed_while_its_files_are_opened_is_empty(
    parent: str, tmp_path: Path
) -> None:
    """A path that led to its files before: what the kernel says to whoever was just opening one."""
    unified = [mount for mount in mounted() if mount.version == 2]
    if not unified:
        pytest.skip("this kernel has version 1 alone")
    group = Hierarchy(tuple(unified)).create("kvmsec_1", "guest", parent)
    with contextlib.ExitStack() as stack:
        for name in ("cgroup.kill", "cgroup.events"):
            file = os.open(f"{group.paths[0]}/{name}", os.O_PATH)
            stack.callback(os.close, file)
            (tmp_path / name).symlink_to(f"/proc/self/fd/{file}")
        group.remove()
        with pytest.raises(OSError, match="No such device"):
            (tmp_path / name).read_bytes()
        assert cgroup_tree.wait_until_empty(str(tmp_path), time.monotonic())
        assert cgroup_tree.kill_all(str(tmp_path), time.monotonic())


def test_version_one_is_joined_without_the_lock_that_waits_for_a_grace_period(
    one: Hierarchy, parent: str
) -> None:
    group = one.create("kvmsec_1", "guest", parent)
    is_version_one = one.mounts[0].version == 1
    assert group.tasks_files == ((f"{group.paths[0]}/tasks",) if is_version_one else ())
