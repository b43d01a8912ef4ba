"""The way to a node that is invited: TLS with certificates that only the token's secret makes."""

from __future__ import annotations

import asyncio
from functools import cached_property
from typing import TYPE_CHECKING

from kvmsec.pki.certificates import fingerprint_of
from kvmsec.pki.contexts import client_context
from kvmsec.pki.join_certificates import join_anchor, make_joining_pair
from kvmsec.rpc.client import HttpsTransport
from kvmsec.rpc.errors import Refused, Unreachable
from kvmsec.rpc.remote import RemoteHousehold

if TYPE_CHECKING:
    import ssl

    from kvmsec.model.cluster import Member
    from kvmsec.rpc.messages import AdmitRequest, JoinAnswer, JoinRequest, NodeInfo

_HANDSHAKE_S = 8.0


class TlsDoorway:
    """`kvmsec.cluster.members.greeting.Doorway` over TLS.

    The node shows the same temporary certificate on each connection for as long as it waits, so a
    first one tells which; a proof that is bound to another is refused by the node.
    """

    def __init__(self, member: Member, secret: bytes) -> None:
        self._member = member
        self._pair = make_joining_pair(secret)
        self._anchor = join_anchor(secret)
        self._shown: str | None = None
        self.transport = HttpsTransport(
            member.address,
            member.port,
            member.name,
            member.uuid,
            lambda: self._context,
            lambda: None,
        )
        self._household = RemoteHousehold(self.transport)

    @cached_property
    def _context(self) -> ssl.SSLContext:
        return client_context(self._pair, self._anchor)

    async def hello(self, request: JoinRequest) -> JoinAnswer:
        return await self._household.hello(request)

    async def admit(self, request: AdmitRequest) -> NodeInfo:
        return await self._household.admit(request)

    async def fingerprints(self) -> tuple[str, str]:
        if self._shown is None:
            self._shown = await self._look()
        return fingerprint_of(self._pair.certificate_pem), self._shown

    async def _look(self) -> str:
        import ssl

        member = self._member
        try:
            async with asyncio.timeout(_HANDSHAKE_S):
                _, writer = await asyncio.open_connection(
                    member.address, member.port, ssl=self._context, server_hostname=""
                )
        except ssl.SSLError as error:
            raise Refused(
                member.name,
                f"it shows no certificate of this token ({error.reason or error})",
                hint="let it join with the token that was printed last: `kvmsec node join`",
            ) from error
        except OSError as error:
            raise Unreachable(
                member.name,
                f"{member.address} port {member.port} can't be reached: {error}",
                hint="run `kvmsec node join` and `kvmsec node serve` there first",
            ) from error
        try:
            der = writer.get_extra_info("ssl_object").getpeercert(binary_form=True)
            return fingerprint_of(der)
        finally:
            writer.transport.abort()
