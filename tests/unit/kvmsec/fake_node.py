"""A node that answers as it is told, over a real store, and the operations on its cluster."""

import asyncio
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
from attrs import define, field

from kvmsec.cluster import operations
from kvmsec.cluster.changes import Change
from kvmsec.linux.errors import Fault
from kvmsec.model.cluster import Cluster
from kvmsec.store import Store
from kvmsec.store.file import FileStore
from uidpool.ranges import EMPTY, UidRanges

POOL = UidRanges.parse("1000-1009")


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
    checked: list[UidRanges] = field(factory=list)

    async def check_pool(self, uids: UidRanges) -> Sequence[Unfit]:
        self.checked.append(uids)
        return [Unfit(f"uid {uid} has no user") for uid in uids & self.unfit]

    async def held_uids(self) -> dict[int, str]:
        if self.before_held is not None:
            self.before_held()
        return dict(self.held)

    async def running_instances(self) -> list[str]:
        return list(self.running)

    async def sync_rules(self) -> None:
        if self.refuse_rules:
            self.refuse_rules = False
            raise Fault("no packet filter")
        cluster, _ = self.store.load()
        self.rules = cluster.guarded_uids if cluster is not None else EMPTY

    async def forget_resting(self) -> None:
        self.forgot = True


@pytest.fixture
def store(tmp_path: Path) -> FileStore:
    return FileStore(tmp_path / "cluster.json")


@pytest.fixture
def node(store: FileStore) -> FakeNode:
    return FakeNode(store)


def init(node: FakeNode, pool: UidRanges = POOL, **more: Any) -> Cluster:
    return asyncio.run(operations.init(node.store, node, "trial", uid_pool=pool, **more))


def modify(node: FakeNode, **change: Any) -> Cluster:
    return asyncio.run(operations.modify(node.store, [node], Change(**change)))


def destroy(node: FakeNode) -> None:
    asyncio.run(operations.destroy(node.store, [node]))


def standing(node: FakeNode) -> Cluster:
    cluster, _ = node.store.load()
    assert cluster is not None
    return cluster


def ranges(text: str) -> UidRanges:
    return UidRanges.parse(text)
