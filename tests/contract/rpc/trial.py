"""A cluster on loopback: certificates, servers and clients that speak real TLS."""

import asyncio
import socket
import ssl
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from datetime import UTC, datetime, timedelta
from typing import Any
from uuid import UUID

from attrs import define, evolve, field

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
from kvmsec.rpc.client import HttpsTransport, Patience
from kvmsec.rpc.gate import Limits
from kvmsec.rpc.refusals import Refusal
from kvmsec.rpc.server import Handler, Server
from kvmsec.rpc.wire import Caller

NOW = datetime.now(UTC)
NODE_1, NODE_2, NODE_3 = UUID(int=1), UUID(int=2), UUID(int=3)
NAMES = {NODE_1: "node1", NODE_2: "node2", NODE_3: "node3"}
CLUSTER = make_cluster_pair("trial", UUID(int=99), now=NOW)
FOREIGN = make_cluster_pair("trial", UUID(int=99), now=NOW)


def pair_of(
    uuid: UUID,
    *,
    name: str | None = None,
    cluster: Pair = CLUSTER,
    now: datetime = NOW,
    days: int = 30,
) -> Pair:
    """A node's pair, made at the time `now`."""
    name = name or NAMES[uuid]
    request = make_request(name, uuid)
    certificate = sign_request(
        cluster,
        request.request_pem,
        node_name=name,
        node_uuid=uuid,
        now=now,
        lifetime_days=days,
    )
    return Pair(certificate, request.key_pem)


PAIRS = {uuid: pair_of(uuid) for uuid in NAMES}
TRUST = Trust(
    anchors=anchors_of(CLUSTER.certificate_pem),
    members=NAMES,
    candidates={
        uuid: frozenset({fingerprint_of(PAIRS[uuid].certificate_pem)}) for uuid in (NODE_1, NODE_2)
    },
)
"""node1 and node2 are candidates, node3 is none."""


def without(uuid: UUID) -> Trust:
    """The trust after a node was demoted."""
    return evolve(
        TRUST, candidates={one: prints for one, prints in TRUST.candidates.items() if one != uuid}
    )


@define
class Node1:
    """A server under test, and what it was asked and told."""

    trust: Trust | None = TRUST
    pair: Pair = field(factory=lambda: PAIRS[NODE_1])
    limits: Limits = field(factory=Limits)
    refusals: list[Refusal] = field(factory=list)
    asked: list[tuple[Caller, str, bytes]] = field(factory=list)
    handler: Handler | None = None
    anchors_pem: str = CLUSTER.certificate_pem
    port: int = 0
    server: Any = None

    async def answer(self, caller: Caller, call: Call, protocol: int, body: bytes) -> bytes:
        self.asked.append((caller, call.name, body))
        if self.handler is not None:
            return await self.handler(caller, call, protocol, body)
        match call.name:
            case "rules.show":
                return wire.encode_answer(m.Shown(values={"by": caller.name}), protocol)
            case _:
                return wire.encode_answer(m.Nothing(), protocol)

    def connections(self) -> int:
        """How many have done their handshake."""
        return int(self.server._connections.standing)

    def context(self) -> ssl.SSLContext:
        return server_context(self.pair, self.anchors_pem)

    @asynccontextmanager
    async def running(self) -> AsyncIterator["Node1"]:
        listener = socket.create_server(("127.0.0.1", 0), backlog=1024)
        self.port = listener.getsockname()[1]
        try:
            async with Server(
                [listener],
                self.context(),
                self.answer,
                lambda: self.trust,
                tell=self.refusals.append,
                limits=self.limits,
            ) as self.server:
                yield self
        finally:
            listener.close()


def caller_from(
    node: Node1,
    uuid: UUID = NODE_2,
    *,
    pair: Pair | None = None,
    anchors_pem: str = CLUSTER.certificate_pem,
    trust: Trust | None = TRUST,
    meant: UUID = NODE_1,
    patience: Patience | None = None,
) -> HttpsTransport:
    """A client that calls `node`, which it takes for the one with the uuid `meant`."""
    context = client_context(pair or PAIRS[uuid], anchors_pem)
    return HttpsTransport(
        "127.0.0.1",
        node.port,
        NAMES[meant],
        meant,
        lambda: context,
        lambda: trust,
        patience=patience,
    )


async def raw(
    node: Node1, uuid: UUID = NODE_2, *, source: str = "127.0.0.1"
) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    """A TLS connection to say anything on."""
    return await asyncio.open_connection(
        "127.0.0.1",
        node.port,
        ssl=client_context(PAIRS[uuid], CLUSTER.certificate_pem),
        server_hostname="",
        local_addr=(source, 0),
    )


def run(test: Callable[[], Awaitable[None]], timeout_s: float = 60) -> None:
    async def bounded() -> None:
        async with asyncio.timeout(timeout_s):
            await test()

    asyncio.run(bounded())


async def until(condition: Callable[[], bool]) -> None:
    """Wait for what happens on the other side; the test's own deadline is the bound."""
    while not condition():
        await asyncio.sleep(0.005)


LONG_AGO = NOW - timedelta(days=365)
SOON = NOW + timedelta(days=2)
