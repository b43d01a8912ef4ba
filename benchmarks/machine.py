"""What the benchmarks run on, as a reader wants to know it."""

import os
import platform
import subprocess
import sys
from pathlib import Path

from benchmarks.report import Machine


def look() -> Machine:
    from hypervisor.features import find_qemu

    said = subprocess.run(
        [find_qemu(None, None), "--version"], capture_output=True, text=True, check=True
    ).stdout
    return Machine(
        kernel=platform.release(),
        distribution=_value(Path("/etc/os-release"), "PRETTY_NAME", "=").strip('"'),
        processor=_value(Path("/proc/cpuinfo"), "model name", ":"),
        processors=len(os.sched_getaffinity(0)),
        memory_mib=int(_value(Path("/proc/meminfo"), "MemTotal", ":").split()[0]) // 1024,
        qemu=said.splitlines()[0].removeprefix("QEMU emulator version "),
        python=sys.version.split()[0],
        accelerator="kvm" if os.path.exists("/dev/kvm") else "tcg",
    )


def _value(path: Path, key: str, separator: str) -> str:
    for line in path.read_text().splitlines():
        name, _, value = line.partition(separator)
        if name.strip() == key:
            return value.strip()
    return "unknown"
