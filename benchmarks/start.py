"""Start to ready, and forced stop to uid clean: each way to run the tiny guest with one raw disk.

A start through a daemon, a command or libvirt is taken from the call to its return; the library's
to the reply to `qmp_capabilities` as well, where raw QEMU's ends. Each way has a disk of its own.
"""

import asyncio
import contextlib
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import AsyncIterator, Iterator, Mapping, Sequence
from pathlib import Path

from attrs import frozen

from benchmarks import peers, raw
from benchmarks.daemon import Daemon, daemon_with
from benchmarks.effort import Effort
from benchmarks.loop import Sample, Series, Stopwatch, Work, host_cpu_s, interleave
from benchmarks.memory import memory_of
from benchmarks.report import Cell, Curve, Plot, Report, Table, Target
from benchmarks.series import milliseconds, ratio, summarise
from benchmarks.testbed import (
    FIRST_UID,
    KVMSEC,
    definition,
    document,
    make_disk,
    node_with,
    pool_of,
)
from benchmarks.worker import WorkerFailed, running
from hypervisor.cgroup_mounts import mounted
from hypervisor.tiny import rom_path
from kvmsec.daemon.reaching import reach
from kvmsec.paths import Paths
from uidpool.ranges import UidRanges

NAME = "bench"
REPLY, START, STOP, CPU = "reply", "start", "stop", "cpu"
RAW, SANDBOXED = "raw QEMU", "raw QEMU, its full -sandbox"
LIBRARY, DAEMON, CLI = "kvmsec, library", "kvmsec, daemon", "kvmsec, command line"
VIRSH, BINDING = "libvirt, virsh", "libvirt, Python binding"
WAYS = (RAW, SANDBOXED, LIBRARY, DAEMON, CLI, VIRSH, BINDING)


@frozen
class Footprint:
    """Of one of an idle daemon's processes, in MiB (proc_pid_smaps(5))."""

    part: str
    pss: float
    rss: float


def measure(effort: Effort) -> Report:
    return asyncio.run(_measure(effort))


async def _measure(effort: Effort) -> Report:
    # One for each root: where two guard a uid, only the rules that see a packet first can count it,
    # and the other root's start has to read all of its own rules back.
    pools = [pool_of(100, FIRST_UID + 100 * root) for root in range(3)]
    async with contextlib.AsyncExitStack() as running:
        place = Path(running.enter_context(tempfile.TemporaryDirectory(dir="/run")))
        place.chmod(0o711)  # libvirt's uid opens its disk by path.
        works: dict[str, Work] = {
            RAW: lambda: _raw(place, ()),
            SANDBOXED: lambda: _raw(place, raw.SANDBOX),
        }
        works[LIBRARY] = await running.enter_async_context(_library(pools[0], place))
        works[CLI] = await running.enter_async_context(_command_line(pools[1], place))
        daemon = await running.enter_async_context(daemon_with(pools[2]))
        works[DAEMON] = await running.enter_async_context(_through(daemon, place))
        await asyncio.sleep(effort.pick(1, 1, 0))
        idle = _footprints(daemon)
        missing = peers.lacks_libvirt()
        if missing is None:
            try:
                works |= running.enter_context(_libvirt(place))
            except WorkerFailed as error:
                missing = f"libvirt, which does not run here ({error})"
        rounds = effort.pick(51, 9, 1)
        series = await interleave(rounds, {one: works[one] for one in WAYS if one in works})
        pair = await interleave(rounds, {one: works[one] for one in (RAW, LIBRARY)})
    return _report(series, pair, idle, missing)


# The ways ------------------------------------------------------------------------------------


async def _raw(place: Path, extra: Sequence[str]) -> Sample:
    disk = make_disk(place / "raw.img")
    cpu = host_cpu_s()
    started, ready_s = raw.start(place / "raw.sock", disk, extra)
    stopped_s = started.stop()
    return {REPLY: ready_s, START: ready_s, STOP: stopped_s, CPU: host_cpu_s() - cpu}


@contextlib.asynccontextmanager
async def _library(pool: UidRanges, place: Path) -> AsyncIterator[Work]:
    what = json.dumps(document(make_disk(place / "library.img")))
    async with node_with(pool) as node:
        argv = [sys.executable, "-m", "benchmarks.workers.library"]
        with running([*argv, str(node.host.paths.root), NAME, what]) as worker:

            async def work() -> Sample:
                cpu = host_cpu_s()
                took_s = worker.ask("start")
                return {**took_s, STOP: worker.ask("stop"), CPU: host_cpu_s() - cpu}

            yield work


@contextlib.asynccontextmanager
async def _through(daemon: Daemon, place: Path) -> AsyncIterator[Work]:
    node = await reach(Paths(daemon.root).node_socket)
    assert node is not None
    what = definition(NAME, make_disk(place / "daemon.img"))

    async def work() -> Sample:
        cpu, watch = host_cpu_s(), Stopwatch()
        await node.start(what)
        started_s = watch.lap()
        await node.stop(NAME, force=True)
        return {START: started_s, STOP: watch.lap(), CPU: host_cpu_s() - cpu}

    try:
        yield work
    finally:
        await node.close()


