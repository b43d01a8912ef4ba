"""The command line: wall clock of the whole process, beside that of Python itself."""

import asyncio
import subprocess
import sys
from collections.abc import Mapping

from benchmarks.effort import Effort
from benchmarks.loop import Sample, Series, Stopwatch, Work, interleave
from benchmarks.report import Report, Table, Target
from benchmarks.series import milliseconds, ratio
from benchmarks.testbed import KVMSEC, definition, node_with, pool_of

WALL = "wall"
PYTHON = "python -c pass"


def measure(effort: Effort) -> Report:
    return asyncio.run(_measure(effort.pick(200, 20, 3), effort.pick(31, 5, 1)))


async def _measure(instances: int, rounds: int) -> Report:
    async with node_with(pool_of(instances)) as node:
        kvmsec = (str(KVMSEC), "--root", str(node.host.paths.root))
        listing = (*kvmsec, "instance", "list")
        empty = await interleave(
            rounds,
            {
                PYTHON: _command(sys.executable, "-c", "pass"),
                "kvmsec --help": _command(*kvmsec, "--help"),
                "kvmsec instance list, of none": _command(*listing),
                "kvmsec cluster verify, 1 node": _command(*kvmsec, "cluster", "verify"),
            },
        )
        for number in range(instances):
            await node.start(definition(f"vm{number}"))
        listed, as_json = (f"kvmsec instance list{how}, of {instances}" for how in ("", " --json"))
        full = await interleave(
            rounds, {listed: _command(*listing), as_json: _command(*listing, "--json")}
        )
        for number in range(instances):
            await node.stop(f"vm{number}", force=True)
    return _report({**empty, **full}, listed if instances == 200 else None)


def _command(*argv: str) -> Work:
    async def work() -> Sample:
        watch = Stopwatch()
        done = subprocess.run(
            argv, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, check=False
        )
        # 3: a check found something, as `cluster verify` may on the host that this is run on.
        assert done.returncode in (0, 3), argv
        return {WALL: watch.lap()}

    return work


def _report(series: Mapping[str, Series], listed: str | None) -> Report:
    base = series[PYTHON][WALL]
    rows = tuple(
        (name, milliseconds(found[WALL]), ratio(found[WALL], base))
        for name, found in series.items()
    )
    of_200 = milliseconds(series[listed][WALL]).median if listed else None
    table = Table("command_line", "Commands", ("command", "ms", "x python -c pass"), rows)
    target = Target("`instance list` of 200", 400, of_200, " ms")
    return Report("command_line", tables=(table,), targets=(target,))
