"""What version 2 hands down from group to group, with a controller that it has on this host.

`hugetlb` stands for those that instances get: a controller is in one version only, and a host that
has `memory` in version 1 can't show it in version 2.
"""

import contextlib
import os
import secrets
import subprocess
from collections.abc import Iterable, Iterator
from pathlib import Path

import pytest

from hypervisor.cgroup_delegation import Place, make_group, write_bounds
from hypervisor.cgroup_limits import Setting
from hypervisor.cgroup_mounts import Mount, mounted
from hypervisor.cgroup_tree import kill_all, remove_one, remove_tree

pytestmark = pytest.mark.root

_ANY = ("memory", "pids", "cpu", "io", "hugetlb", "misc", "rdma", "cpuset")
_SPARED = ("hugetlb", "misc", "rdma")


@pytest.fixture
def unified() -> Mount:
    for mount in mounted():
        if mount.version == 2 and mount.offers(_ANY):
            return mount
    pytest.skip("this kernel has no version 2 hierarchy with a controller")


@pytest.fixture
def controller(unified: Mount) -> Iterator[str]:
    """One that the root hands down to nobody, put back as it was afterwards."""
    control = Path(unified.path, "cgroup.subtree_control")
    before = control.read_text().split()
    there = [name for name in _ANY if name in unified.controllers]
    free = [name for name in there if name not in before]
    name = free[0] if free else _withdrawn(control, [one for one in _SPARED if one in there])
    yield name
    control.write_text(f"{'+' if name in before else '-'}{name}")


def _withdrawn(control: Path, names: Iterable[str]) -> str:
    """One that was handed down, and that nobody misses for as long as a test takes."""
    for name in names:
        with contextlib.suppress(OSError):  # Some group below hands it down.
            control.write_text(f"-{name}")
            return name
    pytest.skip("this kernel hands every controller down already")


@pytest.fixture
def parent(unified: Mount, controller: str) -> Iterator[str]:
    name = f"kvmsec-test-{secrets.token_hex(4)}"
    yield name
    kill_all(f"{unified.path}/{name}", 1e18)
    assert remove_tree(f"{unified.path}/{name}")


def enabled(path: str) -> list[str]:
    return Path(path, "cgroup.subtree_control").read_text().split()


def test_every_group_above_hands_it_down(unified: Mount, controller: str, parent: str) -> None:
    place = Place(unified, f"{parent}/below", "kvmsec_1", frozenset({controller}))
    path, withheld = make_group(place, "vm-guest")
    assert withheld == {}
    assert controller in Path(path, "cgroup.controllers").read_text().split()
    assert enabled(path) == []
    for group in (f"{unified.path}/{parent}", os.path.dirname(path)):
        assert enabled(group) == [controller]


@pytest.mark.parametrize("mark", ["trusted.delegate", "user.delegate"])
def test_above_a_group_that_systemd_has_delegated_nothing_is_changed(
    unified: Mount, controller: str, parent: str, mark: str
) -> None:
    top = f"{unified.path}/{parent}"
    os.makedirs(f"{top}/below")
    os.setxattr(top, mark, b"1")
    place = Place(unified, f"{parent}/below", "kvmsec_1", frozenset({controller}))
    path, withheld = make_group(place, "vm-guest")
    assert os.path.isdir(path)
    assert withheld == {controller: f"{top}: the group has no {controller} controller to hand down"}
    assert controller not in enabled(unified.path)

    Path(unified.path, "cgroup.subtree_control").write_text(f"+{controller}")
    path, withheld = make_group(place, "vm-guest")
    assert withheld == {}
    assert controller in Path(path, "cgroup.controllers").read_text().split()


def test_a_parent_that_was_made_for_less_hands_down_more(
    unified: Mount, controller: str, parent: str
) -> None:
    os.mkdir(f"{unified.path}/{parent}")
    make_group(Place(unified, parent, "kvmsec_1", frozenset()), "vm-plain")
    place = Place(unified, f"/{parent}/", "kvmsec_1", frozenset({controller}))
    path, withheld = make_group(place, "vm-guest")
    assert withheld == {}
    assert controller in Path(path, "cgroup.controllers").read_text().split()


def test_a_parent_with_processes_in_it_can_hand_nothing_down_and_is_named(
    unified: Mount, controller: str, parent: str
) -> None:
    """The rule of no internal processes (cgroups(7)); the group is still made, to be ended by."""
    Path(unified.path, "cgroup.subtree_control").write_text(f"+{controller}")
    top = f"{unified.path}/{parent}"
    os.mkdir(top)
    with subprocess.Popen(["sleep", "60"]) as sleeper:
        Path(top, "cgroup.procs").write_text(str(sleeper.pid))
        place = Place(unified, parent, "kvmsec_1", frozenset({controller}))
        path, withheld = make_group(place, "vm-guest")
        sleeper.kill()
    assert os.path.isdir(path)
    assert withheld == {
        controller: f"{top}: can't hand the {controller} controller down: processes are in it"
    }


def test_parents_that_others_take_away_meanwhile_still_hand_it_down(
    unified: Mount, controller: str, parent: str
) -> None:
    children = []
    for number in range(4):
        child = os.fork()
        if child == 0:
            status = 1
            try:
                wanted = frozenset({controller}) if number % 2 else frozenset[str]()
                place = Place(unified, f"{parent}/below", "kvmsec_1", wanted)
                for _ in range(150):
                    path, withheld = make_group(place, f"vm-guest{number}")
                    assert withheld == {}
                    os.rmdir(path)
                    for above in (os.path.dirname(path), f"{unified.path}/{parent}/below"):
                        remove_one(above)
                status = 0
            finally:
                os._exit(status)
        children.append(child)
    assert [os.waitpid(child, 0)[1] for child in children] == [0] * 4


def test_a_file_that_is_not_there_is_a_fault_unless_it_is_optional(
    unified: Mount, controller: str, parent: str
) -> None:
    path, _ = make_group(Place(unified, parent, "kvmsec_1", frozenset()), "vm-guest")
    wanted = Setting("pids", "pids.mux", "5")
    optional = [Setting("io", name, "5", is_optional=True) for name in ("io.a", "io.b")]
    depth = Setting("cpu", "cgroup.max.depth", "3")
    refused = Setting("memory", "cgroup.max.descendants", "many")
    written, refusals = write_bounds(path, [wanted, *optional, depth, refused])
    assert written == [(f"{path}/cgroup.max.depth", depth)]
    assert Path(path, "cgroup.max.depth").read_text() == "3\n"
    assert refusals == {
        "pids": f"{path}/pids.mux: No such file or directory",
        "memory": f"{path}/cgroup.max.descendants: Invalid argument",
        "io": f"{path}: this kernel has none of the files for it",
    }
    assert not os.path.exists(f"{path}/pids.mux")
