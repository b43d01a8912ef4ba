"""What an instance's control groups are to hold, as the files and values of either version.

A pure mapping: Documentation/admin-guide/cgroup-v2.rst and cgroup-v1/*.rst name the files, and
weights count as they do for systemd (systemd.resource-control(5)): 1 to 10000, 100 where nobody
says otherwise.
"""

from collections.abc import Iterator
from typing import Final

from attrs import frozen

ALWAYS: Final = ("memory", "pids")
"""The controllers that every instance's groups have."""
CONTROLLERS: Final = (*ALWAYS, "cpu", "io", "hugetlb")
"""All that an instance may come to have; the kernel calls `io` `blkio` in version 1."""
PERIOD_US: Final = 100_000
"""Over how long a CPU quota is counted: the kernel's own default (sched-bwc.rst)."""


@frozen
class HugePageLimit:
    """How much of a node's pool of huge pages may be held; `size` is the kernel's word (`2MB`)."""

    size: str
    limit_bytes: int


@frozen
class GroupLimits:
    """The bounds of one instance; None sets none.

    memory_bytes: of all that its processes, their page cache and the kernel for them hold; swap
    is not to be had besides. tasks: threads and processes. cpu_quota_percent: of one CPU's time.
    huge_pages: of each size that the node has a pool of, since those aren't counted as memory.
    """

    memory_bytes: int | None = None
    tasks: int | None = None
    cpu_weight: int | None = None
    cpu_quota_percent: int | None = None
    io_weight: int | None = None
    huge_pages: tuple[HugePageLimit, ...] = ()

    @property
    def controllers(self) -> tuple[str, ...]:
        """The controllers that these take, and those that every instance has."""
        asked = {
            "cpu": self.cpu_weight is not None or self.cpu_quota_percent is not None,
            "io": self.io_weight is not None,
            "hugetlb": bool(self.huge_pages),
        }
        return tuple(name for name in CONTROLLERS if name in ALWAYS or asked[name])


@frozen
class Setting:
    """One file of a group, and what is written to it.

    is_optional: not every kernel has the file (no swap accounting, another I/O scheduler). Of a
    controller's settings at least one must be there.
    """

    controller: str
    file: str
    value: str
    is_optional: bool = False

    def agrees_with(self, read: str) -> bool:
        """Whether the kernel shows what was written; a weight has `default` before it."""
        return read.strip().removeprefix("default ") == self.value


def settings_for(limits: GroupLimits, controllers: frozenset[str], version: int) -> list[Setting]:
    """The files of the `controllers` of one hierarchy, in the order in which they are written."""
    chosen = _version_2(limits) if version == 2 else _version_1(limits)
    return [setting for setting in chosen if setting.controller in controllers]


def _version_2(limits: GroupLimits) -> Iterator[Setting]:
    if limits.memory_bytes is not None:
        yield Setting("memory", "memory.max", str(limits.memory_bytes))
        # A guest's memory on a disk of the node's outlives the guest, and can be read there.
        yield Setting("memory", "memory.swap.max", "0", is_optional=True)
        yield Setting("memory", "memory.oom.group", "1", is_optional=True)
    if limits.tasks is not None:
        yield Setting("pids", "pids.max", str(limits.tasks))
    if limits.cpu_weight is not None:
        yield Setting("cpu", "cpu.weight", str(limits.cpu_weight))
    if limits.cpu_quota_percent is not None:
        yield Setting("cpu", "cpu.max", f"{_quota_us(limits.cpu_quota_percent)} {PERIOD_US}")
    if limits.io_weight is not None:
        yield Setting("io", "io.weight", str(limits.io_weight), is_optional=True)
        yield Setting("io", "io.bfq.weight", str(bfq_weight(limits.io_weight)), is_optional=True)
    for pool in limits.huge_pages:
        held = str(pool.limit_bytes)
        yield Setting("hugetlb", f"hugetlb.{pool.size}.max", held)
        # What is reserved by a mapping and not touched yet is kept from others all the same.
        yield Setting("hugetlb", f"hugetlb.{pool.size}.rsvd.max", held, is_optional=True)


def _version_1(limits: GroupLimits) -> Iterator[Setting]:
    if limits.memory_bytes is not None:
        size = str(limits.memory_bytes)
        yield Setting("memory", "memory.limit_in_bytes", size)
        # After the limit, which it can't be below: memory and swap together are no more than it.
        yield Setting("memory", "memory.memsw.limit_in_bytes", size, is_optional=True)
        yield Setting("memory", "memory.swappiness", "0", is_optional=True)
    if limits.tasks is not None:
        yield Setting("pids", "pids.max", str(limits.tasks))
    if limits.cpu_weight is not None:
        yield Setting("cpu", "cpu.shares", str(shares(limits.cpu_weight)))
    if limits.cpu_quota_percent is not None:
        yield Setting("cpu", "cpu.cfs_period_us", str(PERIOD_US))
        yield Setting("cpu", "cpu.cfs_quota_us", str(_quota_us(limits.cpu_quota_percent)))
    if limits.io_weight is not None:
        weight = str(bfq_weight(limits.io_weight))
        yield Setting("io", "blkio.bfq.weight", weight, is_optional=True)
        # CFQ's, in kernels before 5.0, takes no less than 10.
        yield Setting("io", "blkio.weight", str(max(10, int(weight))), is_optional=True)
    for pool in limits.huge_pages:
        held = str(pool.limit_bytes)
        yield Setting("hugetlb", f"hugetlb.{pool.size}.limit_in_bytes", held)
        yield Setting("hugetlb", f"hugetlb.{pool.size}.rsvd.limit_in_bytes", held, is_optional=True)


def _quota_us(percent: int) -> int:
    return percent * PERIOD_US // 100


def shares(weight: int) -> int:
    """A weight as version 1 counts it: 1024 is everybody's there (systemd does the same)."""
    return weight * 1024 // 100


def bfq_weight(weight: int) -> int:
    """A weight on BFQ's scale, 1 to 1000 with 100 in the middle, bent as systemd bends it."""
    if weight <= 100:
        return weight  # 1 to 100 on both.
    return 100 + (weight - 100) * (1000 - 100) // (10000 - 100)
