"""Control groups of instances, in the host's own hierarchies: tags and parents are the test's."""

import contextlib
import os
import secrets
import time
from pathlib import Path

import pytest

from hypervisor import cgroup_tree
from hypervisor.cgroup_mounts import Mount, mounted
from hypervisor.cgroups import CgroupBusy, Hierarchy, InstanceCgroup
from tests.root.hypervisor.grouped import FULL, SLEEP, Join, join, parent

__all__ = ["join", "parent"]

pytestmark = pytest.mark.root

_USABLE = [
    mount for mount in mounted() if mount.version == 2 or mount.controllers & {"memory", "pids"}
]


@pytest.fixture(params=_USABLE, ids=lambda mount: mount.path)
def one(request: pytest.FixtureRequest) -> Hierarchy:
    """A host that has only one of this host's hierarchies."""
    mount: Mount = request.param
    return Hierarchy((mount,))


def test_a_group_is_made_joined_ended_and_removed(one: Hierarchy, parent: str, join: Join) -> None:
    group = one.create("kvmsec_1", "guest.a", parent)
    (path,) = group.paths
    assert path == f"{one.mounts[0].path}/{parent}/kvmsec_1/vm-guest_a"
    process = join(group, SLEEP)
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
    victim, neighbour = join(first, SLEEP), join(second, SLEEP)
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
    process = join(below, SLEEP)
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
    join(again, SLEEP)
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
    join(made, SLEEP)
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
    join(InstanceCgroup((left.unified,)), SLEEP)
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
        process = join(group, SLEEP)
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
                    limits = FULL if number % 2 else None
                    group = hierarchy.create("kvmsec_1", f"guest{number}", parent, limits)
                    assert group.lacks == ()
                    group.remove()
                status = 0
            finally:
                os._exit(status)
        children.append(child)
    assert [os.waitpid(child, 0)[1] for child in children] == [0] * 4


def test_version_two_is_used_to_end_it_wherever_it_is_mounted(parent: str, join: Join) -> None:
    unified = [mount for mount in mounted() if mount.version == 2]
    if not unified:
        pytest.skip("this kernel has version 1 alone")
    group = Hierarchy.detect().create("kvmsec_1", "guest", parent)
    assert group.unified == group.paths[0] == f"{unified[0].path}/{parent}/kvmsec_1/vm-guest"
    assert group.tasks_files == tuple(f"{path}/tasks" for path in group.paths[1:])
    join(group, SLEEP)
    assert InstanceCgroup(tuple(reversed(group.paths))).kill(5)
    assert "populated 0" in Path(group.unified, "cgroup.events").read_text()
    group.remove()
    assert group.unified is None


def test_what_cannot_be_ended_in_time_is_said(
    one: Hierarchy, parent: str, join: Join, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Stands for a process that the kernel can't end: the signal goes astray."""
    group = one.create("kvmsec_1", "stuck", parent)
    join(group, SLEEP)
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
