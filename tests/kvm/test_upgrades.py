"""QEMU's files change on the node while one launcher starts instance after instance."""

import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from hypervisor.features import find_qemu

pytestmark = pytest.mark.kvm


@pytest.fixture
def qemu() -> Iterator[Path]:
    """A copy of the node's, where nobody else uses it."""
    with tempfile.TemporaryDirectory(prefix="upgraded-", dir="/var/lib") as name:
        folder = Path(name)
        folder.chmod(0o755)
        (folder / "bin").mkdir()
        for one in ("lib", "share"):  # It looks for its modules and data from where it is itself.
            (folder / one).symlink_to(f"/usr/{one}")
        yield Path(shutil.copy(find_qemu(None, None), folder / "bin" / "qemu"))


def test_an_instance_runs_what_was_put_in_qemus_place(lab, qemu):
    async def upgrade_between(node: Any) -> None:
        before = await node.start(lab.definition("before", qemu=str(qemu)))
        old = inode_of(before.pid)
        assert old == qemu.stat().st_ino
        # As a package manager does it: the one that runs keeps its file.
        shutil.copy(qemu, new := qemu.with_name("new"))
        os.rename(new, qemu)
        after = await node.start(lab.definition("after", qemu=str(qemu)))
        assert inode_of(after.pid) == qemu.stat().st_ino != old
        assert inode_of(before.pid) == old
        again = await node.start(lab.definition("again", qemu=str(qemu)))
        assert inode_of(again.pid) == qemu.stat().st_ino
        for name in ("before", "after", "again"):
            await node.stop(name, force=True)

    lab.run(upgrade_between)
    assert not lab.leftovers()


def inode_of(pid: int) -> int:
    return os.stat(f"/proc/{pid}/exe").st_ino


def test_a_node_lets_its_trees_go_when_it_is_closed(lab):
    lab.note_what_is_there()
    held = trees_held()

    async def start_twice(node: Any) -> None:
        for name in ("one", "two"):
            await node.start(lab.definition(name))
            assert len(trees_held()) == len(held) + 1
        for name in ("one", "two"):
            await node.stop(name, force=True)
        assert len(trees_held()) == len(held) + 1

    lab.run(start_twice)
    assert trees_held() == held


def trees_held() -> list[str]:
    places = [f"/proc/self/fd/{number}" for number in os.listdir("/proc/self/fd")]
    links = [os.readlink(place) for place in places if os.path.lexists(place)]
    return sorted(link for link in links if link.startswith("mnt:"))
