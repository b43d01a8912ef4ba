"""Run benchmarks, print what they found, and write it down."""

import argparse
import contextlib
import math
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path

import msgspec
from attrs import evolve

from benchmarks import machine
from benchmarks.effort import Effort
from benchmarks.report import Report, Run, aligned, targets_table
from benchmarks.sandbox import command_inside

NAMES = (
    "start",
    "fleet",
    "draw",
    "rules",
    "confinement",
    "command_line",
    "cluster",
    "rpc",
    "long_run",
)


def main() -> int:
    arguments = parse()
    if arguments.install_peers:
        from benchmarks.peers import install

        install()
        return 0
    if os.geteuid() != 0:
        print("benchmarks: run them as root", file=sys.stderr)
        return 1
    end = time.monotonic() + arguments.within_s
    run = Run(
        version=version("kvmsec"),
        effort=arguments.effort,
        started_at=datetime.now(UTC).isoformat(timespec="seconds"),
        load_before=os.getloadavg()[0],
        machine=machine.look(),
    )
    failed = []
    for name in arguments.names or NAMES:
        if time.monotonic() > end:
            print(f"benchmarks: {name} is left out: no time", file=sys.stderr)
            continue
        report = run_one(name, arguments.effort)
        if report is None:
            failed.append(f"{name} did not end well")
            continue
        show(report)
        failed += [f"{name}: {problem}" for problem in report.problems]
        run = evolve(run, reports=(*run.reports, report))
        if arguments.json:
            arguments.json.parent.mkdir(parents=True, exist_ok=True)
            arguments.json.write_bytes(msgspec.json.format(msgspec.json.encode(run), indent=2))
    if arguments.publish and len(run.reports) == len(arguments.names or NAMES):
        from benchmarks.publish import OtherRun, publish

        try:
            publish(run)
        except OtherRun as error:
            failed.append(str(error))
    for one in failed:
        print(f"benchmarks: {one}", file=sys.stderr)
    return 1 if failed else 0


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="./dev bench", description=__doc__)
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"of {', '.join(NAMES)}")
    parser.add_argument(
        "--quick",
        dest="effort",
        action="store_const",
        const=Effort.QUICK,
        default=Effort.FULL,
        help="fewer sizes and rounds: under three minutes on an idle machine",
    )
    parser.add_argument(
        "--smoke",
        dest="effort",
        action="store_const",
        const=Effort.SMOKE,
        help="each once or twice, to see that all run; the figures say nothing",
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="write what was found there")
    parser.add_argument(
        "--within",
        dest="within_s",
        type=float,
        default=math.inf,
        metavar="SECONDS",
        help="begin none after that",
    )
    parser.add_argument(
        "--publish",
        action="store_true",
        help="when all have ended, redraw their tables and plots in docs/benchmarks.md",
    )
    parser.add_argument(
        "--install-peers",
        action="store_true",
        help="fetch Debian's packages of the peers and unpack them below .venv, and do no more",
    )
    arguments = parser.parse_args()
    if arguments.publish and arguments.effort is Effort.SMOKE:
        parser.error("what --smoke finds is not to be published")
    if unknown := set(arguments.names) - set(NAMES):
        parser.error(f"there is no benchmark {', '.join(sorted(unknown))}: {', '.join(NAMES)}")
    return arguments


def run_one(name: str, effort: Effort) -> Report | None:
    """One benchmark in a process and namespaces of its own; None when that failed."""
    print(f"benchmarks: {name}", file=sys.stderr, flush=True)
    with tempfile.TemporaryFile() as out, interrupted_at_its_end():
        argv = command_inside("-m", "benchmarks.inside", name, effort, str(out.fileno()))
        done = subprocess.run(
            argv, pass_fds=(out.fileno(),), stdin=subprocess.DEVNULL, stdout=sys.stderr, check=False
        )
        out.seek(0)
        if done.returncode != 0:
            return None
        return msgspec.json.decode(out.read(), type=Report)


@contextlib.contextmanager
def interrupted_at_its_end() -> Iterator[None]:
    """An interrupt reaches the benchmark too, which takes back what it made; so wait for it."""
    came = []
    before = signal.signal(signal.SIGINT, lambda *_: came.append(True))
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
        if came:
            raise KeyboardInterrupt


def show(report: Report) -> None:
    print(f"\n== {report.benchmark} ({report.took_s:.0f} s)")
    for table in report.tables:
        print(f"\n{aligned(table)}")
    if report.targets:
        print(f"\n{aligned(targets_table(report.targets))}")
    for one in report.missing:
        print(f"\nmissing: {one}")
    sys.stdout.flush()


if __name__ == "__main__":
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        sys.exit("benchmarks: interrupted")
