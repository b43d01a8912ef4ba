"""A call between two nodes: its round trip, and how many fit into one core's second.

Server and client are two processes on loopback that share one core, with real certificates and
mutual TLS 1.3; each request is judged by both.
"""

import asyncio
import os
import socket
import time
from datetime import UTC, datetime
from pathlib import Path
from uuid import UUID

from attrs import frozen

from benchmarks.effort import Effort
from benchmarks.loop import Stopwatch
from benchmarks.report import Report, Table
from benchmarks.series import Summary, milliseconds
from kvmsec.pki.certificates import (
    Pair,
    anchors_of,
    fingerprint_of,
    make_cluster_pair,
    make_request,
    sign_request,
)
from kvmsec.pki.contexts import client_context, server_context
from kvmsec.pki.standing import Trust
from kvmsec.rpc import messages as m
from kvmsec.rpc import wire
from kvmsec.rpc.calls import Call
from kvmsec.rpc.client import HttpsTransport
from kvmsec.rpc.server import Server
from kvmsec.rpc.wire import Caller

SERVER, CLIENT = UUID(int=1), UUID(int=2)
NAMES = {SERVER: "node1", CLIENT: "node2"}
AT_ONCE = 8


@frozen
class Calls:
    """What calls took: seconds of the first and of each later one, and of processors for one."""

    first_s: float
    each_s: tuple[float, ...]
    per_second: float
    client_cpu_s: float
    server_cpu_s: float


def measure(effort: Effort) -> Report:
    os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
    now = datetime.now(UTC)
    cluster = make_cluster_pair("benchmark", UUID(int=9), now=now)
    pairs = {uuid: pair_of(cluster, uuid, now) for uuid in NAMES}
    trust = Trust(
        anchors=anchors_of(cluster.certificate_pem),
        members=NAMES,
        candidates={
            uuid: frozenset({fingerprint_of(pair.certificate_pem)}) for uuid, pair in pairs.items()
        },
    )
    with socket.create_server(("127.0.0.1", 0)) as listener:
        child = os.fork()
        if child == 0:
            asyncio.run(serve(listener, pairs[SERVER], cluster.certificate_pem, trust))
            os._exit(0)
        context = client_context(pairs[CLIENT], cluster.certificate_pem)
        port = listener.getsockname()[1]
        node = HttpsTransport("127.0.0.1", port, "node1", SERVER, lambda: context, lambda: trust)
        try:
            return report(asyncio.run(called(node, child, effort.pick(5000, 1000, 80))))
        finally:
            os.kill(child, 9)
            os.waitpid(child, 0)


def pair_of(cluster: Pair, uuid: UUID, now: datetime) -> Pair:
    request = make_request(NAMES[uuid], uuid)
    signed = sign_request(
        cluster, request.request_pem, node_name=NAMES[uuid], node_uuid=uuid, now=now
    )
    return Pair(signed, request.key_pem)


async def serve(listener: socket.socket, pair: Pair, anchors: str, trust: Trust) -> None:
    async def answer(caller: Caller, call: Call, protocol: int, body: bytes) -> bytes:
        wire.decode_request(call, body)
        return wire.encode_answer(m.Instances(instances=()), protocol)

    async with Server([listener], server_context(pair, anchors), answer, lambda: trust):
        await asyncio.Event().wait()


def cpu_of(pid: int) -> float:
    """Seconds of CPU time that a process has used (proc(5))."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


async def called(node: HttpsTransport, server: int, calls: int) -> Calls:
    async def many(count: int) -> list[float]:
        watch = Stopwatch()
        taken = []
        for _ in range(count):
            await node.call("instance.list", m.Nothing())
            taken.append(watch.lap())
        return taken

    (first_s,) = await many(1)
    each_s = await many(calls)
    before = time.process_time(), cpu_of(server)
    watch = Stopwatch()
    await asyncio.gather(*(many(calls // AT_ONCE) for _ in range(AT_ONCE)))
    took_s, done = watch.lap(), calls // AT_ONCE * AT_ONCE
    client_s, server_s = time.process_time() - before[0], cpu_of(server) - before[1]
    await node.close()
    return Calls(first_s, tuple(each_s), done / took_s, client_s / done, server_s / done)


def report(found: Calls) -> Report:
    rows: tuple[tuple[str, Summary | float], ...] = (
        ("first call, with its handshake, ms", found.first_s * 1e3),
        ("round trip, connection kept, ms", milliseconds(found.each_s)),
        (f"calls a second, {AT_ONCE} at once", found.per_second),
        ("CPU time of a call, client, ms", found.client_cpu_s * 1e3),
        ("CPU time of a call, server, ms", found.server_cpu_s * 1e3),
    )
    return Report("rpc", (Table("rpc", "A call between two nodes", ("", "found"), rows),))
