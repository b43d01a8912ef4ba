"""Nodes that answer as they are told, over real stores, and the operations on their cluster."""

import asyncio
import os
from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any
from uuid import UUID

import pytest
from attrs import define, evolve, field

from kvmsec.cluster import operations
from kvmsec.cluster.changes import Change
from kvmsec.cluster.members.master import Master
from kvmsec.cluster.nodes import Alone
from kvmsec.cluster.operations import Done
from kvmsec.cluster.trust import Signed
from kvmsec.errors import InstancesRun
from kvmsec.linux.errors import Fault
from kvmsec.model.cluster import FORMAT, Cluster, Member, Role, document_of
from kvmsec.rpc.messages import Examination, FileRequest, NodeInfo, State
from kvmsec.store import Store
from kvmsec.store.file import FileStore
from uidpool.ranges import EMPTY, UidRanges

POOL = UidRanges.parse("1000-1009")


class Silence(Fault):
    """What a call to a node ends with that gives no answer."""

    kind = "Unreachable"


class Refusal(Fault):
    """What comes back of an error that another node raised."""

    def __init__(self, message: str, kind: str) -> None:
        super().__init__(message)
        self.kind = kind


@define
class Unfit:
    message: str
    hint: str | None = "provision it"


@define
class FakeNode:
    """A node whose rules are what the store said when they were last brought up to date."""

    store: Store
    name: str = "node1"
    held: dict[int, str] = field(factory=dict)
    running: list[str] = field(factory=list)
    unfit: UidRanges = EMPTY
    rules: UidRanges = EMPTY
    forgot: bool = False
    before_held: Callable[[], None] | None = None
    refuse_rules: bool = False
    is_silent: bool = False
    refuse_state: bool = False
    is_remote: bool = False
    """Asked over the network: it answers only as long as it belongs to the cluster."""
    before: Callable[[str], None] = field(default=lambda call: None)
    """Told of each call that comes in, before it is carried out."""
    checked: list[UidRanges] = field(factory=list)

    def called(self, call: str) -> None:
        self.before(call)
        if self.is_silent:
            raise Silence(f"{self.name} can't be reached")
        if self.is_remote and self.store.load()[0] is None:
            raise Refusal(f"{self.name} does not trust this node", "Refused")

    async def check_pool(self, uids: UidRanges) -> Sequence[Unfit]:
        self.called("check_pool")
        self.checked.append(uids)
        return [Unfit(f"uid {uid} has no user") for uid in uids & self.unfit]

    async def held_uids(self) -> dict[int, str]:
        self.called("held_uids")
        if self.before_held is not None:
            self.before_held()
        return dict(self.held)

    async def running_instances(self) -> list[str]:
        self.called("running_instances")
        return list(self.running)

    async def sync_rules(self) -> None:
        self.called("sync_rules")
        if self.refuse_rules:
            self.refuse_rules = False
            raise Fault("no packet filter")
        cluster, _ = self.store.load()
        self.rules = cluster.guarded_uids if cluster is not None else EMPTY

    async def forget_resting(self) -> None:
        self.forgot = True

    # Asked by the master, of another member

    @property
    def household(self) -> "FakeNode":
        return self

    @property
    def place(self) -> Path:
        assert isinstance(self.store, FileStore)
        return self.store._path.parent

    def has(self, name: str) -> bool:
        return (self.place / name).exists()

    async def put_state(self, state: State) -> int:
        self.called("put_state")
        if self.refuse_state:
            raise Refusal(f"{self.name}: the disk is full", "StoreNotWritten")
        assert state.document is not None
        now = datetime.now(UTC)
        try:
            return self.store.put_copy(state.document, state.format, state.revision, at=now)
        except Fault as fault:
            raise Refusal(fault.message, type(fault).__name__) from fault

    async def get_state(self) -> State:
        self.called("get_state")
        cluster, revision = self.store.load()
        document = None if cluster is None else document_of(cluster)
        return State(revision=revision, format=FORMAT, document=document)

    async def info(self) -> NodeInfo:
        self.called("info")
        cluster, revision = self.store.load()
        identity = self.store.identity()
        return NodeInfo(
            name=self.name,
            uuid=identity.uuid if identity else UUID(int=0),
            cluster_uuid=cluster.uuid if cluster else None,
            version="1.0",
            protocols=(1, 1),
            time=datetime.now(UTC),
            revision=revision,
            confirmed_at=identity.confirmed_at if identity else None,
        )

    async def examine(self, pool: UidRanges) -> Examination:
        self.called("examine")
        return Examination(
            info=await self.info(),
            anchors=(),
            certificate=None,
            holds_cluster_key=self.has("server.key"),
            candidates=(),
            pool_problems=(),
            leases=(),
            running_without_lease=(),
            rules=(),
            unconfined=(),
            may_be_missing=(),
        )

    async def put_file(self, request: FileRequest) -> None:
        self.called("put_file")
        if request.content is None:
            (self.place / request.name).unlink(missing_ok=True)
        else:
            (self.place / request.name).write_text(request.content)

    async def leave(self) -> None:
        self.called("leave")
        if self.running:
            raise InstancesRun(self.running)
        self.store.leave()
        (self.place / "server.key").unlink(missing_ok=True)
        self.rules = EMPTY


