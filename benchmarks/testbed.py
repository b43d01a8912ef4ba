"""A root of kvmsec with a cluster in it, and the tiny guest's definition."""

import contextlib
import os
import shutil
import sys
import tempfile
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path
from typing import Final

from hypervisor.cgroup_mounts import mounted
from hypervisor.tiny import rom_path
from kvmsec import InstanceDefinition, Node, definition_from
from kvmsec.cluster import operations
from uidpool import provision
from uidpool.ranges import UidRanges
from uidpool.snapshot import Snapshot

FIRST_UID: Final = 200000
KVMSEC: Final = Path(sys.executable).with_name("kvmsec")


def pool_of(size: int, first: int = FIRST_UID) -> UidRanges:
    """A pool of that many uids, each of them a user of the sandbox."""
    pool = UidRanges.parse(f"{first}-{first + size - 1}")
    provision.apply(provision.plan(pool, Snapshot.read()))
    return pool


def document(disk: Path | None = None) -> dict[str, object]:
    """The tiny guest of 1 MiB, by itself or with one raw disk."""
    found: dict[str, object] = {
        "memory_mib": 1,
        "firmware": str(rom_path()),
        "accelerator": "auto",
    }
    return found if disk is None else {**found, "disks": [{"path": str(disk)}]}


def definition(name: str, disk: Path | None = None) -> InstanceDefinition:
    return definition_from(document(disk), name, source="the benchmark")


def make_disk(path: Path) -> Path:
    path.touch(mode=0o600)
    os.truncate(path, 1 << 20)
    return path


@contextlib.contextmanager
def empty_root() -> Iterator[Path]:
    """A root with nothing in it; its control groups, which are the host's, go with it."""
    before = _groups_of_everybody()
    root = Path(tempfile.mkdtemp(prefix="kvmsec-bench-", dir="/run"))
    try:
        yield root
    finally:
        tag = Node(root).host.paths.tag
        for top in _tops():
            for directory, _, _ in os.walk(top / tag, topdown=False):
                _remove_group(directory)
        for top in _groups_of_everybody() - before:
            _remove_group(str(top))
        shutil.rmtree(root)


def _tops() -> list[Path]:
    return [Path(mount.path, "kvmsec") for mount in mounted()]


def _groups_of_everybody() -> set[Path]:
    return {top for top in _tops() if top.exists()}


def _remove_group(path: str) -> None:
    with contextlib.suppress(OSError):  # Not empty: somebody else's by now.
        os.rmdir(path)


@contextlib.asynccontextmanager
async def node_with(
    pool: UidRanges,
    *,
    on_step: Callable[[str], None] = lambda step: None,
) -> AsyncIterator[Node]:
    """A node in this process, in a cluster of its own."""
    with empty_root() as root:
        node = Node(root, on_step=on_step)
        node.host.paths.make_directories()
        await operations.init(node.host.store, node, "bench", uid_pool=pool)
        try:
            yield node
        finally:
            for one in await node.list():  # Some, where a benchmark was interrupted.
                await node.stop(one.name, force=True)
            await operations.destroy(node.host.store, node)
            await node.close()
