"""Which limits hold, in hierarchies of either version that are drawn on a directory."""

from pathlib import Path
from typing import Any

import pytest

from kvmsec.audit import control_groups
from kvmsec.audit.control_groups import read_control_group
from kvmsec.audit.facts import ControlGroup
from kvmsec.linux.mounts import Mount

MIB = 1 << 20


class Files:
    """The one file of a process that is asked for."""

    pid = 7

    def __init__(self, cgroup: str) -> None:
        self._cgroup = cgroup.encode()

    def read(self, name: str) -> bytes:
        assert name == "cgroup"
        return self._cgroup


@pytest.fixture
def host(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Writes files of hierarchies below `tmp_path`, and reads what they come to."""

    def read(membership: str, files: dict[str, str], *v1: str, has_v2: bool = True) -> ControlGroup:
        mounts = [mount(tmp_path / name, "cgroup", {"rw", *name.split(",")}) for name in v1]
        mounts += [mount(tmp_path / "v2", "cgroup2", {"rw"})] if has_v2 else []
        for name, text in files.items():
            path = tmp_path / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text)
        monkeypatch.setattr(control_groups, "read_mounts", lambda: mounts)
        return read_control_group(Files(membership))  # type: ignore[arg-type]

    return read


def mount(path: Path, kind: str, options: set[str]) -> Mount:
    return Mount(1, "0:1", str(path), frozenset({"rw"}), kind, frozenset(options))


def test_the_least_limit_on_the_way_up_holds(host: Any) -> None:
    found = host(
        "0::/machine/web\n",
        {
            "v2/machine/memory.max": f"{64 * MIB}\n",
            "v2/machine/pids.max": "max\n",
            "v2/machine/cpu.max": "50000 100000\n",
            "v2/machine/web/memory.max": f"{128 * MIB}\n",
            "v2/machine/web/pids.max": "33\n",
            "v2/machine/web/cpu.max": "max 100000\n",
            "v2/machine/web/cpu.weight": "50\n",
            "v2/machine/web/cgroup.procs": "7\n8\n9\n",
        },
    )

    assert found == ControlGroup(
        paths=("/machine/web",),
        memory_bytes=64 * MIB,
        pids=33,
        cpus=0.5,
        has_cpu_share=True,
        others=2,
    )


def test_without_limits_there_are_none(host: Any) -> None:
    unlimited = {
        "v2/web/memory.max": "max\n",
        "v2/web/pids.max": "max\n",
        "v2/web/cpu.max": "max 100000\n",
        "v2/web/cpu.weight": "100\n",
    }

    assert host("0::/web\n", unlimited) == ControlGroup(paths=("/web",))
    assert host("0::/\n", {}) == ControlGroup(paths=())
    assert host("0::/web\n", {}, has_v2=False) == ControlGroup(paths=("/web",))


def test_version_1_says_no_limit_by_huge_and_negative_numbers(host: Any) -> None:
    found = host(
        "5:memory:/web\n4:cpu,cpuacct:/web\n3:pids:/web\n",
        {
            "memory/web/memory.limit_in_bytes": "9223372036854771712\n",
            "cpu,cpuacct/web/cpu.cfs_quota_us": "-1\n",
            "cpu,cpuacct/web/cpu.cfs_period_us": "100000\n",
            "cpu,cpuacct/web/cpu.shares": "1024\n",
        },
        *("memory", "cpu,cpuacct", "pids"),
    )

    assert found == ControlGroup(paths=("/web",))


def test_version_1_limits_hold_beside_version_2(host: Any) -> None:
    found = host(
        "5:memory:/web\n4:cpu:/web\n3:pids:/web\n0::/x\n",
        {
            "memory/web/memory.limit_in_bytes": f"{MIB}\n",
            "cpu/web/cpu.cfs_quota_us": "150000\n",
            "cpu/web/cpu.cfs_period_us": "100000\n",
            "cpu/web/cpu.shares": "512\n",
            "pids/web/pids.max": "9\n",
        },
        *("memory", "cpu", "pids"),
    )

    assert found == ControlGroup(
        paths=("/web", "/x"), memory_bytes=MIB, pids=9, cpus=1.5, has_cpu_share=True
    )


def test_more_memory_than_the_host_has_is_no_limit(host: Any) -> None:
    assert host("0::/web\n", {"v2/web/memory.max": str(1 << 60)}).memory_bytes is None


@pytest.mark.parametrize("path", ["/../other", "/a/../../b", "/x" * 100])
def test_a_group_that_this_host_does_not_show_is_no_group_of_it(host: Any, path: str) -> None:
    with pytest.raises(ValueError, match="outside"):
        host(f"0::{path}\n", {})
