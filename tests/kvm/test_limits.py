"""A real guest is held as its definition and its node say, and what can't be held isn't started."""

import os
import subprocess
from pathlib import Path
from typing import Any

import pytest

from hypervisor.cgroup_mounts import Mount
from hypervisor.cgroups import Hierarchy
from hypervisor.limits import parse_limits
from hypervisor.machine import Limits
from kvmsec.errors import BadDefinition, StartFailed
from kvmsec.node.limits import NoCgroup

pytestmark = pytest.mark.kvm

MIB = 1 << 20


def test_the_groups_of_a_guest_hold_what_was_asked_for(lab: Any) -> None:
    limits = {"cpu_weight": 50, "cpu_quota_percent": 150, "io_weight": 400}
    started = lab.start(vcpus=2, memory_mib=3, limits=limits)
    held = read_groups(lab)
    assert held["pids.max"] == str(2 + 64 + 32)
    translated = 1024 if lab.accelerator == "tcg" else 0
    wanted_mib = 3 + 64 + 1 + 2 + 2 + 64 + translated
    assert held["memory"] == str(wanted_mib * MIB), "2 are for its output"
    assert held["cpu.weight"] == "50"
    assert held["cpu.max"] == "150000 100000"
    assert held["io.weight"] in ("400", "127"), "BFQ has a scale of its own"
    for group in own_groups(lab):
        assert str(started.pid) in Path(group, "cgroup.procs").read_text().split()
    lab.stop()
    assert lab.groups() == []


def test_what_nobody_asks_for_has_no_group(lab: Any) -> None:
    lab.start()
    held = read_groups(lab)
    assert {"pids.max", "memory"} <= held.keys()
    assert not {"cpu.weight", "cpu.max", "io.weight"} & held.keys()
    lab.stop()


@pytest.mark.parametrize("model", ["none", "user", "pool"])
def test_the_process_of_a_guest_is_limited_as_decided(lab: Any, model: str) -> None:
    domain = lab.domain if model == "user" else None
    disk = lab.disk()
    os.truncate(disk, 7 * MIB)
    grown = lab.root / "grown.qcow2"
    subprocess.run(["qemu-img", "create", "-q", "-f", "qcow2", grown, "40M"], check=True)
    started = lab.start(
        security_model=model,
        security_domain=domain,
        disks=[{"path": str(disk)}, {"path": str(grown), "format": "qcow2"}],
        limits={"oom_score_adjust": 250},
        memory_mib=5,
    )
    proc = Path(f"/proc/{started.pid}")
    shown = parse_limits((proc / "limits").read_text())
    own = parse_limits(Path("/proc/self/limits").read_text())
    assert shown["Max open files"] == ("1024", "1024")
    assert shown["Max processes"] == (("97", "97") if model == "pool" else own["Max processes"])
    assert shown["Max msgqueue size"] == shown["Max nice priority"] == ("0", "0")
    assert shown["Max core file size"] == ("1", "1")
    largest = int(shown["Max file size"][1])
    assert 40 * MIB < largest < 40 * MIB + 70 * MIB
    assert (proc / "oom_score_adj").read_text() == "250\n"
    assert int((proc / "coredump_filter").read_text(), 16) == 0
    guest = [flags for size, flags in mappings(proc) if size == "5120 kB"]
    assert guest and all("dd" in flags for flags in guest), "MADV_DONTDUMP"
    lab.stop()


def test_a_guest_writes_all_of_a_disk_that_is_larger_than_its_file(lab: Any) -> None:
    """RLIMIT_FSIZE counts for images: an empty qcow2 file must be able to become a full one."""
    grown = lab.root / "grown.qcow2"
    subprocess.run(["qemu-img", "create", "-q", "-f", "qcow2", grown, "40M"], check=True)
    started = lab.start(disks=[{"path": str(grown), "format": "qcow2"}])
    before = grown.stat().st_size
    largest = parse_limits(Path(f"/proc/{started.pid}/limits").read_text())["Max file size"]
    lab.stop()
    subprocess.run(["qemu-io", "-f", "qcow2", "-c", "write 0 40M", grown], check=True)
    assert before < 40 * MIB < grown.stat().st_size <= int(largest[0])


def test_what_is_over_the_nodes_bounds_is_refused_with_every_fault(make_lab: Any) -> None:
    lab = make_lab("[limits]\nmax_vcpus = 1\nmax_cpu_quota_percent = 100\nmax_cpu_weight = 10\n")
    over = {"cpu_quota_percent": 101, "cpu_weight": 11, "oom_score_adjust": -1}
    with pytest.raises(BadDefinition) as caught:
        lab.start(vcpus=2, limits=over)
    for what in ("vcpus: 2", "cpu_quota_percent: 101", "cpu_weight: 11", "oom_score_adjust: -1"):
        assert what in caught.value.message
    assert lab.instances() == {}
    lab.start(limits={"cpu_weight": 5})
    held = read_groups(lab)
    assert (held["cpu.weight"], held["cpu.max"]) == ("5", "100000 100000")
    lab.stop()


