"""A guest whose memory is of huge pages, from a pool that the test makes and takes away."""

import contextlib
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from hypervisor.cgroup_mounts import mounted
from kvmsec.errors import StartFailed

pytestmark = pytest.mark.kvm

POOL = Path("/proc/sys/vm/nr_hugepages")
MIB = 1 << 20


@pytest.fixture(autouse=True)
def the_controller_as_before() -> Iterator[None]:
    """What a start had the root hand down would outlive it."""
    controls = [Path(one.path, "cgroup.subtree_control") for one in mounted() if one.version == 2]
    unasked = [control for control in controls if "hugetlb" not in control.read_text()]
    yield
    for control in unasked:
        with contextlib.suppress(OSError):  # Other instances of this host have it by now.
            control.write_text("-hugetlb")


@pytest.fixture
def pages() -> Iterator[int]:
    """Huge pages of 2 MiB, more than the node had before."""
    before = POOL.read_text()
    POOL.write_text(str(int(before) + 4))
    try:
        yield 4
    finally:
        POOL.write_text(before)


def _kib(proc: Path, name: str) -> int:
    found = re.search(rf"^{name}:\s+(\d+) kB$", (proc / "smaps_rollup").read_text(), re.MULTILINE)
    assert found
    return int(found[1])


def _hugetlb(lab: Any) -> dict[str, str]:
    files = (file for group in lab.groups() for file in Path(group).glob("hugetlb.2MB.*"))
    wanted = (".max", ".limit_in_bytes")
    return {file.name: file.read_text().strip() for file in files if file.name.endswith(wanted)}


def test_a_guest_runs_in_huge_pages_and_gives_them_back(lab: Any, pages: int) -> None:
    assert pages >= 2
    free = _free()
    started = lab.start(hugepages="2M", memory_mib=4)
    with lab.line() as line:
        assert line.ask(b"ehello\n") == "ECHO hello"
    proc = Path(f"/proc/{started.pid}")
    assert _kib(proc, "Shared_Hugetlb") + _kib(proc, "Private_Hugetlb") > 0
    assert set(_hugetlb(lab).values()) == {str(4 * MIB)}
    lab.stop()
    assert _free() == free


def test_a_guest_without_them_may_take_none_of_the_pool(lab: Any, pages: int) -> None:
    lab.start()
    assert set(_hugetlb(lab).values()) == {"0"}
    lab.stop()


def test_without_a_pool_it_is_an_error_in_qemus_own_words(lab: Any) -> None:
    if _free():
        pytest.skip("this kernel has huge pages to give that are not the test's")
    with pytest.raises(StartFailed, match="Cannot allocate memory") as failed:
        lab.start(hugepages="2M", memory_mib=4)
    assert failed.value.hint and "vm.nr_hugepages" in failed.value.hint
    assert "kvmsec instance log" in failed.value.hint


def _free() -> int:
    pool = Path("/sys/kernel/mm/hugepages/hugepages-2048kB/free_hugepages")
    return int(pool.read_text())
