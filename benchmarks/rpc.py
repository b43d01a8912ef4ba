"""What a call between two nodes costs: its round trip, and how many fit into one core's second.

Server and client are two processes on loopback with real certificates and mutual TLS 1.3, each
request judged by both. With --one-core both share one core, so its figures are of both together.
Needs no root.

usage: python benchmarks/rpc.py [--calls N] [--one-core]
"""

import argparse
import asyncio
import os
import socket
import statistics
import time
from datetime import UTC, datetime
from pathlib import Path
from uuid import UUID

from _sandbox import spread

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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--calls", type=int, default=3000)
    parser.add_argument("--one-core", action="store_true")
    arguments = parser.parse_args()
    if arguments.one_core:
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
    listener = socket.create_server(("127.0.0.1", 0))
    port = listener.getsockname()[1]
    child = os.fork()
    if child == 0:
        asyncio.run(serve(listener, pairs[SERVER], cluster.certificate_pem, trust))
        os._exit(0)
    try:
        asyncio.run(measure(port, pairs[CLIENT], cluster.certificate_pem, trust, arguments, child))
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


async def measure(
    port: int,
    pair: Pair,
    anchors: str,
    trust: Trust,
    arguments: argparse.Namespace,
    server: int,
) -> None:
    context = client_context(pair, anchors)
    node = HttpsTransport("127.0.0.1", port, "node1", SERVER, lambda: context, lambda: trust)

    async def call() -> None:
        await node.call("instance.list", m.Nothing())

    started = time.perf_counter()
    await call()
    print(f"first call, with its handshake    {(time.perf_counter() - started) * 1e3:7.1f} ms")
    times_s = []
    for _ in range(arguments.calls):
        started = time.perf_counter()
        await call()
        times_s.append(time.perf_counter() - started)
    print(f"round trip, connection kept     {spread(times_s)}")
    print(f"                       median    {statistics.median(times_s) * 1e3:7.2f} ms")

    async def many(count: int) -> None:
        for _ in range(count):
            await call()

    before = time.process_time(), cpu_of(server)
    started = time.perf_counter()
    await asyncio.gather(*(many(arguments.calls // 8) for _ in range(8)))
    took_s = time.perf_counter() - started
    done = arguments.calls // 8 * 8
    ours_s, theirs_s = time.process_time() - before[0], cpu_of(server) - before[1]
    cores = "client and server on one core" if arguments.one_core else "client and server apart"
    print(f"calls a second, 8 at once         {done / took_s:7.0f}     ({cores})")
    print(f"CPU time per call, client         {ours_s / done * 1e3:7.2f} ms")
    print(f"CPU time per call, server         {theirs_s / done * 1e3:7.2f} ms")
    print(
        f"calls in a second of one core     {done / (ours_s + theirs_s):7.0f}     (both together)"
    )
    await node.close()


if __name__ == "__main__":
    main()
