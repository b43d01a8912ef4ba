"""What a lab could leave on its host: how it is seen, and how control groups are taken away."""

import functools
import os
import secrets
import time
from pathlib import Path
from typing import Any

from hypervisor.cgroup_mounts import mounted
from hypervisor.cgroup_tree import remove_tree
from tests.kvm.census import census, running

_EMPTYING_S = 10.0


def remove_group(path: str) -> None:
    """Remove a control group with all below it, once what has just ended has left it."""
    end = time.monotonic() + _EMPTYING_S
    while not remove_tree(path):
        assert time.monotonic() < end, f"{path} still holds something"
        time.sleep(0.01)


@functools.cache
def prefix() -> str:
    """What the names of this run's labs begin with: control groups are shared with other runs."""
    return f"kvmsec-lab-{secrets.token_hex(4)}-"


def groups() -> list[str]:
    """The control groups of this run's labs, in every hierarchy."""
    return sorted(
        entry.path
        for mount in mounted()
        for entry in os.scandir(mount.path)
        if entry.is_dir() and entry.name.startswith(prefix())
    )


def host_state() -> dict[str, Any]:
    """Everything of the host that must be as before when a lab is gone."""
    return {
        **census(),
        "processes": running(),
        "control groups": groups(),
        "users": {
            name: Path("/etc", name).read_bytes() for name in ("passwd", "group", "shadow", "hosts")
        },
        "host name": os.uname().nodename,
        "files": sorted(path.name for path in Path("/tmp").iterdir()),
        "network namespace": os.readlink("/proc/self/ns/net"),
    }
