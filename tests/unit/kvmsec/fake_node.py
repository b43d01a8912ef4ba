"""Nodes that answer as they are told, over real stores, and the operations on their cluster."""

import asyncio
from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any
from uuid import UUID

import pytest
from attrs import define, evolve, field

from kvmsec.cluster import operations
from kvmsec.cluster.changes import Change
from kvmsec.cluster.nodes import Alone
from kvmsec.cluster.operations import Done
from kvmsec.errors import InstancesRun
from kvmsec.linux.errors import Fault
from kvmsec.model.cluster import FORMAT, Cluster, Member, Role, document_of
from kvmsec.rpc.messages import Examination, NodeInfo, State
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
    left: bool = False
    files: dict[str, str] = field(factory=dict)
    before: Callable[[str], None] = field(default=lambda call: None)
    """Told of each call that comes in, before it is carried out."""
    checked: list[UidRanges] = field(factory=list)

    def called(self, call: str) -> None:
        self.before(call)
        if self.is_silent:
            raise Silence(f"{self.name} can't be reached")

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

    async def node_info(self) -> NodeInfo:
        self.called("node_info")
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

    async def examine(self, uids: UidRanges) -> Examination:
        self.called("examine")
        return Examination(
            info=await self.node_info(),
            anchors=(),
            certificate=None,
            holds_cluster_key="server.key" in self.files,
            candidates=(),
            pool_problems=(),
            leases=(),
            running_without_lease=(),
            rules=(),
            unconfined=(),
            may_be_missing=(),
        )

    async def put_file(self, name: str, content: str | None) -> None:
        self.called("put_file")
        if content is None:
            self.files.pop(name, None)
        else:
            self.files[name] = content

    async def leave(self) -> None:
        self.called("leave")
        if self.running:
            raise InstancesRun(self.running)
        self.store.leave()
        self.files.clear()
        self.rules = EMPTY
        self.left = True


@define
class FakeCluster:
    """Several nodes, each with a store of its own; `here` is the one that a command runs on."""

    place: Path
    nodes: dict[str, FakeNode] = field(factory=dict)
    here_name: str = "node1"

    @property
    def here(self) -> FakeNode:
        return self.nodes[self.here_name]

    @property
    def store(self) -> Store:
        return self.here.store

    def node(self, member: Member) -> FakeNode:
        return self.nodes[member.name]

    def make(self, name: str) -> FakeNode:
        (self.place / name).mkdir(exist_ok=True)
        self.nodes[name] = FakeNode(FileStore(self.place / name / "cluster.json"), name)
        return self.nodes[name]

    def join(self, name: str, role: Role = Role.PLAIN) -> FakeNode:
        """A new member that has its copy, as after `node add`."""
        node = self.make(name)
        cluster, revision = self.store.load()
        assert cluster is not None
        uuid = UUID(int=len(self.nodes))
        member = Member(
            name, uuid=uuid, address=name, role=role, certificates=(fingerprint(len(self.nodes)),)
        )
        node.store.introduce(uuid)
        self.store.save(evolve(cluster, nodes=(*cluster.nodes, member)), revision)
        asyncio.run(operations.settle(self.store, self))
        return node

    def modify(self, **change: Any) -> Done:
        on_step = change.pop("on_step", operations.no_step)
        return asyncio.run(operations.modify(self.store, self, Change(**change), on_step=on_step))

    def settle(self) -> Done:
        return asyncio.run(operations.settle(self.store, self))

    def require_converged(self) -> Cluster:
        """Every node has the master's state, and the rules that it asks for."""
        cluster, revision = self.store.load()
        assert cluster is not None
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
    init(made.make("node1"))
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
