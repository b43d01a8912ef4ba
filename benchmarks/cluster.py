"""How long `cluster modify` and `cluster verify` take over many nodes, and whether that grows.

All nodes are in this one process and nothing but memory (`simulated.py`), each with a certificate
and a port of its own on loopback. All between the master's decisions and their answers is real:
messages, TLS 1.3 on both sides, every judgement. So a second here has the work of the master and
of all nodes in it, on one core; real nodes do their part at once. The state names every node and
goes to every node, so a change's bytes grow by the square of their number.
"""

import asyncio
import contextlib
import resource
import socket
import tempfile
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any
from uuid import UUID, uuid4

from attrs import frozen

from benchmarks.effort import Effort
from benchmarks.report import Cell, Curve, Plot, Report, Table
from benchmarks.series import summarise
from benchmarks.simulated import SimulatedHome, SimulatedNode
from kvmsec.cluster import operations
from kvmsec.cluster.changes import Change
from kvmsec.cluster.verify.examining import verify
from kvmsec.model.cluster import Cluster, Member, Role
from kvmsec.pki import certificates, contexts
from kvmsec.pki.pems import Pair
from kvmsec.pki.standing import Trust
from kvmsec.rpc.client import HttpsTransport
from kvmsec.rpc.gate import Limits
from kvmsec.rpc.remote import RemoteAgent
from kvmsec.rpc.server import Server
from kvmsec.rpc.service import Service, respond
from kvmsec.store.file import FileStore
from uidpool.ranges import EMPTY, UidRanges

FIRST = UidRanges.parse("200000-204999")
SECOND = UidRanges.parse("200000-205999")


@frozen
class Identity:
    """A node with its key and certificate, and the socket that it listens on."""

    member: Member
    pair: Pair
    listener: socket.socket


@frozen
class Spent:
    """Seconds of the clock, and of the processor: other work on the host moves only the first."""

    clock_s: float
    cpu_s: float


@frozen
class Timed:
    """One size: what each round took, and the first, which makes every connection."""

    nodes: int
    first: Spent
    modify: list[Spent]
    verify: list[Spent]


def measure(effort: Effort) -> Report:
    sizes = effort.pick((1, 10, 50, 100, 500), (1, 10, 50), (1, 3))
    most = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
    now = datetime.now(UTC)
    cluster_uuid = uuid4()
    anchor = certificates.make_cluster_pair("bench", cluster_uuid, now=now)
    with contextlib.ExitStack() as sockets:
        identities = [identity(number, anchor, now) for number in range(max(sizes))]
        for one in identities:
            sockets.callback(one.listener.close)
        timed = [
            asyncio.run(
                measured(
                    identities[:size],
                    anchor.certificate_pem,
                    cluster_uuid,
                    effort.pick(5, 3, 1),
                )
            )
            for size in sizes
        ]
    return report(timed)


def identity(number: int, anchor: Pair, now: datetime) -> Identity:
    name, uuid = f"node{number + 1}", uuid4()
    request = certificates.make_request(name, uuid)
    signed = certificates.sign_request(
        anchor, request.request_pem, node_name=name, node_uuid=uuid, now=now
    )
    listener = socket.create_server(("127.0.0.1", 0), backlog=64)
    member = Member(
        name,
        uuid=uuid,
        address="127.0.0.1",
        port=listener.getsockname()[1],
        role=Role.CANDIDATE if number < 2 else Role.PLAIN,
        certificates=(certificates.fingerprint_of(signed),),
    )
    return Identity(member, Pair(signed, request.key_pem), listener)


async def measured(
    identities: Sequence[Identity], anchor_pem: str, cluster_uuid: UUID, times: int
) -> Timed:
    master = identities[0]
    cluster = Cluster(
        name="bench",
        uuid=cluster_uuid,
        uid_pool=FIRST,
        draining=EMPTY,
        security_model=None,
        nodes=tuple(one.member for one in identities),
        master=master.member.uuid,
        created_at=datetime.now(UTC),
    )
    trust = Trust(
        anchors=certificates.anchors_of(anchor_pem),
        members={one.member.uuid: one.member.name for one in identities},
        candidates={one.uuid: frozenset(one.certificates) for one in cluster.candidates},
    )
    async with contextlib.AsyncExitStack() as running:
        where = running.enter_context(tempfile.TemporaryDirectory(dir="/run"))
        store = FileStore(Path(where, "cluster.json"))
        revision = store.save(cluster, 0)
        homes = [home_of(one, anchor_pem, trust, cluster, revision) for one in identities]
        for one, home in zip(identities[1:], homes[1:], strict=True):
            await running.enter_async_context(served(one, home, anchor_pem, trust))
        directory = Directory(master, homes[0], anchor_pem, trust)
        running.push_async_callback(directory.close)
        return await rounds(store, directory, len(identities), times)


