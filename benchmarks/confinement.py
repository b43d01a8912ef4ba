"""The price of confinement: the same QEMU with each lock added in turn, and a start step by step.

What is added stays: each line has all the locks above it. The order is the jail's own, in which
later steps rely on earlier ones, so a line says what its lock adds there, and not alone. Two things
differ: descriptors are put on their numbers from the first line on, for QEMU needs its monitor's,
and from `namespaces` to `devices` is one line, since in the tree nothing runs before that.
"""

import asyncio
import contextlib
import itertools
import os
import pwd
import socket
import statistics
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Final

from attrs import evolve, frozen

from benchmarks import raw
from benchmarks.effort import Effort
from benchmarks.loop import Sample, Series, Stopwatch, Work, interleave
from benchmarks.report import Cell, Curve, Plot, Report, Table
from benchmarks.series import milliseconds, ratio, summarise
from benchmarks.testbed import FIRST_UID, definition, node_with, pool_of
from hypervisor import huge_pages, jail
from hypervisor.cgroups import InstanceCgroup
from hypervisor.jail import BootFile, Jail
from hypervisor.machine import Machine
from hypervisor.nursery import Nursery
from hypervisor.tiny import rom_path
from hypervisor.tree import BOOT
from kvmsec import Node
from kvmsec.linux import namespaces, processes, syscalls
from kvmsec.linux.credentials import Credentials
from kvmsec.linux.readiness import is_readable
from kvmsec.model.security import SecurityModel
from kvmsec.node import launch, output
from kvmsec.node.engine import Engine, engine_for
from kvmsec.node.limits import Allotment, allot, memory_bytes

READY: Final = "to the reply"
RAW, SANDBOX = "raw QEMU", "its own -sandbox"
PID_NAMESPACE: Final = "a child from Python; PID, network, IPC, UTS"
WHOLE: Final = "all else: draw, records, proof, monitor"
MONITOR, LINE = 3, 4  # The descriptors that QEMU gets its sockets as.
INSTANCE: Final = "bench"
DEADLINE_S: Final = 10.0


def measure(effort: Effort) -> Report:
    return asyncio.run(_measure(effort.pick(31, 5, 1)))


async def _measure(rounds: int) -> Report:
    pool = pool_of(20)
    marks: list[tuple[str, float]] = []
    with tempfile.TemporaryDirectory(dir="/run") as directory:
        place = Path(directory)
        async with node_with(
            pool, on_step=lambda step: marks.append((step, time.perf_counter()))
        ) as node:
            works: dict[str, Work] = {
                RAW: lambda: _raw(place, ()),
                SANDBOX: lambda: _raw(place, raw.SANDBOX),
            }
            bench = _bench_of(node, place)
            with contextlib.ExitStack() as nurseries:
                for name, steps in _prefixes():
                    nursery = nurseries.enter_context(contextlib.closing(_nursery_of(steps)))
                    works[name] = partial(_jailed, bench, nursery, steps)
                works[WHOLE] = lambda: _whole(node, marks)
                series = await interleave(rounds, works)
    return _report(series)


def _prefixes() -> Iterator[tuple[str, tuple[jail.Step, ...]]]:
    """The jail's steps, one more each time, by the name of the last."""
    descriptors = next(step for step in jail.STEPS if step.name == "descriptors")
    yield PID_NAMESPACE, (descriptors,)
    names = [step.name for step in jail.STEPS]
    for count, step in enumerate(jail.STEPS, 1):
        is_between = names.index("namespaces") <= count - 1 < names.index("devices")
        if step is descriptors or is_between:
            continue
        begun = jail.STEPS[:count]
        name = "namespaces to devices" if step.name == "devices" else step.name
        yield name, begun if descriptors in begun else (*begun, descriptors)


# The ways ------------------------------------------------------------------------------------


async def _raw(place: Path, extra: Sequence[str]) -> Sample:
    started, ready_s = raw.start(place / "raw.sock", None, extra)
    started.stop()
    return {READY: ready_s}


@frozen
class Bench:
    """What a jail is made of, and where."""

    node: Node
    place: Path
    machine: Machine
    engine: Engine
    allotment: Allotment
    credentials: Credentials


def _bench_of(node: Node, place: Path) -> Bench:
    machine = definition(INSTANCE).machine
    engine = engine_for(node.host, machine)
    config = node.host.config
    allotment = allot(config, machine, SecurityModel.POOL, huge_pages.pools_mib())
    memory = memory_bytes(config, machine, engine.accelerator, ())
    uid = FIRST_UID + 19
    (place / "output").mkdir()
    return Bench(
        node,
        place,
        machine,
        engine,
        evolve(allotment, groups=evolve(allotment.groups, memory_bytes=memory)),
        Credentials(uid, pwd.getpwuid(uid).pw_gid),
    )


async def _jailed(bench: Bench, nursery: Nursery, steps: Sequence[jail.Step]) -> Sample:
    names = {step.name for step in steps}
    watch = Stopwatch()
    with contextlib.ExitStack() as opened:
        paths = [bench.place / f"jailed.{what}" for what in ("sock", "line")]
        listeners = [opened.enter_context(raw.listening(path)) for path in paths]
        for path in paths:
            opened.callback(path.unlink)
        group = _group(bench, opened) if "cgroups" in names else InstanceCgroup()
        newborn = nursery.birth(group.unified)
        opened.callback(newborn.close)
        one = _jail(bench, listeners, group.tasks_files, opened)
        newborn.enter(one.cell)
        argv = _argv(bench, is_inside="namespaces" in names)
        is_readable(newborn.line.fileno(), DEADLINE_S)
        newborn.hear()
        opened.callback(_end, newborn.pidfd)
        newborn.become(one, argv[0], argv)
        newborn.release()
        newborn.executed()
        for listener in listeners:
            listener.close()
        raw.greet(paths[0])
        ready_s = watch.lap()
    nursery.prepare()  # As a node does once a start has ended.
    return {READY: ready_s}


