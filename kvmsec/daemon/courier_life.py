"""The courier: the process that speaks TLS with other nodes for one of root's.

A program of its own, confined like the front (`kvmsec.daemon.confined_child`), but that it may
open TCP connections. What a node answers is decoded here; root's process is handed what came of
that, encoded anew.
"""

import asyncio
import os
import ssl
import sys
import time
from socket import socket
from typing import Final

from kvmsec.daemon.front_messages import PEER, TRUST, PeerMessage, TrustMessage
from kvmsec.linux.errors import Fault
from kvmsec.pki.standing import Trust
from kvmsec.rpc import messages as m
from kvmsec.rpc import wire
from kvmsec.rpc.calls import PROTOCOL
from kvmsec.rpc.errors import BadMessage, Refused, Unreachable
from kvmsec.rpc.frames import Request, Target, serve_frames

_HANDSHAKE_S: Final = 5.0
_LISTENS_WITHIN_S: Final = 5.0
"""A daemon that was just started, or given its token, listens within two seconds."""
_PAUSE_S: Final = 0.2
_SERVE: Final = "is `kvmsec node serve` running there, with the token of this invitation?"


def main() -> None:
    """The courier's whole life. Its command line is `Start.encode`'s."""
    from kvmsec.daemon.confined_life import import_all, shut_in
    from kvmsec.daemon.system_calls import courier_rules

    import_all("kvmsec.rpc.courier")
    (control,) = shut_in(courier_rules())
    asyncio.run(_live(control))
    sys.stderr.flush()
    os._exit(0)  # What the interpreter would tidy up is gone from its tree.


async def _live(control: socket) -> None:
    reader, writer = await asyncio.open_connection(sock=control)
    await serve_frames(reader, writer, _Courier().told)


class _Courier:
    """Calls with what it was told last: see `kvmsec.cluster.certless.ways_to_call`."""

    def __init__(self) -> None:
        from kvmsec.pki.certificates import CERTLESS_SERVER_NAME
        from kvmsec.rpc.courier import Courier

        self._context: ssl.SSLContext | None = None
        self._common: ssl.SSLContext | None = None
        self._trust: Trust | None = None
        self._server_name = ""
        self._carrier = Courier(
            lambda: _required(self._context),
            lambda: self._trust,
            server_name=lambda: self._server_name,
        )
        self._common_carrier = Courier(
            lambda: _required(self._common),
            lambda: self._trust,
            server_name=lambda: CERTLESS_SERVER_NAME,
        )

    async def told(self, request: Request) -> bytes:
        """Do what root's process asks for; raises nothing."""
        try:
            match request.call:
                case TRUST.name:
                    self._take(wire.decode_request(TRUST, request.body))
                    return wire.encode_answer(m.Nothing(), PROTOCOL)
                case PEER.name:
                    return wire.encode_answer(await self._peer(request.target), PROTOCOL)
                case _:
                    return await self._carry(request)
        except Fault as error:
            return wire.encode_fault(error)

    def _take(self, told: m.Message) -> None:
        assert isinstance(told, TrustMessage)
        from kvmsec.daemon.told import trust_of
        from kvmsec.pki.certificates import CERTLESS_SERVER_NAME, fingerprint_of
        from kvmsec.pki.contexts import client_context
        from kvmsec.pki.pems import Pair

        pair = Pair.parse(told.pair, "this node's pair")
        is_common = fingerprint_of(pair.certificate_pem) == told.certless
        context, common = client_context(pair, told.anchors), None
        if told.common is not None and not is_common:
            common = client_context(Pair.parse(told.common, "the common pair"), told.anchors)
        self._trust = trust_of(told)
        self._context, self._common = context, common
        self._server_name = CERTLESS_SERVER_NAME if is_common else ""

    async def _carry(self, request: Request) -> bytes:
        """By the common pair where the own is refused: nothing was done then. Raises a Fault."""
        try:
            return await self._carrier.answer(request)
        except Refused:
            if self._common is None:
                raise
        return await self._common_carrier.answer(request)

    async def _peer(self, target: Target | None) -> PeerMessage:
        """Which certificate a node shows, for the proofs of a join, which are bound to it."""
        from kvmsec.pki.certificates import fingerprint_of

        if target is None:
            raise BadMessage(None, "a question without a node to ask")
        context, where = _required(self._context), f"{target.address} port {target.port}"
        try:
            writer = await _connected_at_last(target, context)
        except ConnectionRefusedError as error:
            raise Unreachable(target.name, f"no daemon listens on {where}", hint=_SERVE) from error
        except OSError as error:  # ssl.SSLError and TimeoutError among them
            reason = f"{where} is not reached with this token: {error}"
            raise Unreachable(target.name, reason, hint=_SERVE) from error
        try:
            der = writer.get_extra_info("ssl_object").getpeercert(binary_form=True)
        finally:
            writer.transport.abort()
        return PeerMessage(fingerprint=fingerprint_of(der))


async def _connected_at_last(target: Target, context: ssl.SSLContext) -> asyncio.StreamWriter:
    """Connect to a node that may be about to listen. Raises OSError."""
    give_up_at = time.monotonic() + _LISTENS_WITHIN_S
    while True:
        try:
            async with asyncio.timeout(2 * _HANDSHAKE_S):
                _, writer = await asyncio.open_connection(
                    target.address,
                    target.port,
                    ssl=context,
                    server_hostname="",
                    ssl_handshake_timeout=_HANDSHAKE_S,
                )
                return writer
        except ConnectionRefusedError:
            if time.monotonic() > give_up_at:
                raise
        await asyncio.sleep(_PAUSE_S)


def _required(context: ssl.SSLContext | None) -> ssl.SSLContext:
    if context is None:
        raise BadMessage(None, "the courier was not told what to call with")
    return context
