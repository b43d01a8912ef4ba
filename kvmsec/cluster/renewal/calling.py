"""Calling a member with a pair of one's choice, and a look at what it shows."""

from collections.abc import Awaitable, Callable
from datetime import datetime
from typing import Protocol, TypedDict, TypeVar
from uuid import UUID

from attrs import frozen

from kvmsec.cluster.renewal.nodes import Credentials
from kvmsec.cluster.renewal.reached import Reached
from kvmsec.model.cluster import Member
from kvmsec.pki.certificates import anchors_of, fingerprint_of
from kvmsec.pki.errors import PkiError
from kvmsec.pki.files import KeyFiles
from kvmsec.pki.pems import Pair
from kvmsec.pki.standing import Trust
from kvmsec.rpc import messages as m
from kvmsec.rpc.errors import Refused
from kvmsec.rpc.remote import RemoteHousehold
from kvmsec.rpc.transport import Transport
from kvmsec.store import Store

_T = TypeVar("_T")


class Line(Protocol):
    """What calls members with one pair (`kvmsec.daemon.courier.Courier`)."""

    def transport(self, *, name: str, uuid: UUID, address: str, port: int) -> Transport:
        """The way to one of them; nothing is asked of it yet."""

    async def peer_fingerprint(self, *, name: str, uuid: UUID, address: str, port: int) -> str:
        """The fingerprint of what it shows in a new handshake. Raises Unreachable."""


OpenLine = Callable[[Pair, str, Trust], Awaitable[Line]]
"""Opens a line, or gives the one that there is: the pair to show, the anchors (PEM) that TLS takes,
and whom to trust."""


@frozen(kw_only=True)
class Calling:
    """`kvmsec.cluster.renewal.reached.Reach`, over lines that somebody else opens.

    While this node holds the common certificate of the last resort, it is tried where the pair
    that was chosen is refused.
    """

    keys: KeyFiles
    store: Store
    now: Callable[[], datetime]
    open_line: OpenLine

    def __call__(self, member: Member, way: Credentials | None) -> Reached:
        return _Member(member, self, way)

    def ways(self, chosen: Credentials | None) -> tuple[Credentials, ...]:
        """The chosen pair, or this node's own, and the common one; at least one of them.

        Raises what keeps the own from being read where it is the only one.
        """
        common = self._common()
        ways = [] if chosen is None else [chosen]
        if chosen is None:
            try:
                ways.append(Credentials(self.keys.own(), self.keys.anchors()))
            except PkiError:
                if common is None:
                    raise
        if common is not None:
            ways.append(Credentials(common, self._anchors_if_any()))
        return tuple(ways)

    async def line(self, way: Credentials) -> Line:
        """The line for a pair; whoever shows the common certificate is taken as well."""
        common = self._common()
        also = "" if common is None else common.certificate_pem
        return await self.open_line(way.pair, way.anchors + also, self.trust(way))

    def trust(self, way: Credentials) -> Trust:
        cluster, _ = self.store.load()
        common = self._common()
        return Trust(
            anchors=anchors_of(way.anchors) if way.anchors else (),
            members={one.uuid: one.name for one in cluster.nodes} if cluster else {},
            candidates=cluster.orderers if cluster else {},
            certless=None if common is None else fingerprint_of(common.certificate_pem),
            certificates={one.uuid: frozenset(one.certificates) for one in cluster.nodes}
            if cluster
            else {},
        )

    def _common(self) -> Pair | None:
        """A common pair that can't be used must not keep the node's own from being used."""
        try:
            return self.keys.certless(self.now())
        except PkiError:
            return None

    def _anchors_if_any(self) -> str:
        """The last resort works where server.pem is what is broken."""
        try:
            return self.keys.anchors()
        except PkiError:
            return ""


@frozen
class _Member:
    """One member, called over the first pair that it does not refuse."""

    member: Member
    calling: Calling
    chosen: Credentials | None

    async def prepare(self, request: m.PrepareRequest) -> m.Prepared:
        return await self._over(lambda node: node.prepare(request))

    async def commit(self, request: m.CommitRequest) -> None:
        await self._over(lambda node: node.commit(request))

    async def rollback(self) -> None:
        await self._over(lambda node: node.rollback())

    async def finish(self, request: m.FinishRequest) -> None:
        await self._over(lambda node: node.finish(request))

    async def put_file(self, request: m.FileRequest) -> None:
        await self._over(lambda node: node.put_file(request))

    async def put_state(self, state: m.State) -> int:
        return await self._over(lambda node: node.put_state(state))

    async def shown(self) -> str:
        """Over the chosen pair alone: with the common one, everything would be proved by it."""
        way = self.calling.ways(self.chosen)[0]
        await self._by(way, lambda node: node.info())
        line = await self.calling.line(way)
        return await line.peer_fingerprint(**self._target())

    async def _over(self, call: Callable[[RemoteHousehold], Awaitable[_T]]) -> _T:
        *first, last = self.calling.ways(self.chosen)
        for way in first:
            try:
                return await self._by(way, call)
            except Refused:
                continue
        return await self._by(last, call)

    async def _by(self, way: Credentials, call: Callable[[RemoteHousehold], Awaitable[_T]]) -> _T:
        line = await self.calling.line(way)
        return await call(RemoteHousehold(line.transport(**self._target())))

    def _target(self) -> "_Target":
        member = self.member
        return _Target(name=member.name, uuid=member.uuid, address=member.address, port=member.port)


class _Target(TypedDict):
    name: str
    uuid: UUID
    address: str
    port: int