@contextlib.asynccontextmanager
async def _command_line(pool: UidRanges, place: Path) -> AsyncIterator[Work]:
    """A process for each start and each stop, on a node without a daemon."""
    spec = place / "spec.json"
    spec.write_text(json.dumps(document(make_disk(place / "command.img"))))
    async with node_with(pool) as node:
        kvmsec = [str(KVMSEC), "--root", str(node.host.paths.root), "instance"]

        async def work() -> Sample:
            cpu, watch = host_cpu_s(), Stopwatch()
            _run(*kvmsec, "start", NAME, "--spec", str(spec))
            started_s = watch.lap()
            _run(*kvmsec, "stop", NAME, "--force")
            return {START: started_s, STOP: watch.lap(), CPU: host_cpu_s() - cpu}

        yield work


def _run(*argv: str) -> None:
    subprocess.run(argv, check=True, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL)


@contextlib.contextmanager
def _libvirt(place: Path) -> Iterator[dict[str, Work]]:
    disk = make_disk(place / "libvirt.img")
    with (
        _groups_as_before(),
        peers.worker("libvirt_domains.py", str(rom_path()), str(disk)) as worker,
    ):

        def way(name: str) -> Work:
            async def work() -> Sample:
                cpu = host_cpu_s()
                started_s, stopped_s = worker.ask(f"{name} start"), worker.ask(f"{name} stop")
                return {START: started_s, STOP: stopped_s, CPU: host_cpu_s() - cpu}

            return work

        worker.ask("version")  # Its daemons are up once it answers.
        yield {VIRSH: way("virsh"), BINDING: way("binding")}


@contextlib.contextmanager
def _groups_as_before() -> Iterator[None]:
    """Control groups are the host's: remove the empty parents that libvirt leaves of its own."""
    before = _machine_groups()
    try:
        yield
    finally:
        for group in sorted(_machine_groups() - before, reverse=True):
            os.rmdir(group)


def _machine_groups() -> set[str]:
    tops = (top for mount in mounted() for top in Path(mount.path).glob("machine*"))
    return {directory for top in tops for directory, _, _ in os.walk(top)}


def _footprints(daemon: Daemon) -> tuple[Footprint, ...]:
    pid = daemon.process.pid
    children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    parts = {"root part": pid, **{f"child {n}": int(one) for n, one in enumerate(children, 1)}}
    return tuple(_footprint(part, one) for part, one in parts.items())


def _footprint(part: str, pid: int) -> Footprint:
    kib = memory_of(pid)
    return Footprint(part, kib["Pss"] / 1024, kib["Rss"] / 1024)


# What is told --------------------------------------------------------------------------------


def _report(
    series: Mapping[str, Series],
    pair: Mapping[str, Series],
    idle: Sequence[Footprint],
    missing: str | None,
) -> Report:
    found = [way for way in WAYS if way in series]
    bars = [(START, "start_to_ready", "Start to ready"), (STOP, "stop", "Forced stop to uid clean")]
    return Report(
        "start",
        tables=(_times(series), _alone(pair), _memory(idle)),
        plots=tuple(
            Plot(
                key,
                title,
                "",
                "ms",
                tuple(Curve(way, ((0, milliseconds(series[way][what])),)) for way in found),
                has_bars=True,
            )
            for what, key, title in bars
        ),
        targets=_targets(series),
        missing=(missing,) if missing else (),
    )


def _times(series: Mapping[str, Series]) -> Table:
    base = series[RAW]
    rows: list[tuple[Cell, ...]] = []
    for way in WAYS:
        found = series.get(way)
        if found is None:
            rows.append((way, *[None] * 6))
            continue
        cells: list[Cell] = [milliseconds(found[REPLY]) if REPLY in found else "-"]
        cells += [milliseconds(found[START]), ratio(found[START], base[START])]
        cells += [milliseconds(found[STOP]), ratio(found[STOP], base[STOP])]
        cells += [sum(found[CPU]) / len(found[CPU]) * 1e3]
        rows.append((way, *cells))
    head = ("", "to the reply, ms", "to the return, ms", "x raw", "forced stop, ms", "x raw")
    note = "Median (p10 to p90); processor time is the mean of the whole host's, start and stop."
    return Table("start", "Start and stop", (*head, "CPU, ms"), tuple(rows), note)


def _alone(pair: Mapping[str, Series]) -> Table:
    """What the library adds where nobody else has had the processors in between."""
    base = pair[RAW][REPLY]
    rows = [
        (way, milliseconds(found[REPLY]), ratio(found[REPLY], base)) for way, found in pair.items()
    ]
    title = "Start, these two in turn and nothing between"
    return Table("start alone", title, ("", "to the reply, ms", "x raw"), tuple(rows))


def _memory(idle: Sequence[Footprint]) -> Table:
    rows = [(one.part, one.pss, one.rss) for one in idle]
    rows.append(("together", sum(one.pss for one in idle), sum(one.rss for one in idle)))
    return Table("daemon", "An idle daemon", ("process", "PSS, MiB", "RSS, MiB"), tuple(rows))


def _targets(series: Mapping[str, Series]) -> tuple[Target, ...]:
    base, library = series[RAW], series[LIBRARY]
    peer = series.get(VIRSH, {}).get(START)
    stop_over_ms = summarise(library[STOP]).median - summarise(base[STOP]).median
    return (
        Target(
            "start through the library to the reply, against raw QEMU",
            1.2,
            ratio(library[REPLY], base[REPLY]),
            " x",
        ),
        Target(
            "start through the daemon, against raw QEMU",
            1.3,
            ratio(series[DAEMON][START], base[START]),
            " x",
        ),
        Target(
            "start through the library, against virsh",
            0.25,
            ratio(library[START], peer) if peer else None,
            " x",
        ),
        Target("forced stop through the library, over raw QEMU's", 30, stop_over_ms * 1e3, " ms"),
    )
