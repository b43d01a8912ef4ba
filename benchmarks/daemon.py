"""A start by way of a node's daemon beside the library call, and what an idle daemon weighs.

Medians with p10 and p90: absolute times drift on a shared machine, so both kinds of start are
made in turn, in one run. Memory is read from /proc/PID/smaps_rollup (proc_pid_smaps(5)), of the
root part and of its front, when both have been idle for a second: PSS, in which a page that two
processes share counts half for each, and RSS, in which it counts for both. Root; runs in
namespaces of its own and leaves nothing.

usage: python benchmarks/daemon.py [ROUNDS]
"""

import asyncio
import statistics
import subprocess
import sys
import tempfile
import time
from datetime import UTC, datetime
from pathlib import Path
from typing import Any
from uuid import uuid4

from _sandbox import enter, spread

from hypervisor.tiny import rom_path
from kvmsec import Node, definition_from
from kvmsec.daemon.reaching import reach
from kvmsec.linux import command
from kvmsec.model.cluster import Cluster, Member, Role
from kvmsec.pki.certificates import (
    fingerprint_of,
    make_cluster_pair,
    make_request,
    sign_request,
)
from kvmsec.pki.files import KeyFiles
from kvmsec.pki.pems import Pair
from uidpool import provision
from uidpool.ranges import EMPTY, UidRanges
from uidpool.snapshot import Snapshot

POOL = UidRanges.parse("200000-200099")
KVMSEC = Path(sys.executable).with_name("kvmsec")
PORT = 18110
FRONT = "useradd --system --user-group --no-create-home --shell /usr/sbin/nologin kvmsec-front"


def main() -> None:
    enter()
    rounds = int(sys.argv[1]) if len(sys.argv) > 1 else 31
    with tempfile.TemporaryDirectory(dir="/run") as root:
        provision.apply(provision.plan(POOL, Snapshot.read()))
        command.run(FRONT.split(), timeout_s=30)
        found_a_cluster(Path(root))
        log = Path(root) / "daemon.log"
        argv = [str(KVMSEC), "--root", root, "node", "serve", "--bind", f"127.0.0.1:{PORT}"]
        with log.open("wb") as said:
            daemon = subprocess.Popen(argv, stderr=said)
        try:
            wait_for(log, "serving other nodes")
            time.sleep(1)
            report_memory(daemon.pid, "idle, before the first order")
            asyncio.run(measure(Path(root), rounds))
            time.sleep(1)
            report_memory(daemon.pid, f"idle, after {rounds} starts and stops")
            command_line(Path(root), rounds)
        finally:
            daemon.terminate()
            daemon.wait()


def found_a_cluster(root: Path) -> None:
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
        port=PORT,
        role=Role.CANDIDATE,
        certificates=(fingerprint_of(certificate),),
    )
    cluster = Cluster(
        name="bench",
        uuid=cluster_uuid,
        uid_pool=POOL,
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
    asyncio.run(node.sync_rules())


def wait_for(log: Path, words: str) -> None:
    deadline = time.monotonic() + 30
    while words not in log.read_text():
        if time.monotonic() > deadline:
            raise SystemExit(log.read_text())
        time.sleep(0.01)


async def measure(root: Path, rounds: int) -> None:
    library = Node(root)
    daemon = await reach(library.host.paths.node_socket)
    assert daemon is not None
    document = {"memory_mib": 1, "firmware": str(rom_path()), "accelerator": "auto"}
    definition = definition_from(document, "bench", source="the benchmark")
    starts: dict[str, list[float]] = {"library": [], "daemon": []}
    looks: list[float] = []
    nodes: dict[str, Any] = {"library": library, "daemon": daemon}
    for _ in range(rounds + 1):
        for name, node in nodes.items():
            begin = time.perf_counter()
            await node.start(definition)
            starts[name].append(time.perf_counter() - begin)
            begin = time.perf_counter()
            await daemon.info("bench")
            looks.append(time.perf_counter() - begin)
            await node.stop("bench", force=True)
    await daemon.close()
    await library.close()
    for times in starts.values():
        del times[0]  # the first start asks QEMU for its features
    over = statistics.median(
        by_daemon - by_library
        for by_daemon, by_library in zip(starts["daemon"], starts["library"], strict=True)
    )
    print("start, from the call to its return")
    print(f"  library                      {spread(starts['library'])}")
    print(f"  daemon                       {spread(starts['daemon'])}")
    print(f"  daemon over library, the median of the pairs' differences {over * 1e3:+.1f} ms")
    print(f"  `info`, for comparison       {spread(looks)}")


def command_line(root: Path, rounds: int) -> None:
    print("command line with a daemon, wall clock of the whole process")
    for words in (["--help"], ["instance", "list"]):
        times = []
        for _ in range(rounds):
            begin = time.perf_counter()
            argv = [str(KVMSEC), "--root", str(root), *words]
            subprocess.run(argv, check=True, stdout=subprocess.DEVNULL)
            times.append(time.perf_counter() - begin)
        print(f"  kvmsec {' '.join(words):22}{spread(times)}")


def report_memory(pid: int, when: str) -> None:
    children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    parts = {"root part": pid, "front": int(children[0])}
    print(f"memory of a daemon, {when}")
    totals = [0, 0]
    for name, number in parts.items():
        found = rollup(number)
        totals = [totals[0] + found["Pss"], totals[1] + found["Rss"]]
        print(f"  {name:10} PSS {found['Pss'] / 1024:6.1f} MiB, RSS {found['Rss'] / 1024:6.1f} MiB")
    print(f"  together   PSS {totals[0] / 1024:6.1f} MiB, RSS {totals[1] / 1024:6.1f} MiB")


def rollup(pid: int) -> dict[str, int]:
    """Sizes in KiB."""
    lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()[1:]
    return {line.split(":")[0]: int(line.split()[1]) for line in lines}


if __name__ == "__main__":
    main()
