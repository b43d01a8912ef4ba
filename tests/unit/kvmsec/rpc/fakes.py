"""A node and its household that note what they were asked, and a way to them through the bytes."""

import asyncio
from collections.abc import AsyncIterator, Mapping
from datetime import UTC, datetime
from typing import Any
from uuid import UUID

from attrs import define, field

from kvmsec.agent import Event, Finding, InstanceInfo, InstanceLog, InstanceState, UidState
from kvmsec.errors import UnknownInstance
from kvmsec.model.instance import InstanceDefinition
from kvmsec.rpc import messages as m
from kvmsec.rpc import wire
from kvmsec.rpc.calls import CALLS
from kvmsec.rpc.service import Service, respond
from kvmsec.rpc.wire import Caller
from uidpool.ranges import UidRanges

AT = datetime(2026, 1, 2, 3, 4, 5, tzinfo=UTC)
UUID_1 = UUID(int=1)
INFO = m.NodeInfo(
    name="node1",
    uuid=UUID_1,
    cluster_uuid=None,
    version="1",
    protocols=(1, 1),
    time=AT,
    revision=3,
    confirmed_at=None,
)
STATE = m.State(revision=3, format=1, document={"name": "trial"})


@define
class FakeNode:
    """Answers like a node, and keeps every question."""

    name: str = "node1"
    asked: list[tuple[Any, ...]] = field(factory=list)
    happening: "asyncio.Queue[Event]" = field(factory=asyncio.Queue)
    failure: Exception | None = None
    details: dict[str, Any] = field(factory=dict)

    def _note(self, *question: Any) -> None:
        self.asked.append(question)
        if self.failure is not None:
            raise self.failure

    async def start(self, definition: InstanceDefinition) -> InstanceInfo:
        self._note("start", definition)
        return InstanceInfo(
            name=definition.name,
            state=InstanceState.RUNNING,
            pid=7,
            uid=1000,
            started_at=AT,
            cpu_s=0.5,
            details=self.details,
        )

    async def stop(self, name: str, *, timeout_s: float = 60.0, force: bool = False) -> Any:
        self._note("stop", name, timeout_s, force)
        return InstanceInfo(name=name, state=InstanceState.STOPPED, reason="stopped")

    async def reboot(self, name: str) -> None:
        self._note("reboot", name)

    async def list(self) -> tuple[InstanceInfo, ...]:
        self._note("list")
        return (InstanceInfo(name="web1", state=InstanceState.CRASHED, autostart=True),)

    async def info(self, name: str) -> InstanceInfo:
        self._note("info", name)
        if name != "web1":
            raise UnknownInstance(name)
        return InstanceInfo(name=name, state=InstanceState.RUNNING, details=self.details)

    async def events(self) -> AsyncIterator[Event]:
        while True:
            yield await self.happening.get()

    async def log(self, name: str) -> InstanceLog:
        self._note("log", name)
        return InstanceLog("ours", "\ufffd" * 300_000, "\udcff\x00")

    async def uid_states(self, *, with_free: bool = False) -> tuple[UidState, ...]:
        self._note("uid_states", with_free)
        return (UidState(1000, "kvm-1000", "leased", "web1", None, "/"),)

    async def release_uid(self, uid: int) -> UidState:
        self._note("release_uid", uid)
        return UidState(uid, None, "free")

    async def apply_rules(self) -> None:
        self._note("apply_rules")

    async def verify_rules(self) -> tuple[Finding, ...]:
        self._note("verify_rules")
        return (Finding("rules", "ok", "firewall", "fine"),)

    async def show_rules(self) -> Mapping[str, Any]:
        self._note("show_rules")
        return {"backend": "nftables", "families": ("ipv4",)}

    async def remove_rules(self, *, force: bool = False) -> None:
        self._note("remove_rules", force)

    async def doctor(self) -> tuple[Finding, ...]:
        self._note("doctor")
        return (Finding("kvm", "error", "/dev/kvm", "missing", "load it", "node1"),)

    async def reconcile(self) -> tuple[str, ...]:
        self._note("reconcile")
        return ("web1: cleaned",)

    async def check_pool(self, uids: UidRanges) -> "tuple[m.Problem, ...]":
        self._note("check_pool", uids)
        return (m.Problem(message="uid 1 has no user", hint="make it"),)

    async def held_uids(self) -> dict[int, str]:
        self._note("held_uids")
        return {1000: "instance web1"}

    async def running_instances(self) -> "tuple[str, ...]":
        self._note("running_instances")
        return ("web1",)

    async def sync_rules(self) -> None:
        self._note("sync_rules")

    async def forget_resting(self) -> None:
        self._note("forget_resting")


