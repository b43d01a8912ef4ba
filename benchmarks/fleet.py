"""Fleets of the tiny guest, idle, held against as many QEMUs with nothing around them.

One process starts them, some at once, keeps them all running and stops them. What the launcher adds
is what it takes besides QEMU: its own pages, its files in /run, processes beside the QEMUs.
"""

import asyncio
import os
import statistics
import tempfile
from collections.abc import Awaitable, Callable, Sequence
from pathlib import Path
from typing import Final

from attrs import frozen

from benchmarks import raw
from benchmarks.effort import Effort
from benchmarks.loop import Stopwatch, host_cpu_s
from benchmarks.memory import bytes_below, memory_of
from benchmarks.report import Cell, Curve, Plot, Report, Table, Target
from benchmarks.series import growth, slope, summarise
from benchmarks.testbed import definition, node_with, pool_of
from kvmsec import Node
from kvmsec.linux import processes

RAW: Final = "raw QEMU"
KVMSEC: Final = "kvmsec, library"
LEAST_TO_GROW: Final = 50
"""Fewer starts than this vary more than they grow."""


@frozen
class Added:
    """What each instance added outside its QEMU: KiB, and processes."""

    launcher: float
    files: float
    processes: float


@frozen
class Fleet:
    """One fleet, started and stopped: seconds, and KiB of PSS for each QEMU beside the others."""

    started_s: float
    stopped_s: float
    cpu_s: float
    qemu_pss: float
    each_s: tuple[float, ...]
    own_pages: tuple[int, ...]
    """Of the launcher after each start, KiB that no file is behind."""
    added: Added | None = None


@frozen
class Size:
    """Fleets of one size, started so many at once."""

    instances: int
    at_once: int
    fleets: dict[str, list[Fleet]]

    def median(self, way: str, of: Callable[[Fleet], float]) -> float:
        return statistics.median(of(one) for one in self.fleets[way])

    def times_raw(self, of: Callable[[Fleet], float]) -> float:
        base = self.median(RAW, of)
        return self.median(KVMSEC, of) / base if base else 0.0


def measure(effort: Effort) -> Report:
    sizes = effort.pick((1, 10, 50, 100, 200), (10, 50), (1, 10))
    at_once = effort.pick((1, 2, 4, 16), (1, 4), (1, 4))
    return asyncio.run(_measure(sizes, at_once, effort.pick(3, 1, 1)))


async def _measure(sizes: Sequence[int], at_once: Sequence[int], rounds: int) -> Report:
    pool = pool_of(max(sizes))
    found = []
    with tempfile.TemporaryDirectory(dir="/run") as place:
        async with node_with(pool) as node:
            for _ in range(3):  # The first start imports, and asks QEMU for its features.
                await node.start(definition("first"))
                await node.stop("first", force=True)
            for instances in sizes:
                for number in at_once:
                    if number > instances:
                        continue
                    size = Size(instances, number, {RAW: [], KVMSEC: []})
                    # A large fleet is a series by itself.
                    for _ in range(rounds if instances <= LEAST_TO_GROW else 1):
                        size.fleets[RAW].append(await _raw(Path(place), instances, number))
                        size.fleets[KVMSEC].append(await _kvmsec(node, instances, number))
                    found.append(size)
    return _report(found)


async def _raw(place: Path, instances: int, at_once: int) -> Fleet:
    running: list[raw.Raw] = []

    async def start(number: int) -> int:
        running.append(one := await raw.starting(place / f"{number}.sock"))
        return one.process.pid

    async def stop(number: int) -> None:
        running[number].stop()

    return await _one_fleet(instances, at_once, start, stop)


async def _kvmsec(node: Node, instances: int, at_once: int) -> Fleet:
    definitions = [definition(f"vm{number}") for number in range(instances)]

    async def start(number: int) -> int:
        return (await node.start(definitions[number])).pid or 0

    async def stop(number: int) -> None:
        await node.stop(f"vm{number}", force=True)

    return await _one_fleet(instances, at_once, start, stop, node)


async def _one_fleet(
    instances: int,
    at_once: int,
    start: Callable[[int], Awaitable[int]],
    stop: Callable[[int], Awaitable[None]],
    node: Node | None = None,
) -> Fleet:
    each, pages, pids = [], [memory_of(os.getpid())["Anonymous"]], []
    processes_before = len(processes.pids())

    async def one(number: int) -> None:
        watch = Stopwatch()
        pids.append(await start(number))
        each.append(watch.lap())
        if at_once == 1:  # Else it would be in everybody's time.
            pages.append(memory_of(os.getpid())["Anonymous"])

    cpu = host_cpu_s()
    watch = Stopwatch()
    await _some_at_once(instances, at_once, one)
    started_s = watch.lap()
    cpu_s = host_cpu_s() - cpu
    pss = statistics.mean(memory_of(pid)["Pss"] for pid in pids)
    added = None
    if node is not None and at_once == 1:
        paths = [node.host.paths.instance(f"vm{n}").directory for n in range(instances)]
        added = Added(
            launcher=slope(pages) if instances > 1 else pages[-1] - pages[0],
            files=statistics.mean(map(bytes_below, paths)) / 1024,
            processes=(len(processes.pids()) - processes_before) / instances - 1,
        )
    watch.lap()
    await _some_at_once(instances, at_once, stop)
    return Fleet(started_s, watch.lap(), cpu_s, pss, tuple(each), tuple(pages), added)