@pytest.mark.parametrize(
    ("lacking", "tolerated", "limits", "piece"),
    [
        ("memory", "", {}, "cgroup-memory"),
        ("pids", '"cgroup-memory"', {}, "cgroup-pids"),
        ("cpu", '"cgroup"', {"cpu_quota_percent": 50}, "cgroup-cpu"),
        ("memory", '"cgroup-memory"', {}, None),
        ("cpu", "", {}, None),
    ],
)
def test_a_host_that_lacks_a_controller(
    make_lab: Any,
    monkeypatch: pytest.MonkeyPatch,
    lacking: str,
    tolerated: str,
    limits: dict[str, Any],
    piece: str | None,
) -> None:
    lab = make_lab(f"[confinement]\nmay_be_missing = [{tolerated}]\n")
    there = Hierarchy.detect().mounts
    left = Hierarchy(
        tuple(Mount(one.path, one.version, one.controllers - {lacking}) for one in there)
    )
    monkeypatch.setattr(Hierarchy, "detect", lambda: left)
    if piece is None:
        lab.start(limits=limits)
        lab.stop()
        return
    with pytest.raises(NoCgroup) as caught:
        lab.start(limits=limits)
    assert f"{piece}: no hierarchy with the {lacking} controller" in caught.value.message
    assert ("may_be_missing" in str(caught.value.hint)) == (piece != "cgroup-cpu")
    assert lab.instances() == {}
    assert lab.groups() == []


@pytest.mark.parametrize("tolerated", [True, False])
def test_a_host_without_control_groups(
    make_lab: Any, monkeypatch: pytest.MonkeyPatch, tolerated: bool
) -> None:
    lab = make_lab("[confinement]\nmay_be_missing = " + ('["cgroup"]' if tolerated else "[]"))
    monkeypatch.setattr(Hierarchy, "detect", lambda: Hierarchy(()))
    if tolerated:
        started = lab.start()
        assert lab.groups() == []
        limits = parse_limits(Path(f"/proc/{started.pid}/limits").read_text())
        assert limits["Max processes"] == ("97", "97"), "what is left then"
        lab.stop()
        return
    with pytest.raises(NoCgroup) as caught:
        lab.start()
    assert "cgroup: no control group hierarchy is mounted" in caught.value.message
    assert '["cgroup"]' in str(caught.value.hint)


def test_a_bound_that_is_gone_before_the_guest_runs_ends_the_start(lab: Any) -> None:
    def loosen(step: str) -> None:
        if step == "verify":
            for group in own_groups(lab):
                if Path(group, "pids.max").exists():
                    Path(group, "pids.max").write_text("max")

    with pytest.raises(StartFailed, match=r"pids\.max holds 'max', wanted '97'"):
        lab.run(lambda node: node.start(lab.definition()), on_step=loosen)
    assert lab.instances() == {}
    assert lab.groups() == []


def test_who_was_moved_out_of_its_group_before_it_runs_is_ended(lab: Any) -> None:
    def move_out(step: str) -> None:
        if step == "verify":
            for group in own_groups(lab):
                pids = Path(group, "cgroup.procs").read_text().split()
                if Path(group, "pids.max").exists() and pids:
                    Path(group, "../../../cgroup.procs").write_text(pids[0])

    with pytest.raises(StartFailed, match="it is not in the control group"):
        lab.run(lambda node: node.start(lab.definition()), on_step=move_out)
    assert lab.groups() == []


def test_a_large_machine_is_far_from_its_bounds(lab: Any) -> None:
    """As many vcpus and disks as a small host starts quickly."""
    disks = [{"path": str(lab.disk(f"{number}.img"))} for number in range(12)]
    disks[0] |= {"cache": "none", "aio": "native"}
    started = lab.start(vcpus=32, memory_mib=64, disks=disks)
    held = read_groups(lab)
    proc = Path(f"/proc/{started.pid}")
    used = max(int(usage(path).read_text()) for path in own_groups(lab) if usage(path).exists())
    assert 2 * (used - 64 * MIB) < int(held["memory"]) - 64 * MIB
    assert len(os.listdir(proc / "task")) < int(held["pids.max"]) == 32 + 64 + 32
    descriptors = int(parse_limits((proc / "limits").read_text())["Max open files"][0])
    assert len(os.listdir(proc / "fd")) + 2 * 32 * 12 < descriptors
    lab.stop()


def mappings(proc: Path) -> list[tuple[str, list[str]]]:
    """The size and the flags of each mapping (proc_pid_smaps(5))."""
    lines = [line.partition(":") for line in (proc / "smaps").read_text().splitlines()]
    sizes = [value.strip() for name, _, value in lines if name == "Size"]
    flags = [value.split() for name, _, value in lines if name == "VmFlags"]
    return list(zip(sizes, flags, strict=True))


def usage(group: str) -> Path:
    v1 = Path(group, "memory.max_usage_in_bytes")
    return v1 if v1.exists() else Path(group, "memory.peak")


def test_a_definition_without_limits_is_as_it_was(lab: Any) -> None:
    assert lab.definition().machine.limits == Limits()


def own_groups(lab: Any) -> list[str]:
    return [group for group in lab.groups() if group.endswith("/vm-web")]


def read_groups(lab: Any) -> dict[str, str]:
    """What the groups of `web` hold, by the names of version 2."""
    found: dict[str, str] = {}
    for group in map(Path, own_groups(lab)):
        for file in ("pids.max", "cpu.max", "cpu.weight", "memory.max", "memory.limit_in_bytes"):
            if (group / file).exists():
                name = "memory" if file.startswith("memory") else file
                found[name] = (group / file).read_text().strip()
        if (group / "cpu.cfs_quota_us").exists():
            words = [
                (group / f"cpu.cfs_{name}_us").read_text().strip() for name in ("quota", "period")
            ]
            found["cpu.max"] = " ".join(words)
            found["cpu.weight"] = str(round(int((group / "cpu.shares").read_text()) * 100 / 1024))
        for file in ("io.weight", "io.bfq.weight", "blkio.bfq.weight", "blkio.weight"):
            if (group / file).exists():
                words = (group / file).read_text().split()
                found.setdefault("io.weight", words[-1])
    return found