@define
class FakeHome:
    """Answers like a daemon, and keeps every question."""

    asked: list[tuple[Any, ...]] = field(factory=list)
    refuses_start: Exception | None = None

    async def info(self) -> m.NodeInfo:
        self.asked.append(("info",))
        return INFO

    async def examine(self, pool: UidRanges) -> m.Examination:
        self.asked.append(("examine", pool))
        return m.Examination(
            info=INFO,
            anchors=None,
            certificate=None,
            holds_cluster_key=False,
            candidates=((UUID_1, "a" * 64),),
            pool_problems=(),
            leases=(m.LeaseFacts(uid=1000, instance="web1", is_alive=True),),
            running_without_lease=(),
            rules=(),
            unconfined=(),
            may_be_missing=(),
        )

    async def provision(self, pool: UidRanges) -> m.Provisioned:
        self.asked.append(("provision", pool))
        return m.Provisioned(made="1000-1001", kept="")

    async def doctor(self) -> tuple[Finding, ...]:
        self.asked.append(("doctor",))
        return (Finding("kvm", "error", "/dev/kvm", "missing", "load it", "node1"),)

    async def leave(self) -> None:
        self.asked.append(("leave",))

    async def get_state(self) -> m.State:
        return STATE

    async def put_state(self, state: m.State) -> int:
        self.asked.append(("put_state", state))
        return state.revision

    async def prepare(self, request: m.PrepareRequest) -> m.Prepared:
        self.asked.append(("prepare", request))
        return m.Prepared(signing_request="a request")

    async def commit(self, request: m.CommitRequest) -> None:
        self.asked.append(("commit", request))

    async def rollback(self) -> None:
        self.asked.append(("rollback",))

    async def finish(self, request: m.FinishRequest) -> None:
        self.asked.append(("finish", request))

    async def put_file(self, request: m.FileRequest) -> None:
        self.asked.append(("put_file", request))

    async def admit_start(
        self, definition: InstanceDefinition, revision: int, caller: Caller | None
    ) -> None:
        self.asked.append(("admit_start", definition.name, revision, caller))
        if self.refuses_start is not None:
            raise self.refuses_start

    async def hello(self, request: m.JoinRequest, caller: Caller | None) -> m.JoinAnswer:
        self.asked.append(("hello", request, caller))
        return m.JoinAnswer(proof="b" * 64, signing_request="a request")

    async def admit(self, request: m.AdmitRequest, caller: Caller | None) -> m.NodeInfo:
        self.asked.append(("admit", request, caller))
        return INFO


@define
class BytesTransport:
    """A transport that is nothing but the bytes both ways."""

    service: Service
    caller: Caller | None = None
    failures: list[tuple[str, BaseException]] = field(factory=list)
    made: list[str] = field(factory=list)

    async def call(self, name: str, request: m.Message) -> m.Message:
        self.made.append(name)
        body = wire.encode_request(request, 1, node="node1")
        answer = await respond(
            self.service.answer,
            self.caller,
            name,
            1,
            body,
            on_failure=lambda call, error: self.failures.append((call, error)),
        )
        return wire.decode_answer(CALLS[name], answer, node="node1")
