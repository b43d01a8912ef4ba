"""Many starts and stops in one process: a check, and no time, that nothing is left or grows.

What is counted is what there is of the host, of the kernel and of the launcher before the first
cycle that counts and after the last. All of it must be equal; memory may settle by `SETTLES_KIB`.
"""

import asyncio
import gc
import grp
import os
import pwd
import socket
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Final

from benchmarks.effort import Effort
from benchmarks.loop import Stopwatch
from benchmarks.memory import memory_of
from benchmarks.report import Cell, Curve, Plot, Report, Table, Target
from benchmarks.series import Summary, milliseconds
from benchmarks.testbed import definition, node_with, pool_of
from hypervisor.cgroup_mounts import mounted
from kvmsec import Node
from kvmsec.linux import command, processes

Count = int | str
NAME: Final = "bench"
WARM_UP: Final = 20
SETTLES_KIB: Final = 2048
"""What the launcher's own pages may grow by: 200 bytes for each of 10,000 cycles.

Python settles for thousands of cycles. Its cache of attributes keeps up to 4,096 names that were
looked up, and each cycle makes some of them anew (`getattr(limits, f"max_{name}")`). The table of
interned words, of which every path makes some, was seen to double once, by 0.9 MiB.
"""


def measure(effort: Effort) -> Report:
    cycles = effort.pick(10_000, 200, 20)
    return asyncio.run(_measure(cycles))


async def _measure(cycles: int) -> Report:
    async with node_with(pool_of(50)) as node:
        for _ in range(min(WARM_UP, cycles)):
            await _cycle(node)
        before = counts(node)
        times, pages = [], []
        for _ in range(cycles):
            watch = Stopwatch()
            await _cycle(node)
            times.append(watch.lap())
            pages.append(memory_of(os.getpid())["Anonymous"])
        after = counts(node)
    return _report(times, pages, before, after)


async def _cycle(node: Node) -> None:
    await node.start(definition(NAME))
    await node.stop(NAME, force=True)


def counts(node: Node) -> dict[str, Count]:
    """What an instance could leave something of."""
    gc.collect()
    paths = node.host.paths
    everything = [*paths.instances.rglob("*"), *paths.locks.iterdir()]
    return {
        "descriptors of the launcher": len(os.listdir("/proc/self/fd")),
        "threads of the launcher": len(os.listdir("/proc/self/task")),
        "processes": len(processes.pids()),
        "mounts": len(Path("/proc/self/mounts").read_text().splitlines()),
        "namespaces": len(_namespaces()),
        "control groups of this root": _groups(paths.tag),
        "control groups that are being taken down": _dying_groups(),
        "records and locks": len(everything),
        "leases": len(node.host.claims.leases()),
        "quarantined uids": len(node.host.claims.quarantined()),
        "shared memory, files": len(os.listdir("/dev/shm")),
        "System V objects": _system_v(),
        "network interfaces": len(socket.if_nameindex()),
        "users and groups": len(pwd.getpwall()) + len(grp.getgrall()),
        "packet rules": _rules(),
    }


def _namespaces() -> set[str]:
    """Every namespace that a process of the sandbox is in."""
    found = set()
    for link in Path("/proc").glob("[0-9]*/ns/*"):
        try:
            found.add(os.readlink(link))
        except OSError:
            continue  # It has ended.
    return found


def _groups(tag: str) -> int:
    tops = (Path(mount.path, "kvmsec", tag) for mount in mounted())
    return sum(len(directories) for top in tops for _, directories, _ in os.walk(top))


def _dying_groups() -> Count:
    """Of the whole host, which others move too: told, and not held to be equal."""
    for mount in mounted():
        if (path := Path(mount.path, "cgroup.stat")).exists():
            told = dict(line.split() for line in path.read_text().splitlines())
            return f"({told.get('nr_dying_descendants', 'unknown')})"
    return "(unknown)"


def _system_v() -> int:
    files = [Path("/proc/sysvipc", kind) for kind in ("shm", "sem", "msg")]
    return sum(len(path.read_text().splitlines()) - 1 for path in files if path.exists())


def _rules() -> str:
    """How many lines they are, and a sum of what they say."""
    legacy = [
        line
        for program in ("iptables-legacy-save", "ip6tables-legacy-save")
        for line in command.run([program], timeout_s=30).stdout.decode().splitlines()
        if line.startswith("-A")
    ]
    ruleset = command.run(["nft", "-s", "-t", "list", "ruleset"], timeout_s=30).stdout.decode()
    lines = [*legacy, *ruleset.splitlines()]
    return f"{len(lines)}, {zlib.crc32(os.linesep.join(lines).encode()):08x}"


def differences(before: Mapping[str, Count], after: Mapping[str, Count]) -> tuple[str, ...]:
    """What is not as it was; a count in brackets is of the whole host, and nobody's fault."""
    return tuple(
        f"{what}: {before[what]} before, {after[what]} after"
        for what in before
        if before[what] != after[what] and not str(after[what]).startswith("(")
    )


def _fifths(times: list[float]) -> tuple[Summary, Summary]:
    fifth = max(len(times) // 5, 1)
    return milliseconds(times[:fifth]), milliseconds(times[-fifth:])


def _report(
    times: list[float], pages: list[int], before: Mapping[str, Count], after: Mapping[str, Count]
) -> Report:
    problems = differences(before, after)
    grown = pages[-1] - pages[len(pages) // 10]
    if grown > SETTLES_KIB:
        problems += (f"the launcher's own pages grew by {grown} KiB",)
    rows: list[tuple[Cell, ...]] = [(what, before[what], after[what]) for what in before]
    rows.append(("launcher's own pages, KiB", pages[len(pages) // 10], pages[-1]))
    rows.append(("a start and stop, ms: first fifth, last", *_fifths(times)))
    counted = Table(
        "long_run",
        f"Before and after {len(times):,} starts and stops",
        ("", "before", "after"),
        tuple(rows),
        "In brackets: of the whole host, not held to be equal. Pages: after a tenth of the cycles.",
    )
    step = max(len(times) // 100, 1)
    plot = Plot(
        "long_run",
        "The launcher's own memory",
        "starts and stops",
        "KiB",
        (
            Curve(
                "own pages", tuple((float(n), float(pages[n])) for n in range(0, len(pages), step))
            ),
        ),
    )
    target = Target("what the launcher's own pages grow by", SETTLES_KIB, grown, " KiB")
    return Report("long_run", (counted,), (plot,), (target,), problems=problems)
