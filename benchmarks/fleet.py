"""What an instance costs its host outside QEMU, and whether starts grow with the fleet.

One node in one process starts instances of the tiny guest one after the other, keeps them all
running, stops them, and does it all again. Root; runs in namespaces of its own and leaves nothing.

usage: python benchmarks/fleet.py [INSTANCES]
"""

import asyncio
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from _sandbox import enter
from attrs import frozen
from start import raw_start_and_stop

from hypervisor.cgroup_mounts import mounted
from hypervisor.features import find_qemu
from hypervisor.tiny import rom_path
from kvmsec import Node, definition_from
from kvmsec.cluster import operations
from kvmsec.linux import processes
from kvmsec.model.instance import InstanceDefinition
from uidpool import provision
from uidpool.ranges import UidRanges
from uidpool.snapshot import Snapshot

FIRST_UID = 200000
# What the kernel keeps for everybody; other work on the host moves it as well.
KERNEL = ("Slab", "Percpu", "KernelStack", "PageTables", "Shmem")


@frozen
class Look:
    """What there is at one moment; memory in KiB."""

    launcher_rss: int
    launcher_pss: int
    launcher_own: int  # Its anonymous pages: what no file is behind.
    descriptors: int
    others: int  # Processes besides this one and the instances' QEMUs.
    kernel: dict[str, int]


@frozen
class Round:
    """One fleet, started and stopped: looks before, after each start, at its end; seconds."""

    before: Look
    growing: list[Look]
    files: list[int]
    trees: list[int]
    qemu_pss: list[int]
    group_kernel: list[int]
    starts_s: list[float]
    starts_cpu_s: list[float]  # The launcher's own, which other work on the host hardly moves.
    raw_s: tuple[float, float]  # Of raw QEMU, beside nothing and beside the fleet.
    after: Look
    left: dict[str, int]


def main() -> None:
    enter()
    count = int(sys.argv[1]) if len(sys.argv) > 1 else 100
    pool = UidRanges.parse(f"{FIRST_UID}-{FIRST_UID + count - 1}")
    with tempfile.TemporaryDirectory(dir="/run") as root:
        provision.apply(provision.plan(pool, Snapshot.read()))
        asyncio.run(measure(Path(root), pool))


async def measure(root: Path, pool: UidRanges) -> None:
    node = Node(root)
    node.host.paths.make_directories()
    await operations.init(node.host.store, node, "bench", uid_pool=pool)
    for _ in range(3):  # The first start imports, and asks QEMU for its features.
        await node.start(definition("first"))
        await node.stop("first", force=True)
    rounds = [await one_round(node, root, pool.size()) for _ in range(2)]
    await node.close()
    await operations.destroy(node.host.store, [node])
    report_cost(rounds[0])
    report_growth(rounds)


def definition(name: str) -> InstanceDefinition:
    document = {"memory_mib": 1, "firmware": str(rom_path()), "accelerator": "auto"}
    return definition_from(document, name, source="the benchmark")


async def one_round(node: Node, root: Path, count: int) -> Round:
    names = [f"vm{number}" for number in range(count)]
    raw_alone = raw_start(root)
    before = look(0)
    growing, starts, cpu, pids = [], [], [], []
    for name in names:
        begin, begin_cpu = time.perf_counter(), time.process_time()
        info = await node.start(definition(name))
        starts.append(time.perf_counter() - begin)
        cpu.append(time.process_time() - begin_cpu)
        pids.append(info.pid or 0)
        growing.append(look(len(pids)))
    files = [bytes_below(node.host.paths.instance(name).directory) for name in names]
    trees = [bytes_of_tree(pid) for pid in pids]
    qemu_pss = [memory_of(pid)["Pss"] for pid in pids]
    group_kernel = [kib for name in names if (kib := kernel_memory_of(node, name)) is not None]
    raw_beside = raw_start(root)
    for name in names:
        await node.stop(name, force=True)
    await asyncio.sleep(0)  # The watches see that they are over.
    return Round(
        before, growing, files, trees, qemu_pss, group_kernel, starts, cpu,
        (raw_alone, raw_beside), look(0), left_of(node),
    )  # fmt: skip


def raw_start(root: Path) -> float:
    """Raw QEMU, to the reply of its monitor: how much of a growth is the host's."""
    disk = root / "raw.img"
    disk.write_bytes(bytes(1 << 20))
    return statistics.median(
        raw_start_and_stop(find_qemu(None, None), disk, root)[0] for _ in range(10)
    )


# One look ------------------------------------------------------------------------------------


def look(instances: int) -> Look:
    mine = memory_of(os.getpid())
    return Look(
        launcher_rss=mine["Rss"],
        launcher_pss=mine["Pss"],
        launcher_own=mine["Anonymous"],
        descriptors=len(os.listdir("/proc/self/fd")) - 1,  # One is the listing's own.
        others=len(processes.pids()) - 1 - instances,
        kernel=counters(Path("/proc/meminfo")),
    )


def memory_of(pid: int) -> dict[str, int]:
    """The sums of a process's mappings in KiB (proc_pid_smaps(5))."""
    return counters(Path(f"/proc/{pid}/smaps_rollup"))


