"""A cluster of nodes that keep real key files and take a caller by the real judgement."""

import asyncio
import functools
from collections.abc import Callable, Iterable, Sequence
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Self
from uuid import UUID, uuid4

from attrs import define, evolve, field

from kvmsec.cluster.renewal import operations
from kvmsec.cluster.renewal.journal import Journal
from kvmsec.cluster.renewal.nodes import Credentials, NotReached, NotTrusted
from kvmsec.cluster.renewal.operations import Outcome, Wish
from kvmsec.cluster.renewal.plan import credentials_for
from kvmsec.cluster.renewal.sequence import Renewing
from kvmsec.errors import Conflict
from kvmsec.linux.errors import Fault
from kvmsec.model.cluster import Cluster, Member, Role
from kvmsec.pki.certificates import (
    anchors_of,
    der_of,
    fingerprint_of,
    load_certificate,
    make_cluster_pair,
    make_request,
    sign_request,
)
from kvmsec.pki.chain import anchor_of
from kvmsec.pki.errors import PeerRefused
from kvmsec.pki.files import KeyFiles
from kvmsec.pki.judgement import judge_orderer, require_node
from kvmsec.pki.keys import KeyKind
from kvmsec.pki.pems import Pair
from kvmsec.pki.standing import Trust
from tests.unit.kvmsec.pki.key_file_steps import is_renewing
from uidpool.ranges import EMPTY

NOW = datetime(2030, 1, 1, tzinfo=UTC)
LATER = NOW + timedelta(days=30)


class Killed(BaseException):
    """What a step raises where the master is killed."""


@define
class Box:
    """One node: its files, its copy of the state, and whether it answers."""

    member: Member
    keys: KeyFiles
    copy: Cluster
    revision: int = 0
    is_up: bool = True
    refuses: str | None = None

    @property
    def name(self) -> str:
        return self.member.name

    @property
    def shown(self) -> str:
        return fingerprint_of(self.keys.own().certificate_pem)

    def trust(self, anchors: str | None = None) -> Trust:
        return Trust(
            anchors=self.keys.anchors_der() if anchors is None else anchors_of(anchors),
            members={one.uuid: one.name for one in self.copy.nodes},
            candidates=self.keys.candidates(),
        )

    def take(self, cluster: Cluster, revision: int) -> None:
        self.copy, self.revision = cluster, revision
        self.keys.write_candidates(cluster.orderers)


@functools.cache
def der(pem: str) -> bytes:
    return der_of(pem)


def refusal(caller: Box, called: Box, way: Credentials, by: datetime = LATER) -> str | None:
    """Why one of the two does not take the other, as both would judge it; None where both do."""
    try:
        judge_orderer(der(way.pair.certificate_pem), called.trust(), by)
        require_node(
            der(called.keys.own().certificate_pem),
            caller.trust(way.anchors),
            name=called.name,
            uuid=called.member.uuid,
            now=by,
        )
    except PeerRefused as error:
        return error.message
    return None


@define
class FakeNode:
    """A `CertificateNode`: the box, reached from the master's box."""

    box: Box
    caller: Box
    way: Credentials | None = None
    calls: list[str] = field(factory=list)

    @property
    def name(self) -> str:
        return self.box.name

    @property
    def uuid(self) -> UUID:
        return self.box.member.uuid

    def through(self, credentials: Credentials) -> Self:
        return evolve(self, way=credentials)

    def _answer(self, what: str) -> None:
        if self.box is not self.caller:
            if not self.box.is_up:
                raise NotReached(self.name, "no answer")
            way = self.way or Credentials(self.caller.keys.own(), self.caller.keys.anchors())
            if (why := refusal(self.caller, self.box, way)) is not None:
                raise NotTrusted(self.name, why)
        self.calls.append(what)
        if self.box.refuses == what:
            raise Fault(f"{self.name} has no room for {what}")

    async def prepare(self, anchors: str, *, kind: KeyKind) -> str:
        self._answer("prepare")
        request = self.box.keys.prepare(
            anchors, node_name=self.name, node_uuid=self.uuid, kind=kind
        )
        assert request is not None
        return request

    async def commit(self, certificate: str) -> None:
        self._answer("commit")
        self.box.keys.commit(certificate)

    async def rollback(self) -> None:
        self._answer("rollback")
        self.box.keys.rollback()

    async def finish(self, anchors: str) -> None:
        self._answer("finish")
        self.box.keys.finish(anchors)

    async def put_file(self, name: str, content: str | None) -> None:
        self._answer(f"put {name}")
        assert name in ("server.key", "certless.pem")
        self.box.keys.put(name, content)  # type: ignore[arg-type]

    async def put_state(self, cluster: Cluster, revision: int) -> None:
        self._answer("state")
        self.box.take(cluster, revision)

    async def presented_certificate(self) -> str:
        self._answer("look")
        return self.box.shown


@define
class MemoryStore:
    """A `Store` in memory."""

    cluster: Cluster | None = None
    revision: int = 0
    before_save: Callable[[], None] = lambda: None

    def load(self) -> tuple[Cluster | None, int]:
        return self.cluster, self.revision

    def save(self, cluster: Cluster, expected_revision: int) -> int:
        self.before_save()
        if expected_revision != self.revision:
            raise Conflict(expected_revision, self.revision)
        self.cluster, self.revision = cluster, self.revision + 1
        return self.revision

    def delete(self, cluster: Cluster, expected_revision: int) -> None:
        raise NotImplementedError


