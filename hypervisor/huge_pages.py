"""The node's pools of huge pages, as the kernel shows them, and what one instance may have of each.

Whoever may map memory may take pages of a pool (mmap(2), MAP_HUGETLB), which are kept for guests
that were promised them, and no limit of memory counts them.
"""

import os
import re
from collections.abc import Collection
from pathlib import Path
from typing import Final

from hypervisor.cgroup_limits import HugePageLimit
from hypervisor.machine import HUGE_PAGES_MIB, Machine

_POOLS: Final = Path("/sys/kernel/mm/hugepages")
_NAME: Final = re.compile(r"hugepages-(\d+)kB")
_COUNTS: Final = ("nr_hugepages", "nr_overcommit_hugepages")


def pools_mib(directory: Path = _POOLS) -> tuple[int, ...]:
    """The page sizes, in MiB, of which the node has a pool or makes pages on demand.

    Documentation/admin-guide/mm/hugetlbpage.rst. None where the kernel has no huge pages.
    """
    try:
        names = sorted(os.listdir(directory))
    except FileNotFoundError:
        return ()
    found = ((_NAME.fullmatch(name), os.path.join(directory, name)) for name in names)
    sizes = (int(size[1]) >> 10 for size, pool in found if size and _has_pages(pool))
    return tuple(size for size in sizes if size)


def _has_pages(pool: str) -> bool:
    return any(_number_in(f"{pool}/{count}") for count in _COUNTS)


def _number_in(path: str) -> int:
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        return int(os.read(descriptor, 32))
    finally:
        os.close(descriptor)


def limits_for(machine: Machine | None, pools: Collection[int]) -> tuple[HugePageLimit, ...]:
    """A machine's own memory of its pages, and nothing of any other pool; None has no memory."""
    own: dict[int, int] = {}
    if machine is not None and machine.hugepages is not None:
        own[HUGE_PAGES_MIB[machine.hugepages]] = machine.memory_mib << 20
    return tuple(HugePageLimit(_word(size), own.get(size, 0)) for size in sorted({*pools, *own}))


def _word(size_mib: int) -> str:
    return f"{size_mib >> 10}GB" if size_mib >= 1024 else f"{size_mib}MB"
