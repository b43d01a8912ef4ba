"""A renewal over real TLS: servers that serve from their key files, called with either pair."""

import asyncio
import socket
import ssl
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from datetime import UTC, datetime, timedelta
from pathlib import Path
from uuid import UUID

import pytest
from attrs import define, evolve, field, frozen

from kvmsec.cluster import certless
from kvmsec.cluster.renewal import operations
from kvmsec.cluster.renewal.calling import Calling, Line
from kvmsec.cluster.renewal.operations import Outcome, Wish
from kvmsec.cluster.renewal.reached import OwnNode, RemoteNode
from kvmsec.cluster.renewal.sequence import Renewing
from kvmsec.model.cluster import cluster_from
from kvmsec.pki.certificates import anchors_of, fingerprint_of
from kvmsec.pki.contexts import client_context, server_context
from kvmsec.pki.keys import KeyKind
from kvmsec.pki.pems import Pair
from kvmsec.pki.standing import Trust
from kvmsec.rpc import messages as m
from kvmsec.rpc.calls import Call
from kvmsec.rpc.client import HttpsTransport
from kvmsec.rpc.server import Server
from kvmsec.rpc.service import respond
from kvmsec.rpc.wire import Caller
from tests.unit.kvmsec.cluster.renewal_world import Box, World, assert_settled, make_world


def now() -> datetime:
    return datetime.now(UTC)


@define
class Served:
    """A box behind a server of its own, which takes up what the files hold after each call."""

    box: Box
    listener: socket.socket
    server: Server | None = None
    known: Trust | None = None

    def context(self) -> ssl.SSLContext:
        keys, common = self.box.keys, self.box.keys.certless(now())
        pair = certless.pair_to_serve(keys.own() if keys.is_member() else None, common, None)
        assert pair is not None
        also = "" if common is None else common.certificate_pem
        return server_context(pair, keys.anchors() + also)

    def take_up(self) -> None:
        keys, common = self.box.keys, self.box.keys.certless(now())
        self.known = Trust(
            anchors=anchors_of(keys.anchors()),
            members={one.uuid: one.name for one in self.box.copy.nodes},
            candidates=keys.candidates(),
            certless=None if common is None else fingerprint_of(common.certificate_pem),
        )
        if self.server is not None and (common is not None or keys.is_member()):
            self.server.use(self.context())

    async def handle(self, caller: Caller, call: Call, protocol: int, body: bytes) -> bytes:
        answer = await respond(self.answer, caller, call.name, protocol, body)
        self.take_up()
        return answer

    async def answer(self, call: Call, request: m.Message, _: Caller | None) -> m.Message:
        keys = self.box.keys
        match request:
            case m.PrepareRequest():
                made = keys.prepare(
                    request.anchors,
                    node_name=self.box.name,
                    node_uuid=self.box.member.uuid,
                    kind=KeyKind(request.key_kind),
                )
                return m.Prepared(signing_request=made)
            case m.CommitRequest():
                keys.commit(request.certificate)
            case m.FinishRequest():
                keys.finish(request.anchors)
            case m.FileRequest():
                keys.put(request.name, request.content)
            case m.State():
                self.box.take(cluster_from(request.document), request.revision)
                return m.Revision(revision=request.revision)
            case _ if call.name == "certificates.rollback":
                keys.rollback()
            case _:
                assert call.name == "node.info"
                return m.NodeInfo(
                    name=self.box.name,
                    uuid=self.box.member.uuid,
                    cluster_uuid=self.box.copy.uuid,
                    version="1",
                    protocols=(1, 1),
                    time=now(),
                    revision=self.box.revision,
                    confirmed_at=None,
                )
        return m.Nothing()

    @asynccontextmanager
    async def running(self) -> AsyncIterator[None]:
        self.take_up()
        async with Server(
            [self.listener], self.context(), self.handle, lambda: self.known
        ) as server:
            self.server = server
            yield
        self.server = None


@frozen
class InProcess:
    """A line without a courier: what the courier does, in this very process."""

    context: ssl.SSLContext
    trust: Trust
    opened: list[HttpsTransport]

    def transport(self, *, name: str, uuid: UUID, address: str, port: int) -> HttpsTransport:
        made = HttpsTransport(address, port, name, uuid, lambda: self.context, lambda: self.trust)
        self.opened.append(made)
        return made

    async def peer_fingerprint(self, *, name: str, uuid: UUID, address: str, port: int) -> str:
        _, writer = await asyncio.open_connection(
            address, port, ssl=self.context, server_hostname=""
        )
        der = writer.get_extra_info("ssl_object").getpeercert(binary_form=True)
        writer.transport.abort()
        return fingerprint_of(der)


@define
class Trial:
    world: World
    served: dict[str, Served]
    opened: list[HttpsTransport] = field(factory=list)

    async def open_line(self, pair: Pair, anchors: str, trust: Trust) -> Line:
        return InProcess(client_context(pair, anchors), trust, self.opened)

    async def close(self) -> None:
        while self.opened:
            await self.opened.pop().close()

    def nodes(self) -> list[OwnNode | RemoteNode]:
        world = self.world
        calling = Calling(
            keys=world.head.keys, store=world.store, now=now, open_line=self.open_line
        )
        return [
            OwnNode(box.member, box.keys) if box is world.head else RemoteNode(box.member, calling)
            for box in world.boxes.values()
        ]

    def work(self) -> Renewing:
        return Renewing(
            own_uuid=self.world.head.member.uuid,
            store=self.world.store,
            nodes=self.nodes(),
            keys=self.world.head.keys,
            journal=self.world.journal,
            now=now,
        )

    def finish_master(self) -> None:
        self.world.head.take(*self.world.store.load())  # type: ignore[arg-type]


