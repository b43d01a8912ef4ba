"""What this host answers by itself: whether it has a thing, and how its settings decide."""

import ctypes
import errno
import os
import shutil
import struct
from pathlib import Path
from typing import Final

from hypervisor.cgroup_mounts import mounted
from kvmsec.linux.children import run_in_child
from kvmsec.linux.credentials import Credentials, bounding_set

_CAP_SYS_RESOURCE: Final = 24  # linux/include/uapi/linux/capability.h
_NOBODY: Final = 65534
_PERF_EVENT_OPEN: Final = 298  # x86_64
_libc: Final = ctypes.CDLL(None, use_errno=True)


def has_no_modules() -> bool:
    return not Path("/proc/modules").exists()


def has_no_perf() -> bool:
    return _setting("perf_event_paranoid") is None


def has_no_newuidmap() -> bool:
    return shutil.which("newuidmap") is None


def raises_no_limit() -> bool:
    return _CAP_SYS_RESOURCE not in bounding_set()


def of_modules() -> str:
    """To whoever has no capability and wants to load one (init_module(2))."""
    return "ENOSYS" if has_no_modules() else "EPERM"


def of_kernel_log() -> str:
    """To whoever has no capability and wants to read it all (syslog(2))."""
    return "EPERM" if _setting("dmesg_restrict") else "succeeded"


def of_perf() -> str:
    """To whoever has no capability and wants to watch itself, the kernel left out.

    2 is the strictest level of Linux's own. Distributions have levels above it that let nobody
    (Debian from 3 on, Ubuntu from 4): which kernel is one of those, only the kernel can tell.
    """
    level = _setting("perf_event_paranoid")
    if level is None:
        return "ENOSYS"
    return "succeeded" if level <= 2 else _of_perf_to_nobody()


def of_memory() -> str:
    """To a process that goes beyond what its control group has.

    Version 2 ends the whole group (memory.oom.group in the kernel's cgroup-v2.rst), version 1 the
    largest of its processes (cgroup-v1/memory.rst).
    """
    with_memory = [mount.version for mount in mounted() if mount.offers(["memory"])]
    return "ENDED" if with_memory == [2] else "UNHURT"


def _of_perf_to_nobody() -> str:
    # perf_event_attr, version 0: a software event, PERF_COUNT_SW_TASK_CLOCK; then exclude_kernel
    # and exclude_hv among its flags.
    asked = struct.pack("=IIQQQQQ16x", 1, 64, 1, 0, 0, 0, 1 << 5 | 1 << 6)

    def ask() -> int:
        opened = _libc.syscall(_PERF_EVENT_OPEN, asked, os.getpid(), -1, -1, 0)
        return 0 if opened >= 0 else ctypes.get_errno()

    who = Credentials(_NOBODY, _NOBODY)
    error = run_in_child(ask, what="perf to nobody", timeout_s=20, credentials=who)
    return errno.errorcode[error] if error else "succeeded"


def _setting(name: str) -> int | None:
    """A number of /proc/sys/kernel; None where this kernel has no such thing."""
    try:
        return int(Path("/proc/sys/kernel", name).read_text())
    except FileNotFoundError:
        return None
