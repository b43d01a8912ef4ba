"""Control groups that a test makes in the host's own hierarchies, and programs that join them."""

import contextlib
import os
import secrets
import subprocess
import sys
from collections.abc import Callable, Iterator

import pytest

from hypervisor.cgroup_limits import GroupLimits
from hypervisor.cgroup_mounts import mounted
from hypervisor.cgroups import InstanceCgroup

Join = Callable[[InstanceCgroup, str], subprocess.Popen[bytes]]
SLEEP = "import time; time.sleep(60)"
FULL = GroupLimits(
    memory_bytes=32 << 20, tasks=30, cpu_weight=50, cpu_quota_percent=150, io_weight=400
)
"""One bound of each kind."""


@pytest.fixture
def parent() -> Iterator[str]:
    """A parent group of the test's own, gone from every hierarchy afterwards."""
    name = f"kvmsec-test-{secrets.token_hex(4)}"
    yield name
    for mount in mounted():
        top = f"{mount.path}/{name}"
        groups = [path for path, _, _ in os.walk(top, topdown=False)]
        InstanceCgroup(tuple(groups)).kill(5)
        for path in groups:
            os.rmdir(path)


@pytest.fixture
def join() -> Iterator[Join]:
    """Start a Python program that joins a group, and return once it says that it is in."""
    with contextlib.ExitStack() as stack:

        def start(group: InstanceCgroup, code: str) -> subprocess.Popen[bytes]:
            files = [f"{path}/cgroup.procs" for path in group.paths]
            joining = f"for path in {files}: open(path, 'w').write('0')\n"
            said = "print('in', flush=True)\n"
            process = subprocess.Popen(
                [sys.executable, "-I", "-S", "-c", joining + said + code], stdout=subprocess.PIPE
            )
            stack.callback(process.wait)
            stack.callback(process.kill)
            assert process.stdout is not None
            stack.callback(process.stdout.close)
            assert process.stdout.readline() == b"in\n"
            return process

        yield start
