"""A daemon of a root of its own, apart from `testbed`: what makes its certificates is large.

A start forks the launcher, and so who measures one loads no more than a launcher has.
"""

import asyncio
import contextlib
import subprocess
import time
from collections.abc import AsyncIterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Final
from uuid import uuid4

from attrs import frozen

from benchmarks.testbed import KVMSEC, empty_root
from kvmsec import Node
from kvmsec.linux import command
from kvmsec.model.cluster import Cluster, Member, Role
from kvmsec.pki.certificates import fingerprint_of, make_cluster_pair, make_request, sign_request
from kvmsec.pki.files import KeyFiles
from kvmsec.pki.pems import Pair
from uidpool.ranges import EMPTY, UidRanges

_PORT: Final = 18110
_FRONT: Final = (
    "useradd --system --user-group --no-create-home --shell /usr/sbin/nologin kvmsec-front"
)


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
