"""Connections to a real daemon: kept ones that count no longer, recorded ones, ones without end."""

import asyncio
import json
import ssl
import subprocess
import sys
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
from attrs import evolve

from kvmsec.model.cluster import Cluster
from kvmsec.pki.contexts import client_context
from kvmsec.rpc import messages as m
from tests.root.daemon.cluster_of_two import DEADLINE_S, ClusterOfTwo, Daemon, Ours

pytestmark = pytest.mark.root

ROOT = Path(__file__).parents[3]
ORDER = b"POST /rpc/1/node.reconcile HTTP/1.1\r\nHost: a\r\nContent-Length: 2\r\n\r\n{}"
FLOOD = 10_000


def removed(cluster: ClusterOfTwo) -> Cluster:
    return evolve(cluster.demoted(cluster.other), nodes=(cluster.here.member, cluster.plain.member))


def renewed(cluster: ClusterOfTwo) -> Cluster:
    """The other's certificate is a new one since; the one that it called with is still valid."""
    new = evolve(cluster.other.member, certificates=("ab" * 32,))
    return evolve(cluster.cluster(), nodes=(cluster.here.member, new, cluster.plain.member))


CHANGES: dict[str, tuple[Callable[[ClusterOfTwo], Cluster], str]] = {
    "demoted": (lambda cluster: cluster.demoted(cluster.other), "role"),
    "removed": (removed, "name"),
    "renewed": (renewed, "fingerprint"),
}


@pytest.mark.parametrize("is_pushed", [False, True], ids=["files alone", "pushed to the front"])
@pytest.mark.parametrize("change", CHANGES)
def test_a_kept_connection_orders_nothing_more(
    cluster: ClusterOfTwo, daemon: Daemon, change: str, is_pushed: bool
) -> None:
    state, step = CHANGES[change]

    async def test() -> None:
        reader, writer = await connected(cluster, cluster.other)
        writer.write(ORDER)
        assert (await answer(reader))[0] == 200
        changed = state(cluster)
        cluster.store.put_copy(cluster.state(changed, 2).document or {}, 2, 2, at=datetime.now(UTC))
        cluster.files.write_candidates(changed.orderers)
        if is_pushed:
            await asyncio.sleep(3)  # Longer than from one look at the files to the next.
        writer.write(ORDER)
        status, told = await answer(reader)
        assert (status, told["fault"]["kind"]) == (403 if is_pushed else 200, "Refused")
        assert told["fault"]["evidence"] == {"step": step}
        writer.transport.abort()

    asyncio.run(asyncio.wait_for(test(), DEADLINE_S))
    assert outcomes(cluster)[:2] == ["begun", "done"]
    assert "done" not in outcomes(cluster)[2:]


def test_recorded_bytes_say_nothing_to_it_again(cluster: ClusterOfTwo, daemon: Daemon) -> None:
    """All that a candidate sent, handshake and order, replayed as it was on the wire."""

    async def test() -> None:
        recorded = bytearray()

        async def relay(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            to_reader, to = await asyncio.open_connection("127.0.0.1", cluster.port)
            await asyncio.gather(_pump(reader, to, recorded), _pump(to_reader, writer, None))

        async with await asyncio.start_server(relay, "127.0.0.1", 0) as server:
            port = server.sockets[0].getsockname()[1]
            reader, writer = await connected(cluster, cluster.other, port=port)
            writer.write(ORDER)
            assert (await answer(reader))[0] == 200
            writer.transport.abort()
        assert len(recorded) > 1000
        for _ in range(3):
            reader, writer = await asyncio.open_connection("127.0.0.1", cluster.port)
            writer.write(bytes(recorded))
            try:
                heard = await reader.read()
            except ConnectionError:
                heard = b""
            assert b"HTTP" not in heard
            writer.close()

    asyncio.run(asyncio.wait_for(test(), DEADLINE_S))
    assert outcomes(cluster)[:2] == ["begun", "done"]
    assert set(outcomes(cluster)[2:]) <= {"refused"}
    assert cluster.ask("node.info", m.Nothing()).name == "here"


def test_no_session_goes_on_in_another_connection(cluster: ClusterOfTwo, daemon: Daemon) -> None:
    """A ticket would have the peer's certificate in it, as it was judged back then."""

    async def test() -> None:
        _, writer = await connected(cluster, cluster.other)
        shown: ssl.SSLObject = writer.get_extra_info("ssl_object")
        assert shown.version() == "TLSv1.3"
        assert shown.session is None or not shown.session.has_ticket
        writer.transport.abort()

    asyncio.run(asyncio.wait_for(test(), DEADLINE_S))


@pytest.mark.parametrize("said", ["nothing", "a hello"])
def test_ten_thousand_handshakes_without_an_end_keep_nobody_out(
    cluster: ClusterOfTwo, daemon: Daemon, said: str
) -> None:
    front = daemon.front
    cluster.ask("node.info", m.Nothing())
    before_mib = {pid: resident_mib(pid, "VmRSS") for pid in (front, daemon.process.pid)}
    argv = [sys.executable, "-m", "tests.root.daemon.handshakes", str(cluster.port), str(FLOOD)]
    with subprocess.Popen([*argv, said], cwd=ROOT) as flooding:
        answers = 0
        while flooding.poll() is None:
            assert cluster.ask("node.info", m.Nothing()).name == "here"
            answers += 1
            assert descriptors(front) < 512 + 128 + 50
    assert flooding.returncode == 0
    assert answers >= 3
    assert daemon.front == front
    # 128 unfinished handshakes of some 300 KiB each, and what else a process needs.
    assert resident_mib(front, "VmHWM") < before_mib[front] + 64
    assert resident_mib(daemon.process.pid, "VmHWM") < before_mib[daemon.process.pid] + 16


async def connected(
    cluster: ClusterOfTwo, ours: Ours, *, port: int = 0
) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    context = client_context(ours.pair, cluster.anchor.certificate_pem)
    return await asyncio.open_connection(
        "127.0.0.1", port or cluster.port, ssl=context, server_hostname=""
    )


async def answer(reader: asyncio.StreamReader) -> tuple[int, Any]:
    head = (await reader.readuntil(b"\r\n\r\n")).decode()
    (length,) = [
        int(line.split(":")[1])
        for line in head.lower().splitlines()
        if line.startswith("content-length:")
    ]
    return int(head.split()[1]), json.loads(await reader.readexactly(length))


async def _pump(
    source: asyncio.StreamReader, sink: asyncio.StreamWriter, copy: bytearray | None
) -> None:
    try:
        while data := await source.read(1 << 16):
            if copy is not None:
                copy += data
            sink.write(data)
    except ConnectionError:
        pass
    finally:
        sink.close()


def outcomes(cluster: ClusterOfTwo) -> list[str]:
    lines = cluster.paths.orders.read_text().splitlines()
    return [json.loads(line)["outcome"] for line in lines]


def resident_mib(pid: int, which: str) -> float:
    status = Path(f"/proc/{pid}/status").read_text()
    (kib,) = [int(line.split()[1]) for line in status.splitlines() if line.startswith(which)]
    return kib / 1024


def descriptors(pid: int) -> int:
    return len(list(Path(f"/proc/{pid}/fd").iterdir()))
