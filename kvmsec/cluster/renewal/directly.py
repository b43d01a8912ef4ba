"""Calling a member over TLS with a pair of one's choice, and a look at what it shows."""

import asyncio
import ssl
from collections.abc import Awaitable, Callable
from datetime import datetime
from typing import Final, TypeVar

from attrs import frozen

from kvmsec.cluster.renewal.nodes import Credentials
from kvmsec.cluster.renewal.reached import Reached
from kvmsec.model.cluster import Member
from kvmsec.pki.certificates import anchors_of, fingerprint_of
from kvmsec.pki.contexts import client_context
from kvmsec.pki.errors import PkiError
from kvmsec.pki.files import KeyFiles
from kvmsec.pki.pems import Pair
from kvmsec.pki.standing import Trust
from kvmsec.rpc import messages as m
from kvmsec.rpc.client import HttpsTransport
from kvmsec.rpc.errors import Refused, Unreachable
from kvmsec.rpc.remote import RemoteHousehold
from kvmsec.store import Store

_T = TypeVar("_T")

_HANDSHAKE_S: Final = 8.0


@frozen(kw_only=True)
class Direct:
    """`kvmsec.cluster.renewal.reached.Reach`: from this process, a connection for each call.

    While this node holds the common certificate of the last resort, it is tried where the pair
    that was chosen is refused.
    """

    keys: KeyFiles
    store: Store
    now: Callable[[], datetime]

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

    def context(self, way: Credentials) -> ssl.SSLContext:
        common = self._common()
        also = "" if common is None else common.certificate_pem
        return client_context(way.pair, way.anchors + also)

    def trust(self, way: Credentials) -> Trust:
        cluster, _ = self.store.load()
        common = self._common()
        return Trust(
            anchors=anchors_of(way.anchors) if way.anchors else (),
            members={one.uuid: one.name for one in cluster.nodes} if cluster else {},
            candidates=cluster.orderers if cluster else {},
            certless=None if common is None else fingerprint_of(common.certificate_pem),
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
    direct: Direct
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
        way = self.direct.ways(self.chosen)[0]
        shown = await self._look(self.direct.context(way))
        await self._by(way, lambda node: node.info())
        return shown

    async def _over(self, call: Callable[[RemoteHousehold], Awaitable[_T]]) -> _T:
        *first, last = self.direct.ways(self.chosen)
        for way in first:
            try:
                return await self._by(way, call)
            except Refused:
                continue
        return await self._by(last, call)

    async def _by(self, way: Credentials, call: Callable[[RemoteHousehold], Awaitable[_T]]) -> _T:
        context, trust = self.direct.context(way), self.direct.trust(way)
        transport = HttpsTransport(
            self.member.address,
            self.member.port,
            self.member.name,
            self.member.uuid,
            lambda: context,
            lambda: trust,
        )
        try:
            return await call(RemoteHousehold(transport))
        finally:
            await transport.close()

    async def _look(self, context: ssl.SSLContext) -> str:
        """The certificate that the node shows in a new handshake."""
        member = self.member
        try:
            async with asyncio.timeout(_HANDSHAKE_S):
                _, writer = await asyncio.open_connection(
                    member.address, member.port, ssl=context, server_hostname=""
                )
        except ssl.SSLError as error:
            raise Refused(
                member.name,
                f"this node does not trust what it shows ({error.reason or error})",
                hint="compare server.pem on both nodes with `kvmsec cluster verify`",
            ) from error
        except OSError as error:
            reason = f"{member.address} port {member.port} can't be reached: {error}"
            raise Unreachable(member.name, reason, hint="does its daemon run?") from error
        try:
            tls = writer.get_extra_info("ssl_object")
            return fingerprint_of(tls.getpeercert(binary_form=True) or b"")
        finally:
            writer.transport.abort()