@pytest.fixture
def trial(tmp_path: Path) -> Trial:
    world = make_world(tmp_path, candidates=2, plain=1, now=now())
    listeners = {name: socket.create_server(("127.0.0.1", 0)) for name in ("n1", "n2")}
    for name, listener in listeners.items():
        box = world[name]
        box.member = evolve(box.member, address="127.0.0.1", port=listener.getsockname()[1])
    members = tuple(box.member for box in world.boxes.values())
    world.store.cluster = evolve(world.state, nodes=members)
    for box in world.boxes.values():
        box.take(world.state, world.store.revision)
    return Trial(world, {name: Served(world[name], listeners[name]) for name in listeners})


async def refuse(listener: socket.socket) -> None:
    """Whoever connects is cut off, as by a node whose daemon does not run."""
    listener.setblocking(False)
    while True:
        accepted, _ = await asyncio.get_running_loop().sock_accept(listener)
        accepted.close()


def while_served(
    trial: Trial, names: tuple[str, ...], act: Callable[[], Awaitable[object]]
) -> object:
    async def closing() -> object:
        try:
            return await act()
        finally:
            await trial.close()

    async def serve() -> object:
        async with asyncio.timeout(60):
            silent = [
                asyncio.create_task(refuse(one.listener))
                for name, one in trial.served.items()
                if name not in names
            ]
            try:
                return await _within([trial.served[name] for name in names], closing)
            finally:
                for task in silent:
                    task.cancel()

    return asyncio.run(serve())


async def _within(served: list[Served], act: Callable[[], Awaitable[object]]) -> object:
    if not served:
        return await act()
    async with served[0].running():
        return await _within(served[1:], act)


@pytest.mark.parametrize("kind", list(KeyKind))
def test_all_nodes_are_renewed_over_tls(trial: Trial, kind: KeyKind) -> None:
    wish = Wish(new_cluster_certificate=True, key_kind=kind)
    outcome = while_served(trial, ("n1", "n2"), lambda: operations.renew(trial.work(), wish))

    assert isinstance(outcome, Outcome) and outcome.is_at_its_end
    trial.finish_master()
    assert_settled(trial.world, by=now())


@pytest.mark.parametrize("name", ["n1", "n2"])
def test_a_node_catches_up_over_tls_by_the_old_pair(trial: Trial, name: str) -> None:
    other = "n2" if name == "n1" else "n1"
    wish = Wish(new_cluster_certificate=True)
    outcome = while_served(trial, (other,), lambda: operations.renew(trial.work(), wish))
    assert isinstance(outcome, Outcome) and list(outcome.behind) == [name]

    caught_up = while_served(
        trial, ("n1", "n2"), lambda: operations.catch_up_certificates(trial.work())
    )

    assert isinstance(caught_up, Outcome) and caught_up.is_at_its_end
    trial.finish_master()
    assert_settled(trial.world, by=now())


def test_the_last_resort_reaches_a_node_that_the_lists_keep_out(trial: Trial) -> None:
    """n1 has lost the master from its list; by the common pair it still takes an order."""
    world = trial.world

    async def enable() -> object:
        return await certless.enable(
            world.store,
            trial.nodes(),
            world.head.member.uuid,
            timedelta(hours=2),
            now=now(),
            log=lambda _: None,
        )

    async def disable() -> object:
        return await certless.disable(
            world.store, trial.nodes(), world.head.member.uuid, log=lambda _: None
        )

    handed = while_served(trial, ("n1", "n2"), enable)
    assert isinstance(handed, certless.Handed) and handed.done == ("n0", "n1", "n2")
    world["n1"].keys.write_candidates({world["n1"].member.uuid: frozenset({world["n1"].shown})})

    ended = while_served(trial, ("n1", "n2"), disable)
    assert isinstance(ended, certless.Handed) and ended.missed == {}
    assert world["n1"].keys.certless(now()) is None


@pytest.mark.parametrize("lost", ["client.pem", "server.pem"])
def test_the_last_resort_works_where_the_master_has_lost_a_file(trial: Trial, lost: str) -> None:
    world = trial.world
    handed = while_served(
        trial,
        ("n1", "n2"),
        lambda: certless.enable(
            world.store,
            trial.nodes(),
            world.head.member.uuid,
            timedelta(hours=2),
            now=now(),
            log=lambda _: None,
        ),
    )
    assert isinstance(handed, certless.Handed) and handed.missed == {}
    (world.head.keys.directory / lost).unlink()
    for name in ("n1", "n2"):  # and they show the common one, for want of their own
        (world[name].keys.directory / "client.pem").unlink()

    ended = while_served(
        trial,
        ("n1", "n2"),
        lambda: certless.disable(
            world.store, trial.nodes(), world.head.member.uuid, log=lambda _: None
        ),
    )
    assert isinstance(ended, certless.Handed) and ended.missed == {}
