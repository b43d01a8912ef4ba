"""What of a host must be as before when a test has ended."""

import contextlib
import os
import select
import socket
import time
from pathlib import Path
from typing import Any

from kvmsec.linux import command, processes


def _tool(*argv: str) -> list[str]:
    return command.run(argv, timeout_s=30).stdout.decode().splitlines()


def packet_rules() -> list[str]:
    """Every packet rule and chain of anybody's here, without counters."""
    legacy = [*_tool("iptables-legacy-save"), *_tool("ip6tables-legacy-save")]
    return [
        *(line for line in legacy if line.startswith("-A") or " - [" in line),
        *_tool("nft", "-s", "-t", "list", "ruleset"),
    ]


def running() -> dict[int, str]:
    """Every process that has not ended, and the zombies that are ours to collect."""
    found = {}
    for pid in processes.pids():
        status = processes.read_status(pid)
        if status is None or (status.is_zombie and _parent(pid) != os.getpid()):
            continue
        found[pid] = f"{status.name} {status.state} {status.uids}"
    return found


def _parent(pid: int) -> int:
    with contextlib.suppress(OSError, IndexError):
        return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])
    return 0


def ends_by(pid: int, end: float) -> bool:
    """Whether a process that is nobody's to collect here is gone by then (monotonic)."""
    if _parent(pid) == os.getpid():
        return False
    try:
        pidfd = os.pidfd_open(pid)
    except ProcessLookupError:
        return True
    with os.fdopen(pidfd):
        return bool(select.select([pidfd], [], [], max(0.0, end - time.monotonic()))[0])


def files_below(place: Path) -> list[str]:
    """Everything but directories that are kept."""
    return sorted(str(path) for path in place.rglob("*") if not path.is_dir())


def census() -> dict[str, Any]:
    """What of this host an instance could leave something in, users and resting uids aside."""
    return {
        "mounts": sorted(Path("/proc/self/mounts").read_text().splitlines()),
        "interfaces": sorted(name for _, name in socket.if_nameindex()),
        "packet rules": packet_rules(),
        "leases": files_below(Path("/run/kvmsec")),
        "quarantine": files_below(Path("/var/lib/kvmsec/uids/quarantine")),
        "shared memory": files_below(Path("/dev/shm")),
        "descriptors": descriptors(),
    }


def descriptors() -> list[str]:
    found = []
    for number in os.listdir("/proc/self/fd"):
        with contextlib.suppress(FileNotFoundError):
            target = os.readlink(f"/proc/self/fd/{number}")
            if not target.startswith("/proc/"):
                found.append(f"{number} {target}")
    return sorted(found)