def counters(path: Path) -> dict[str, int]:
    found = {}
    for line in path.read_text().splitlines():
        name, _, rest = line.partition(":")
        if rest.endswith(" kB"):
            found[name] = int(rest.split()[0])
    return found


def bytes_below(directory: Path) -> int:
    """What is really used by the files below a directory, those on mounts in it too."""
    entries = [directory, *directory.rglob("*")]
    return sum(entry.lstat().st_blocks * 512 for entry in entries)


def bytes_of_tree(pid: int) -> int:
    """What is really used of the filesystem that a process has as its root."""
    seen = os.statvfs(f"/proc/{pid}/root")
    return (seen.f_blocks - seen.f_bfree) * seen.f_frsize


def kernel_memory_of(node: Node, name: str) -> int | None:
    """What the kernel keeps for an instance's control group, in KiB; None where it isn't told."""
    for mount in mounted():
        group = Path(mount.path, "kvmsec", node.host.paths.tag, f"vm-{name}")
        if (file := group / "memory.kmem.usage_in_bytes").exists():
            return int(file.read_text()) // 1024
        if (file := group / "memory.stat").exists():
            lines = dict(line.split() for line in file.read_text().splitlines())
            if "kernel" in lines:
                return int(lines["kernel"]) // 1024
    return None


def left_of(node: Node) -> dict[str, int]:
    paths = node.host.paths
    groups = (Path(mount.path, "kvmsec", paths.tag) for mount in mounted())
    mounts = Path("/proc/self/mounts").read_text().splitlines()
    return {
        "records": len(os.listdir(paths.instances)),
        "locks": len(os.listdir(paths.locks)),
        "leases": len(node.host.claims.leases()),
        "mounts": sum(f" {paths.instances}/" in line for line in mounts),
        "control groups": sum(len([*group.glob("vm-*")]) for group in groups),
    }


# What is printed -----------------------------------------------------------------------------


def report_cost(one: Round) -> None:
    count = len(one.growing)
    last = one.growing[-1]
    launcher = slope(one.growing, lambda look: look.launcher_own)
    files = statistics.mean(one.files) / 1024
    print(f"what one of {count} instances adds to the host, besides its QEMU")
    print(f"  processes                {(last.others - one.before.others) / count:8.2f}")
    print(f"  launcher, its own pages   {launcher:8.1f} KiB a start")
    print(f"  launcher, PSS            {slope(one.growing, lambda it: it.launcher_pss):8.1f} KiB")
    print(f"  launcher, RSS            {slope(one.growing, lambda it: it.launcher_rss):8.1f} KiB")
    print(f"  its files in /run        {files:8.1f} KiB")
    print(f"  together                 {launcher + files:8.1f} KiB   (bound: 64)")
    tree = statistics.mean(one.trees) / 1024
    print(f"  besides, its root tree   {tree:8.1f} KiB   (64 of them a copy of its firmware)")
    print("  in the kernel, all of the host's (other work counts, QEMU's share too)")
    for name in KERNEL:
        grown = slope(one.growing, lambda it, name=name: it.kernel.get(name, 0))
        print(f"    {name:22} {grown:8.1f} KiB")
    if one.group_kernel:
        print(f"  kernel memory of its control group (QEMU's) {mean(one.group_kernel)}")
    print(f"  QEMU itself, PSS beside the others          {mean(one.qemu_pss)}")


def report_growth(rounds: Sequence[Round]) -> None:
    print("whether starts grow, medians of ten")
    for number, one in enumerate(rounds, 1):
        print(f"  round {number}")
        for words, first, last in (
            ("a start", one.starts_s[:10], one.starts_s[-10:]),
            ("CPU time of the launcher", one.starts_cpu_s[:10], one.starts_cpu_s[-10:]),
            ("raw QEMU, alone and beside them", *([it] for it in one.raw_s)),
        ):
            early, late = statistics.median(first), statistics.median(last)
            print(f"    {words:32} {early * 1e3:6.1f}, {late * 1e3:6.1f} ms  x {late / early:.2f}")
    print("whether the launcher keeps something of instances that are gone")
    looks = [rounds[0].before, *(one.after for one in rounds)]
    for words, of in (
        ("descriptors", lambda it: it.descriptors),
        ("RSS in KiB", lambda it: it.launcher_rss),
        ("its own, in KiB", lambda it: it.launcher_own),
        ("other processes", lambda it: it.others),
    ):
        values = ", ".join(str(of(one)) for one in looks)
        print(f"  {words:16} before, after one round, after two: {values}")
    print(f"  descriptors while all run: {[one.growing[-1].descriptors for one in rounds]}")
    for number, one in enumerate(rounds, 1):
        left = ", ".join(f"{what} {amount}" for what, amount in one.left.items())
        print(f"  left after round {number}: {left}")


def slope(looks: Sequence[Look], of: Callable[[Look], int]) -> float:
    """Growth per start by least squares, without the first tenth, in which things settle."""
    settled = [of(one) for one in looks[len(looks) // 10 :]]
    return statistics.linear_regression(range(len(settled)), settled).slope


def mean(values: Sequence[int]) -> str:
    return f"{statistics.mean(values):8.1f} KiB  ({min(values)} to {max(values)})"


if __name__ == "__main__":
    main()
