"""Which pools of huge pages a node has, read from files like the kernel's."""

from pathlib import Path

import pytest

from hypervisor.errors import SpecError
from hypervisor.huge_pages import pools_mib
from hypervisor.machine import Machine


def pool(directory: Path, size_kib: int, pages: int, on_demand: int = 0) -> None:
    place = directory / f"hugepages-{size_kib}kB"
    place.mkdir()
    (place / "nr_hugepages").write_text(f"{pages}\n")
    (place / "nr_overcommit_hugepages").write_text(f"{on_demand}\n")


def test_a_pool_is_one_that_has_pages_or_makes_them_on_demand(tmp_path: Path) -> None:
    pool(tmp_path, 2048, 3)
    pool(tmp_path, 1048576, 0, on_demand=1)
    pool(tmp_path, 65536, 0)
    pool(tmp_path, 64, 12)  # Less than 1 MiB, which no guest is given.
    assert set(pools_mib(tmp_path)) == {2, 1024}


def test_a_kernel_without_huge_pages_has_none(tmp_path: Path) -> None:
    assert pools_mib(tmp_path / "missing") == ()


@pytest.mark.parametrize(("size", "memory_mib"), [("2M", 3), ("1G", 1025)])
def test_memory_is_whole_pages(size: str, memory_mib: int) -> None:
    with pytest.raises(SpecError, match=f"is no multiple of a huge page .{size}."):
        Machine(name="web", memory_mib=memory_mib, hugepages=size)  # type: ignore[arg-type]


def test_other_sizes_are_none() -> None:
    with pytest.raises(SpecError, match="is not 2M or 1G"):
        Machine(name="web", hugepages="4M")  # type: ignore[arg-type]