@define
class FakeJoining:
    """A node as an invited one: reached only while it belongs to no cluster."""

    fake: FakeNode

    async def hello(self, name: str, uuid: UUID) -> str:
        self.fake.before("hello")
        self.require_free()
        return f"{name} {uuid}"

    async def admit(self, anchors: str, certificate: str, state: State) -> NodeInfo:
        self.fake.before("admit")
        self.require_free()
        if self.fake.refuse_state:
            raise Refusal(f"{self.fake.name}: the disk is full", "StoreNotWritten")
        assert state.document is not None
        self.fake.store.introduce(UUID(certificate.split()[1]))
        now = datetime.now(UTC)
        self.fake.store.put_copy(state.document, state.format, state.revision, at=now)
        self.fake.before("admitted")
        return await self.fake.info()

    def require_free(self) -> None:
        if self.fake.is_silent or self.fake.store.load()[0] is not None:
            raise Silence(f"{self.fake.name} takes nobody's invitation")


@define
class FakeAuthority:
    """Signs what it is given; fingerprints count up from what is on the disk."""

    def anchors(self) -> str:
        return "anchors"

    def cluster_key(self) -> str:
        return "the key"

    def sign(self, request: str, member: Member) -> Signed:
        number = int.from_bytes(os.urandom(8))
        return Signed(f"certificate {member.uuid}", fingerprint(number))


@define
class FakeInvitations:
    """The names of those that are invited, a file each."""

    place: Path

    def invite(self, name: str) -> None:
        self.place.mkdir(exist_ok=True)
        (self.place / name).touch()

    def is_current(self, name: str) -> bool:
        return (self.place / name).exists()

    def current(self) -> list[str]:
        return sorted(path.name for path in self.place.glob("*"))

    def spend(self, name: str) -> None:
        (self.place / name).unlink(missing_ok=True)


@define
class FakeCluster:
    """Several nodes, each with a store of its own; `here` is the one that a command runs on."""

    place: Path
    nodes: dict[str, FakeNode] = field(factory=dict)
    here_name: str = "node1"

    @property
    def invitations(self) -> FakeInvitations:
        return FakeInvitations(self.place / "invitations")

    def master(self, on_step: Callable[[str], None] = operations.no_step) -> Master:
        return Master(
            store=self.store,
            directory=self,
            authority=FakeAuthority(),
            invitations=self.invitations,
            on_step=on_step,
        )

    @property
    def here(self) -> FakeNode:
        return self.nodes[self.here_name]

    @property
    def store(self) -> Store:
        return self.here.store

    def node(self, member: Member) -> FakeNode:
        return self.nodes[member.name]

    def make(self, name: str, *, is_remote: bool = True) -> FakeNode:
        (self.place / name).mkdir(exist_ok=True)
        store = FileStore(self.place / name / "cluster.json")
        self.nodes[name] = FakeNode(store, name, is_remote=is_remote)
        return self.nodes[name]

    def joining(self, member: Member) -> "FakeJoining":
        return FakeJoining(self.nodes[member.name])

    def join(self, name: str, role: Role = Role.PLAIN) -> FakeNode:
        """A new member that has its copy, as after `node add`."""
        node = self.make(name, is_remote=False)
        cluster, revision = self.store.load()
        assert cluster is not None
        uuid = UUID(int=len(self.nodes))
        member = Member(
            name, uuid=uuid, address=name, role=role, certificates=(fingerprint(len(self.nodes)),)
        )
        node.store.introduce(uuid)
        self.store.save(evolve(cluster, nodes=(*cluster.nodes, member)), revision)
        asyncio.run(operations.settle(self.store, self))
        node.is_remote = True
        return node

    def modify(self, **change: Any) -> Done:
        on_step = change.pop("on_step", operations.no_step)
        return asyncio.run(operations.modify(self.store, self, Change(**change), on_step=on_step))

    def settle(self) -> Done:
        return asyncio.run(operations.settle(self.store, self))

    def require_cluster(self) -> Cluster:
        cluster, _ = self.store.load()
        assert cluster is not None
        return cluster

    def require_converged(self) -> Cluster:
        """Every node has the master's state, and the rules that it asks for."""
        cluster = self.require_cluster()
        _, revision = self.store.load()
        for member in cluster.nodes:
            node = self.nodes[member.name]
            assert node.store.load() == (cluster, revision), node.name
            assert node.rules == cluster.guarded_uids, node.name
        return cluster


def fingerprint(number: int) -> str:
    return f"{number:064x}"


@pytest.fixture
def store(tmp_path: Path) -> FileStore:
    return FileStore(tmp_path / "cluster.json")


@pytest.fixture
def node(store: FileStore) -> FakeNode:
    return FakeNode(store)


@pytest.fixture
def cluster(tmp_path: Path) -> FakeCluster:
    """A candidate and a plain node beside the master, which the pool's rules hold on."""
    made = FakeCluster(tmp_path)
    init(made.make("node1", is_remote=False))
    made.join("node2", Role.CANDIDATE)
    made.join("node3")
    return made


def init(node: FakeNode, pool: UidRanges = POOL, **more: Any) -> Cluster:
    return asyncio.run(operations.init(node.store, node, "trial", uid_pool=pool, **more))


def modify(node: FakeNode, **change: Any) -> Cluster:
    return asyncio.run(operations.modify(node.store, Alone(node), Change(**change))).cluster


def destroy(node: FakeNode) -> None:
    asyncio.run(operations.destroy(node.store, node))


def standing(node: FakeNode) -> Cluster:
    cluster, _ = node.store.load()
    assert cluster is not None
    return cluster


def ranges(text: str) -> UidRanges:
    return UidRanges.parse(text)