async def rounds(store: FileStore, directory: "Directory", nodes: int, times: int) -> Timed:
    async def modify(pool: UidRanges) -> None:
        done = await operations.modify(store, directory, Change(uid_pool=pool))
        assert not done.silent, next(iter(done.silent.values()))

    async def verified() -> None:
        found = await verify(store, directory, directory.home)
        assert all(one.severity == "ok" for one in found), found[0]

    first = await spent(lambda: modify(SECOND))
    modifies, verifies = [], []
    for _ in range(times):
        for pool in (FIRST, SECOND):
            modifies.append(await spent(lambda pool=pool: modify(pool)))
        verifies.append(await spent(verified))
    return Timed(nodes, first, modifies, verifies)


async def spent(work: Callable[[], Awaitable[object]]) -> Spent:
    clock, cpu = time.perf_counter(), time.process_time()
    await work()
    return Spent(time.perf_counter() - clock, time.process_time() - cpu)


# The nodes, and the way to them ----------------------------------------------------------------


def home_of(
    one: Identity, anchor_pem: str, trust: Trust, cluster: Cluster, revision: int
) -> SimulatedHome:
    return SimulatedHome(
        name=one.member.name,
        uuid=one.member.uuid,
        cluster_uuid=cluster.uuid,
        anchor_pem=anchor_pem,
        certificate_pem=one.pair.certificate_pem,
        candidates=tuple(
            (uuid, fingerprint)
            for uuid, fingerprints in trust.candidates.items()
            for fingerprint in fingerprints
        ),
        is_candidate=one.member.is_candidate,
        revision=revision,
    )


@contextlib.asynccontextmanager
async def served(
    one: Identity, home: SimulatedHome, anchor_pem: str, trust: Trust
) -> AsyncIterator[None]:
    """A simulated node that answers on its port."""
    service = Service(SimulatedNode(one.member.name), home)

    async def answer(caller: Any, call: Any, protocol: int, body: bytes) -> bytes:
        return await respond(service.answer, caller, call.name, protocol, body, on_failure=fail)

    context = contexts.server_context(one.pair, anchor_pem)
    listener = one.listener.dup()
    try:
        async with service, Server([listener], context, answer, lambda: trust, limits=Limits()):
            yield
    finally:
        listener.close()


def fail(call: str, error: BaseException) -> None:
    raise RuntimeError(f"a simulated node failed at {call}") from error


class Directory:
    """The master's way to the simulated nodes."""

    def __init__(
        self, master: Identity, home: SimulatedHome, anchor_pem: str, trust: Trust
    ) -> None:
        self.here = SimulatedNode(master.member.name)
        self.home = home
        self._context = contexts.client_context(master.pair, anchor_pem)
        self._trust = trust
        self._ways: dict[UUID, HttpsTransport] = {}

    def node(self, member: Member) -> RemoteAgent:
        if (way := self._ways.get(member.uuid)) is None:
            way = self._ways[member.uuid] = HttpsTransport(
                member.address,
                member.port,
                member.name,
                member.uuid,
                lambda: self._context,
                lambda: self._trust,
            )
        return RemoteAgent(way, member.name)

    def joining(self, member: Member) -> Any:
        raise NotImplementedError("nobody joins in this benchmark")

    async def close(self) -> None:
        for way in self._ways.values():
            await way.close()


# What is told --------------------------------------------------------------------------------


def report(timed: Sequence[Timed]) -> Report:
    rows: list[tuple[Cell, ...]] = []
    for one in timed:
        rows.append(
            (
                one.nodes,
                one.first.clock_s,
                summarise([spent.clock_s for spent in one.modify]),
                summarise([spent.clock_s for spent in one.verify]),
                summarise([spent.cpu_s for spent in one.verify]),
            )
        )
    head = ("nodes", "first change, s", "modify, s", "verify, s", "verify, CPU s")
    note = "The first change makes all connections. CPU is of the master and of all nodes."
    table = Table("cluster", "A cluster of simulated nodes", head, tuple(rows), note)
    return Report("cluster", tables=(table,), plots=(_plot(timed),))


def _plot(timed: Sequence[Timed]) -> Plot:
    curves = tuple(
        Curve(words, tuple((one.nodes, summarise([s.clock_s for s in of(one)])) for one in timed))
        for words, of in (("modify", _modify), ("verify", _verify))
    )
    return Plot("cluster", "A change, and a verification", "nodes", "s", curves)


def _modify(one: Timed) -> list[Spent]:
    return one.modify


def _verify(one: Timed) -> list[Spent]:
    return one.verify
