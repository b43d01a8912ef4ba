"""A root of kvmsec with a cluster in it, the tiny guest's definition, and a daemon if wanted."""

import asyncio
import contextlib
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Callable, Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Final
from uuid import uuid4

from attrs import frozen

from hypervisor.cgroup_mounts import mounted
from hypervisor.tiny import rom_path
from kvmsec import InstanceDefinition, Node, definition_from
from kvmsec.cluster import operations
from kvmsec.linux import command
from kvmsec.model.cluster import Cluster, Member, Role
from kvmsec.pki.certificates import fingerprint_of, make_cluster_pair, make_request, sign_request
from kvmsec.pki.files import KeyFiles
from kvmsec.pki.pems import Pair
from uidpool import provision
from uidpool.ranges import EMPTY, UidRanges
from uidpool.snapshot import Snapshot

FIRST_UID: Final = 200000
KVMSEC: Final = Path(sys.executable).with_name("kvmsec")
_PORT: Final = 18110
_FRONT: Final = (
    "useradd --system --user-group --no-create-home --shell /usr/sbin/nologin kvmsec-front"
)


def pool_of(size: int) -> UidRanges:
    """A pool of that many uids, each of them a user of the sandbox."""
    pool = UidRanges.parse(f"{FIRST_UID}-{FIRST_UID + size - 1}")
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


# A daemon ------------------------------------------------------------------------------------


@frozen
class Daemon:
    root: Path
    process: subprocess.Popen[bytes]


@contextlib.asynccontextmanager
async def daemon_with(pool: UidRanges) -> AsyncIterator[Daemon]:
    """A daemon of a node that is in a cluster of its own."""
    with empty_root() as root:
        command.run(_FRONT.split(), timeout_s=30)
        await _found_cluster(root, pool)
        log = root / "daemon.log"
        argv = [str(KVMSEC), "--root", str(root), "node", "serve", "--bind", f"127.0.0.1:{_PORT}"]
        with log.open("wb") as said:
            process = subprocess.Popen(argv, stderr=said, stdin=subprocess.DEVNULL)
        try:
            await _wait_for(log, "serving other nodes")
            yield Daemon(root, process)
        finally:
            process.terminate()
            process.wait()


async def _found_cluster(root: Path, pool: UidRanges) -> None:
    """A cluster of this node, with certificates, as `cluster init` makes one."""
    node = Node(root)
    node.host.prepare()
    cluster_uuid, uuid, now = uuid4(), uuid4(), datetime.now(UTC)
    anchor = make_cluster_pair("bench", cluster_uuid, now=now)
    request = make_request("bench", uuid)
    certificate = sign_request(
        anchor, request.request_pem, node_name="bench", node_uuid=uuid, now=now
    )
    member = Member(
        "bench",
        uuid=uuid,
        address="127.0.0.1",
        port=_PORT,
        role=Role.CANDIDATE,
        certificates=(fingerprint_of(certificate),),
    )
    cluster = Cluster(
        name="bench",
        uuid=cluster_uuid,
        uid_pool=pool,
        draining=EMPTY,
        security_model=None,
        nodes=(member,),
        master=uuid,
        created_at=now,
    )
    node.host.store.save(cluster, 0)
    files = KeyFiles(node.host.paths.key_files)
    files.install(anchor.certificate_pem, Pair(certificate, request.key_pem))
    files.write_candidates(cluster.orderers)
    await node.sync_rules()
    await node.close()


async def _wait_for(log: Path, words: str) -> None:
    deadline = time.monotonic() + 60
    while words not in (said := log.read_text()):
        if time.monotonic() > deadline:
            raise RuntimeError(f"the daemon does not serve: {said}")
        await asyncio.sleep(0.01)