@define
class World:
    """The master `n0`, the candidates and the plain nodes after it, and what the master runs."""

    store: MemoryStore
    boxes: dict[str, Box]
    directory: Path
    master: str = "n0"
    on_step: Callable[[str], None] = lambda _: None
    steps: list[str] = field(factory=list)

    def __getitem__(self, name: str) -> Box:
        return self.boxes[name]

    @property
    def head(self) -> Box:
        return self.boxes[self.master]

    @property
    def journal(self) -> Journal:
        return Journal(self.head.keys.directory / "renewal.json")

    @property
    def state(self) -> Cluster:
        cluster, _ = self.store.load()
        assert cluster is not None
        return cluster

    def work(self) -> Renewing:
        def on_step(what: str) -> None:
            self.steps.append(what)
            self.on_step(what)

        return Renewing(
            own_uuid=self.head.member.uuid,
            store=self.store,
            nodes=[FakeNode(box, self.head) for box in self.boxes.values()],
            keys=self.head.keys,
            journal=self.journal,
            now=lambda: LATER,
            on_step=on_step,
        )

    def renew(self, **wish: object) -> Outcome:
        return asyncio.run(operations.renew(self.work(), Wish(**wish)))  # type: ignore[arg-type]

    def go_on(self) -> Outcome | None:
        return asyncio.run(operations.go_on(self.work()))

    def abort(self) -> Outcome:
        return asyncio.run(operations.abort(self.work()))

    def forget_offline(self) -> Outcome:
        return asyncio.run(operations.forget_offline(self.work()))

    def catch_up(self, name: str | None = None) -> Outcome | None:
        uuid = None if name is None else self[name].member.uuid
        return asyncio.run(operations.catch_up_certificates(self.work(), uuid))

    def kill_at(self, number: int) -> None:
        """From the step of this number on (0 is the first), every step finds the master killed."""
        left = [number]

        def count(_: str) -> None:
            left[0] -= 1
            if left[0] < 0:
                raise Killed

        self.on_step = count

    def let_live(self) -> None:
        self.on_step = lambda _: None

    def ways(self, box: Box) -> Sequence[Credentials]:
        """All that the master may show to a node, after what its files say."""
        own = self.head.keys.own()
        renewal = self.journal.load()
        progress = None if renewal is None else renewal.member(box.member.uuid)
        if renewal is None or progress is None:
            return (Credentials(own, self.head.keys.anchors()),)
        return credentials_for(renewal, progress, own)

    def cut_off(self, by: datetime = LATER) -> list[str]:
        """Each node that the master has no pair for that both accept, and why."""
        found = []
        for box in self.boxes.values():
            if box is self.head:
                continue
            whys = [refusal(self.head, box, way, by) for way in self.ways(box)]
            if None not in whys:
                found.append(f"{box.name}: {whys}")
        return found

    def estranged(self, names: Iterable[str], by: datetime = LATER) -> list[str]:
        """Each candidate of these that another of them doesn't take, with their files' pairs."""
        found = []
        boxes = [self[name] for name in names]
        for caller in boxes:
            if not caller.member.is_candidate:
                continue
            way = Credentials(caller.keys.own(), caller.keys.anchors())
            for called in boxes:
                if called is not caller and (why := refusal(caller, called, way, by)):
                    found.append(f"{caller.name} -> {called.name}: {why}")
        return found


def make_world(
    directory: Path, *, candidates: int = 2, plain: int = 1, now: datetime = NOW
) -> World:
    """`n0` (the master) to `n<candidates - 1>` may order; the plain nodes follow."""
    cluster_uuid = uuid4()
    anchor = make_cluster_pair("trial", cluster_uuid, now=now)
    boxes: dict[str, Box] = {}
    pairs: dict[str, Pair] = {}
    members = []
    for number in range(candidates + plain):
        name, uuid = f"n{number}", uuid4()
        request = make_request(name, uuid)
        certificate = sign_request(
            anchor, request.request_pem, node_name=name, node_uuid=uuid, now=now
        )
        pairs[name] = Pair(certificate, request.key_pem)
        members.append(
            Member(
                name,
                uuid=uuid,
                address=f"192.0.2.{number + 1}",
                role=Role.CANDIDATE if number < candidates else Role.PLAIN,
                certificates=(fingerprint_of(certificate),),
            )
        )
    cluster = Cluster(
        name="trial",
        uuid=cluster_uuid,
        uid_pool=EMPTY,
        draining=EMPTY,
        security_model=None,
        nodes=tuple(members),
        master=members[0].uuid,
        created_at=now,
    )
    for member in members:
        place = directory / member.name
        place.mkdir(mode=0o700)
        keys = KeyFiles(place)
        keys.install(anchor.certificate_pem, pairs[member.name])
        if member.is_candidate:
            keys.put("server.key", anchor.key_pem)
        box = Box(member, keys, cluster)
        box.take(cluster, 1)
        boxes[member.name] = box
    return World(MemoryStore(cluster, 1), boxes, directory)


def anchors(world: World) -> dict[str, str]:
    return {name: box.keys.anchors() for name, box in world.boxes.items()}


def assert_settled(world: World, *, by: datetime = LATER) -> None:
    """Everybody trusts one anchor, which signed what everybody shows; the lists say the same."""
    assert world.journal.load() is None
    (anchor,) = set(anchors(world).values())
    for box in world.boxes.values():
        certificate = load_certificate(box.keys.own().certificate_pem)
        assert anchor_of(certificate, anchors_of(anchor))
        member = world.state.member(box.member.uuid)
        assert member is not None and member.certificates == (box.shown,)
        assert not is_renewing(box.keys)
        assert box.copy == world.state
        if box.member.is_candidate:
            assert box.keys.cluster().certificate_pem == anchor
        else:
            assert not box.keys.holds_cluster_key()
    assert world.cut_off(by) == []
    assert world.estranged(world.boxes, by) == []
