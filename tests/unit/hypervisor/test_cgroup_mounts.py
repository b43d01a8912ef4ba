"""Which control group hierarchies are found, and which of them an instance gets."""

from hypervisor.cgroup_mounts import Mount, choose
from hypervisor.cgroups import Hierarchy, InstanceCgroup
from kvmsec.linux.mounts import parse_mounts

_KNOWN = ("cpu", "cpuacct", "memory", "pids", "devices")


def _line(device: str, path: str, kind: str, super_options: str, options: str = "rw,nosuid") -> str:
    return f"32 31 0:{device} / {path} {options} shared:9 - {kind} {kind} {super_options}"


def parse(lines: list[str]) -> list[Mount]:
    return choose(parse_mounts("\n".join(lines).encode()), _KNOWN)


def test_version_one_mounts_are_known_by_their_options() -> None:
    lines = [
        _line("29", "/sys/fs/cgroup/cpu,cpuacct", "cgroup", "rw,cpu,cpuacct"),
        _line("30", "/sys/fs/cgroup/memory", "cgroup", "rw,memory"),
        _line("31", "/sys/fs/cgroup/systemd", "cgroup", "rw,xattr,name=systemd"),
        "23 1 8:1 / / rw - ext4 /dev/sda1 rw",
    ]
    assert [mount.controllers for mount in parse(lines)] == [
        {"cpu", "cpuacct"},
        {"memory"},
        frozenset(),
    ]


def test_a_hierarchy_mounted_twice_counts_once_and_a_read_only_one_not_at_all() -> None:
    lines = [
        _line("30", "/sys/fs/cgroup/pids", "cgroup", "rw,pids", options="ro,nosuid"),
        _line("31", "/sys/fs/cgroup/devices", "cgroup", "ro,devices"),
        _line("32", "/sys/fs/cgroup/memory", "cgroup", "rw,memory"),
        _line("32", "/srv/again", "cgroup", "rw,memory"),
    ]
    assert parse(lines) == [Mount("/sys/fs/cgroup/memory", 1, frozenset({"memory"}))]


def test_a_blank_in_a_mount_point_is_read_as_one() -> None:
    (mount,) = parse([_line("30", r"/srv/my\040groups", "cgroup", "rw,memory")])
    assert mount.path == "/srv/my groups"


_V2 = Mount("/sys/fs/cgroup", 2, frozenset({"cpu", "memory", "pids"}))
_V2_BARE = Mount("/sys/fs/cgroup/unified", 2, frozenset({"hugetlb"}))
_V1_MEMORY = Mount("/sys/fs/cgroup/memory", 1, frozenset({"memory"}))
_V1_PIDS = Mount("/sys/fs/cgroup/pids", 1, frozenset({"pids"}))
_V1_BLKIO = Mount("/sys/fs/cgroup/blkio", 1, frozenset({"blkio"}))
_V1_FREEZER = Mount("/sys/fs/cgroup/freezer", 1, frozenset({"freezer"}))
_V1_NAMED = Mount("/sys/fs/cgroup/systemd", 1, frozenset())


def pieces(hierarchy: Hierarchy, *controllers: str) -> list[str]:
    return [lack.piece for lack in hierarchy.lacks(controllers or ("memory", "pids"))]


def test_the_unified_hierarchy_is_used_alone_where_it_has_the_controllers() -> None:
    hierarchy = Hierarchy.of([_V1_FREEZER, _V2])
    assert (hierarchy.mounts, pieces(hierarchy)) == ((_V2,), [])
    assert hierarchy.layout == "v2 at /sys/fs/cgroup (memory, pids, cpu)"


def test_a_hybrid_host_uses_version_two_to_end_and_the_rest_to_bound() -> None:
    hierarchy = Hierarchy.of([_V1_MEMORY, _V1_NAMED, _V1_PIDS, _V1_BLKIO, _V2_BARE])
    assert hierarchy.mounts == (_V2_BARE, _V1_MEMORY, _V1_PIDS, _V1_BLKIO)
    assert pieces(hierarchy) == []
    assert pieces(hierarchy, "memory", "cpu", "io") == ["cgroup-cpu"]


def test_each_controller_is_taken_from_the_version_that_has_it() -> None:
    unified = Mount("/sys/fs/cgroup/unified", 2, frozenset({"pids"}))
    hierarchy = Hierarchy.of([_V1_MEMORY, unified])
    assert (hierarchy.mounts, pieces(hierarchy)) == ((unified, _V1_MEMORY), [])


def test_what_version_one_calls_blkio_is_io() -> None:
    assert _V1_BLKIO.offers(["io", "cpu"]) == {"io"}
    assert Mount("/", 2, frozenset({"blkio"})).offers(["io"]) == frozenset()


def test_without_controllers_a_hierarchy_still_ends_an_instance_and_each_lack_is_said() -> None:
    hierarchy = Hierarchy.of([_V1_NAMED, _V2_BARE])
    assert hierarchy.mounts == (_V2_BARE,)
    assert pieces(hierarchy) == ["cgroup-memory", "cgroup-pids"]
    assert Hierarchy.of([_V1_NAMED]).mounts == (_V1_NAMED,)


def test_a_host_without_control_groups_gives_an_empty_group_that_says_why() -> None:
    group = Hierarchy.of([]).create("kvmsec_00000000", "guest")
    assert group.paths == group.tasks_files == group.held == ()
    assert group.unified is None
    assert [lack.piece for lack in group.lacks] == ["cgroup", "cgroup-memory", "cgroup-pids"]
    assert (group.oom_kills(), group.kill(0)) == (0, True)
    group.remove()


def test_a_parent_that_leads_upwards_gives_no_group() -> None:
    for parent in ("../system.slice", "a/../..", "/", "a//b"):
        group = Hierarchy.of([_V1_MEMORY]).create("kvmsec", "guest", parent)
        assert group == InstanceCgroup((), group.lacks)
        assert group.lacks[0].piece == "cgroup"
        assert group.problem is not None
        assert "cgroup: " in group.problem
        assert "below the control groups' root" in group.problem