async def _some_at_once(count: int, at_once: int, work: Callable[[int], Awaitable[None]]) -> None:
    numbers = iter(range(count))

    async def worker() -> None:
        for number in numbers:
            await work(number)

    async with asyncio.TaskGroup() as group:
        for _ in range(at_once):
            group.create_task(worker())


# What is told --------------------------------------------------------------------------------


def _report(found: Sequence[Size]) -> Report:
    alone = [one for one in found if one.at_once == 1]
    return Report(
        "fleet",
        tables=(_times(found), _weights(alone)),
        plots=(_plot_starts(alone), _plot_at_once(found)),
        targets=_targets(found, alone),
    )


def _times(found: Sequence[Size]) -> Table:
    rows: list[tuple[Cell, ...]] = []
    for one in found:
        cells: list[Cell] = [one.instances, one.at_once]
        for of in (_started, _cpu, _stopped):
            cells += [one.median(RAW, of), one.median(KVMSEC, of), one.times_raw(of)]
        rows.append(tuple(cells))
    head = ["instances", "at once"]
    for what in ("start of all", "CPU of the host", "stop of all"):
        head += [f"{what}, raw, s", "kvmsec, s", "x raw"]
    note = "Medians of the fleets of a size."
    return Table("fleets", "Start and stop of fleets", tuple(head), tuple(rows), note)


def _weights(alone: Sequence[Size]) -> Table:
    rows: list[tuple[Cell, ...]] = []
    for one in alone:
        last = [fleet.added for fleet in one.fleets[KVMSEC] if fleet.added]
        rows.append(
            (
                one.instances,
                one.median(RAW, _pss) / 1024,
                one.median(KVMSEC, _pss) / 1024,
                statistics.median(added.launcher for added in last),
                statistics.median(added.files for added in last),
                statistics.median(added.processes for added in last),
                *(
                    growth(_each(one, way)) if one.instances >= LEAST_TO_GROW else "-"
                    for way in (KVMSEC, RAW)
                ),
            )
        )
    head: tuple[str, ...] = ("instances", "PSS of a raw QEMU, MiB", "of kvmsec's, MiB")
    head += (
        "launcher adds, KiB",
        "its files, KiB",
        "processes",
        "last starts over first",
        "raw QEMU's",
    )
    note = "Started one after the other; growth is the last fifth's median over the first's."
    return Table("weights", "What an instance adds", head, tuple(rows), note)


def _each(one: Size, way: str) -> list[float]:
    """A start's seconds by its place in the fleet, the median of the fleets of that size."""
    return [
        statistics.median(some) for some in zip(*(f.each_s for f in one.fleets[way]), strict=True)
    ]


def _plot_starts(alone: Sequence[Size]) -> Plot:
    largest = alone[-1]
    curves = tuple(
        Curve(way, tuple((at, s * 1e3) for at, s in enumerate(_each(largest, way), 1)))
        for way in (RAW, KVMSEC)
    )
    title = "A start beside those that run already"
    return Plot("fleet_growth", title, "instances that run", "start, ms", curves)


def _plot_at_once(found: Sequence[Size]) -> Plot:
    largest = max(one.instances for one in found)
    some = [one for one in found if one.instances == largest]
    curves = tuple(
        Curve(
            way,
            tuple(
                (one.at_once, summarise([fleet.started_s for fleet in one.fleets[way]]))
                for one in some
            ),
        )
        for way in (RAW, KVMSEC)
    )
    title = f"Start of {largest} instances"
    return Plot("fleet_at_once", title, "starts at once", "start of all, s", curves)


def _targets(found: Sequence[Size], alone: Sequence[Size]) -> tuple[Target, ...]:
    fifty = next((one for one in alone if one.instances == 50), None)
    return (
        Target(
            "fleet of 50, wall, against raw QEMU",
            1.5,
            fifty.times_raw(_started) if fifty else None,
            " x",
        ),
        Target(
            "fleet of 50, CPU, against raw QEMU",
            1.5,
            fifty.times_raw(_cpu) if fifty else None,
            " x",
        ),
    )


def _started(fleet: Fleet) -> float:
    return fleet.started_s


def _stopped(fleet: Fleet) -> float:
    return fleet.stopped_s


def _cpu(fleet: Fleet) -> float:
    return fleet.cpu_s


def _pss(fleet: Fleet) -> float:
    return fleet.qemu_pss
