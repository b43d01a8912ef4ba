"""What the benchmarks share: namespaces to work in, and how a series of times is printed."""

import os
import shutil
import statistics
import sys
from collections.abc import Sequence
from pathlib import Path

_INSIDE = "KVMSEC_BENCHMARK_SANDBOX"


def enter() -> None:
    """Go on in mount, network, IPC, UTS and PID namespaces of our own; needs root."""
    if os.environ.get(_INSIDE) is None:
        os.environ[_INSIDE] = "1"
        namespaces = ["--mount", "--net", "--ipc", "--uts", "--pid", "--fork", "--mount-proc"]
        python = [sys.executable, *sys.argv]
        os.execvp("unshare", ["unshare", *namespaces, "--kill-child", "--", *python])
    from kvmsec.linux import command

    def run(*argv: str) -> None:
        command.run(argv, timeout_s=30)

    run("mount", "-t", "tmpfs", "-o", "mode=755", "etc", "/mnt")
    shutil.copytree("/etc", "/mnt", symlinks=True, dirs_exist_ok=True)
    run("mount", "--move", "/mnt", "/etc")
    for place in ("/run", "/var/lib", "/var/log", "/tmp", "/var/tmp"):
        if Path(__file__).is_relative_to(place):
            continue  # A checkout below it must not be hidden.
        run("mount", "-t", "tmpfs", "-o", "mode=755", "private", place)
    Path("/run/lock").mkdir()
    run("ip", "link", "set", "lo", "up")


def spread(times_s: Sequence[float]) -> str:
    """The median of times in seconds, with p10 and p90, in milliseconds."""
    ordered = sorted(times_s)
    tenth = len(ordered) // 10
    low, high = ordered[tenth], ordered[-1 - tenth]
    return f"{statistics.median(ordered) * 1e3:7.1f} ms  ({low * 1e3:.1f} to {high * 1e3:.1f})"
