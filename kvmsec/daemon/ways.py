"""The ways to the other members: through a courier, which speaks TLS for root's process."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from contextlib import AsyncExitStack
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any, Generic, Self, TypeVar

from attrs import define, field

from kvmsec.errors import KvmsecError
from kvmsec.linux.errors import Fault

if TYPE_CHECKING:
    from kvmsec.cluster.nodes import JoiningNode
    from kvmsec.config import Config
    from kvmsec.daemon.courier import Courier
    from kvmsec.daemon.front_messages import TrustMessage
    from kvmsec.daemon.trust_source import Signature, TrustSource
    from kvmsec.model.cluster import Member
    from kvmsec.paths import Paths
    from kvmsec.pki.joining import Invitation
    from kvmsec.pki.pems import Pair
    from kvmsec.rpc.messages import AdmitRequest, JoinAnswer, JoinRequest, Message, NodeInfo
    from kvmsec.rpc.remote import RemoteAgent
    from kvmsec.rpc.transport import Transport
    from kvmsec.store import Store

_Here = TypeVar("_Here")


class NoCertificate(KvmsecError):
    """This node knows a cluster, and has nothing to show that it is of it."""

    def __init__(self) -> None:
        super().__init__(
            "this node has no client.pem, so it can call no other",
            hint="run `kvmsec node invite NAME --readd` on the master, `kvmsec node join` here, "
            "then `kvmsec node readd NAME` on the master; the master's own: put back a copy",
        )


class Ways(Generic[_Here]):
    """`kvmsec.cluster.nodes.Directory`: a courier is started when the first member is asked.

    Nothing is imported before that; a cluster of one node needs none of it. For a process with one
    thread; an asynchronous context manager.
    """

    def __init__(
        self, paths: Paths, config: Callable[[], Config], store: Store, here: _Here
    ) -> None:
        self._paths = paths
        self._config = config
        self._store = store
        self._here = here
        self._opened = AsyncExitStack()
        self._courier: Courier | None = None
        self._own = AsyncExitStack()
        self._told: Signature | None = None
        self._turn = asyncio.Lock()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._end_courier()
        await self._opened.aclose()

    @property
    def here(self) -> _Here:
        return self._here

    def node(self, member: Member) -> RemoteAgent:
        from kvmsec.rpc.remote import RemoteAgent

        return RemoteAgent(_Way(self, member), member.name, revision=self._store.load()[1])

    def joining(self, member: Member) -> JoiningNode:
        from kvmsec.cluster.members.greeting import Greeter
        from kvmsec.pki.invitations import Invitations

        invitation = Invitations(self._paths.invitations).find(member.name, datetime.now(UTC))
        return Greeter(_Doorway(self, member, invitation), invitation)

    async def courier(self) -> Courier:
        """The courier; it trusts whom the files name as they are now."""
        async with self._turn:  # One for all members, who are asked at once.
            source = self._source()
            signature = source.signature()
            if self._courier is None or self._courier.is_gone:
                await self._end_courier()
                self._courier = await self._start(_required(source), self._own)
            elif signature != self._told:
                await self._courier.tell(_required(source))
            self._told = signature
            return self._courier

    async def refresh(self) -> None:
        """Tell the courier, if there is one, what the files hold now.

        One that can't be told, since this node is no member any more or its files are broken, is
        ended: it has the key that was in force before.
        """
        if self._courier is None:
            return
        async with self._turn:
            source = self._source()
            signature = source.signature()
            if self._courier is None or signature == self._told:
                return
            try:
                await self._courier.tell(_required(source))
                self._told = signature
            except Fault:
                await self._end_courier()

    async def _end_courier(self) -> None:
        self._courier = None
        await self._own.aclose()

    async def start_courier(self, message: TrustMessage) -> Courier:
        """Another courier, for as long as the command runs."""
        return await self._start(message, self._opened)

    async def _start(self, message: TrustMessage, lifetime: AsyncExitStack) -> Courier:
        from kvmsec.daemon.confined_start import start_of
        from kvmsec.daemon.courier import Courier

        start = start_of("courier", self._paths, self._config(), self._store)
        return await lifetime.enter_async_context(Courier(start, message))

    def _source(self) -> TrustSource:
        from kvmsec.daemon.trust_source import TrustSource

        return TrustSource(self._paths, self._store)


def _required(source: TrustSource) -> TrustMessage:
    message = source.message()
    if message is None:
        raise NoCertificate
    return message


@define
class _Way:
    """`kvmsec.rpc.transport.Transport` to one member."""

    ways: Ways[Any]
    member: Member

    async def call(self, name: str, request: Message) -> Message:
        return await _transport(await self.ways.courier(), self.member).call(name, request)


@define
class _Doorway:
    """`kvmsec.cluster.members.greeting.Doorway`, by a courier that has the token's pair only."""

    ways: Ways[Any]
    member: Member
    invitation: Invitation
    _own: Pair | None = field(default=None)
    _courier: Courier | None = field(default=None)
    _fingerprints: tuple[str, str] | None = field(default=None)

    async def hello(self, request: JoinRequest) -> JoinAnswer:
        from kvmsec.rpc.remote import RemoteHousehold

        return await RemoteHousehold(_transport(await self._open(), self.member)).hello(request)

    async def admit(self, request: AdmitRequest) -> NodeInfo:
        from kvmsec.rpc.remote import RemoteHousehold

        return await RemoteHousehold(_transport(await self._open(), self.member)).admit(request)

    async def fingerprints(self) -> tuple[str, str]:
        from kvmsec.pki.certificates import fingerprint_of

        if self._fingerprints is None:
            courier, member = await self._open(), self.member
            shown = await courier.peer_fingerprint(
                name=member.name, uuid=member.uuid, address=member.address, port=member.port
            )
            assert self._own is not None
            self._fingerprints = fingerprint_of(self._own.certificate_pem), shown
        return self._fingerprints

    async def _open(self) -> Courier:
        from kvmsec.daemon.front_messages import TrustMessage
        from kvmsec.pki.join_certificates import join_anchor, make_joining_pair

        if self._courier is None:
            self._own = make_joining_pair(self.invitation.secret)
            message = TrustMessage(
                pair=self._own.pem,
                anchors=join_anchor(self.invitation.secret),
                members={},
                candidates={},
                is_joining=True,
            )
            self._courier = await self.ways.start_courier(message)
        return self._courier


def _transport(courier: Courier, member: Member) -> Transport:
    return courier.transport(
        name=member.name, uuid=member.uuid, address=member.address, port=member.port
    )