def _group(bench: Bench, opened: contextlib.ExitStack) -> InstanceCgroup:
    host = bench.node.host
    parent, limits = host.config.cgroup.parent, bench.allotment.groups
    group = host.hierarchy.create(host.paths.tag, INSTANCE, parent, limits)
    opened.callback(group.remove)
    return group


def _jail(
    bench: Bench,
    listeners: Sequence[socket.socket],
    tasks_files: tuple[str, ...],
    opened: contextlib.ExitStack,
) -> Jail:
    rom = os.open(rom_path(), os.O_RDONLY | os.O_CLOEXEC)
    opened.callback(os.close, rom)
    log = output.mount(bench.place / "output", bench.credentials, 64)
    opened.callback(namespaces.umount, str(bench.place / "output"), namespaces.MNT_DETACH)
    opened.callback(os.close, log)
    room = syscalls.detached_copy(str(bench.place / "output"))
    opened.callback(os.close, room)
    tree = bench.node.host.trees.take(bench.engine.closure)
    opened.callback(os.close, tree)
    return Jail(
        jail.Cell(tree, cgroups=tasks_files, limits=bench.allotment.process),
        name=INSTANCE,
        credentials=bench.credentials,
        output=room,
        log=log,
        system_calls=bench.engine.system_calls,
        boot_files=(BootFile(rom, rom_path().stat().st_size, rom_path().name),),
        has_kvm=bench.engine.accelerator == "kvm",
        descriptors={MONITOR: listeners[0].fileno(), LINE: listeners[1].fileno()},
    )


def _argv(bench: Bench, *, is_inside: bool) -> list[str]:
    firmware = f"{BOOT}/{rom_path().name}" if is_inside else str(rom_path())
    machine = [*raw.machine_arguments(firmware), *raw.socket_arguments(MONITOR, LINE)]
    return [bench.engine.closure.program, *machine, *raw.SANDBOX]


def _nursery_of(steps: Sequence[jail.Step]) -> Nursery:
    """One whose children take these steps: nothing of kvmsec's can ask for that, so that its lists
    are changed while it is made."""
    cell_steps, jail_steps = jail.CELL_STEPS, jail.JAIL_STEPS
    nursery = Nursery()
    try:
        jail.CELL_STEPS = tuple(s for s in steps if s in cell_steps)  # type: ignore[assignment, misc]
        jail.JAIL_STEPS = tuple(s for s in steps if s in jail_steps)  # type: ignore[assignment, misc]
        nursery.begin()
    finally:
        jail.CELL_STEPS, jail.JAIL_STEPS = cell_steps, jail_steps  # type: ignore[misc]
    return nursery


def _end(pidfd: int) -> None:
    processes.kill(pidfd)
    os.waitid(os.P_PIDFD, pidfd, os.WEXITED)
    os.close(pidfd)


async def _whole(node: Node, marks: list[tuple[str, float]]) -> Sample:
    marks.clear()
    begin = time.perf_counter()
    await node.start(definition(INSTANCE))
    end = time.perf_counter()
    await node.stop(INSTANCE, force=True)
    times = [("before", begin), *marks, ("", end)]
    steps = {name: later - at for (name, at), (_, later) in itertools.pairwise(times)}
    ready_s = next(at for name, at in marks if name == "verify") - begin
    return {READY: ready_s, **steps}


# What is told --------------------------------------------------------------------------------


def _report(series: Mapping[str, Series]) -> Report:
    return Report(
        "confinement",
        tables=(_locks(series), _steps(series[WHOLE])),
        plots=(_plot(series),),
    )


def _locks(series: Mapping[str, Series]) -> Table:
    base = series[RAW][READY]
    rows: list[tuple[Cell, ...]] = []
    before = base
    for name, found in series.items():
        times = found[READY]
        added = statistics.median(times) - statistics.median(before)
        rows.append((name, milliseconds(times), added * 1e3, ratio(times, base)))
        before = times
    head = ("with", "to the reply, ms", "added, ms", "x raw")
    note = "Each line has all above it; what it adds is the difference of two medians."
    return Table("locks", "The same start with each lock added in turn", head, tuple(rows), note)


def _steps(whole: Series) -> Table:
    reasons = {step.name: step.reason for step in launch.STEPS}
    reasons["before"] = "reconcile, the lock, the model"
    rows = tuple(
        (name, summarise(times, scale=1e3), reasons.get(name, ""))
        for name, times in whole.items()
        if name != READY
    )
    head = ("step", "ms", "what for")
    return Table("steps", "A start through the library, step by step", head, rows)


def _plot(series: Mapping[str, Series]) -> Plot:
    curves = tuple(
        Curve(name, ((0.0, milliseconds(found[READY])),)) for name, found in series.items()
    )
    title = "Start to ready with each lock added in turn"
    return Plot("confinement", title, "", "ms", curves, has_bars=True)
