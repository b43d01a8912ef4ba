"""HTTPS for the calls of other nodes: `POST /rpc/VERSION/CALL` over mutual TLS 1.3."""

import asyncio
import re
import socket
import ssl
from collections.abc import Awaitable, Callable, Sequence
from datetime import UTC, datetime
from types import TracebackType
from typing import Final, Self

from aiohttp import web

from kvmsec.linux.errors import Fault
from kvmsec.pki.standing import Trust
from kvmsec.rpc import wire
from kvmsec.rpc.authorization import Judgements, authorize
from kvmsec.rpc.calls import Call
from kvmsec.rpc.connections import Connection, Connections
from kvmsec.rpc.errors import BadMessage, CallTimedOut, Overloaded, Refused
from kvmsec.rpc.gate import Limits
from kvmsec.rpc.refusals import Refusal, Refusals
from kvmsec.rpc.wire import Caller

Handler = Callable[[Caller, Call, int, bytes], Awaitable[bytes]]
"""Answers a call (caller, call, version, request) with an envelope (`kvmsec.rpc.wire`)."""

_PATH: Final = re.compile(r"/rpc/([0-9]{1,4})/([a-z_.]{1,64})")
_JSON: Final = "application/json"
_LET_IN: Final = b'{"ok":{}}'
"""To `GET /rpc`: the handshake is done, which TLS itself doesn't tell a client."""


class Server:
    """Serves on listening sockets; an asynchronous context manager.

    `trust` gives whom this node trusts at the time of each request (None: it belongs to no
    cluster), and the same object as long as that hasn't changed; where it raises, everybody is
    refused. `tell` is told of who was refused.
    """

    def __init__(
        self,
        listeners: Sequence[socket.socket],
        context: ssl.SSLContext,
        handler: Handler,
        trust: Callable[[], Trust | None],
        *,
        tell: Callable[[Refusal], None] = lambda refusal: None,
        limits: Limits | None = None,
    ) -> None:
        self._listeners = tuple(listeners)
        self._handler = handler
        self._trust = trust
        self._limits = limits or Limits()
        self._connections = Connections(context, self._limits, Refusals(tell))
        self._judgements = Judgements()

    def use(self, context: ssl.SSLContext) -> None:
        """Take this context for every connection from now on; those there are go on."""
        self._connections.context = context

    async def __aenter__(self) -> Self:
        self._connections.open(self._listeners, self._serve)
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        await self.close()

    async def close(self, *, grace_s: float = 5.0) -> None:
        """Take no more connections and end those there are; a call under way has `grace_s`.

        The listening sockets are left open: they may be systemd's.
        """
        await self._connections.close(grace_s)

    async def _serve(self, request: web.BaseRequest) -> web.StreamResponse:
        connection = self._connections.of(request)
        if connection is None:  # It was cut.
            raise ConnectionResetError
        connection.stop_timer()
        try:
            return await self._answer(request, connection)
        finally:
            if connection.transport is not None and not connection.transport.is_closing():
                self._connections.start_timer(connection, self._limits.idle_s)

    async def _answer(self, request: web.BaseRequest, connection: Connection) -> web.StreamResponse:
        name: str | None = None
        try:
            self._require_room()
            if (request.method, request.raw_path) == ("GET", "/rpc"):
                return web.Response(body=_LET_IN, content_type=_JSON)
            call, protocol = _call_of(request)
            name = call.name
            caller = self._judge(call, request)
            body = await self._read(request)
        except Refused as error:
            return self._refuse(403, error, connection, name, request)
        except Overloaded as error:
            return self._refuse(503, error, connection, name, request)
        except CallTimedOut as error:
            return self._refuse(408, error, connection, name, request)
        except Fault as error:
            return self._refuse(400, error, connection, name, request)
        try:
            answer = await self._handler(caller, call, protocol, body)
        except Fault as error:
            return web.Response(status=503, body=wire.encode_fault(error), content_type=_JSON)
        return web.Response(body=answer, content_type=_JSON)

    def _require_room(self) -> None:
        if self._connections.standing > self._limits.connections:
            raise Overloaded(
                None,
                f"{self._limits.connections} connections stand, and no more are taken",
                hint="try again later",
            )

    def _judge(self, call: Call, request: web.BaseRequest) -> Caller:
        der = _certificate_of(request)
        try:
            trust = self._trust()
        except Fault as error:
            raise Refused(
                None,
                "this node can't tell whom it trusts",
                hint="its log says why; `kvmsec doctor` on the node itself",
                evidence={"step": "fingerprint"},
            ) from error
        return authorize(call, der, trust, datetime.now(UTC), self._judgements)

    async def _read(self, request: web.BaseRequest) -> bytes:
        limits = self._limits
        length = request.content_length
        if length is None or "Transfer-Encoding" in request.headers:
            raise BadMessage(None, "a request needs a Content-Length and is sent in one piece")
        if length > limits.request_bytes:
            raise BadMessage(
                None, f"a request of {length} bytes came, {limits.request_bytes} are the most"
            )
        try:
            async with asyncio.timeout(limits.body_s):
                return await request.read()
        except TimeoutError:
            raise CallTimedOut(
                None, f"the request was not whole within {limits.body_s:g} s"
            ) from None

    def _refuse(
        self,
        status: int,
        error: Fault,
        connection: Connection,
        call: str | None,
        request: web.BaseRequest,
    ) -> web.StreamResponse:
        """Say why, and end the connection: what follows on it has nothing to say either."""
        cause = error.__cause__ if isinstance(error, Refused) else None
        told = cause.message if isinstance(cause, Fault) else error.message
        self._connections.note(connection, told, call=call, peer=_subject_of(request))
        answer = web.Response(status=status, body=wire.encode_fault(error), content_type=_JSON)
        answer.force_close()
        return answer


def _call_of(request: web.BaseRequest) -> tuple[Call, int]:
    """Raises BadMessage and WrongProtocol."""
    found = _PATH.fullmatch(request.raw_path)
    if request.method != "POST" or found is None:
        raise BadMessage(None, "there is nothing here but POST /rpc/VERSION/CALL")
    protocol = int(found[1])
    return wire.find_call(found[2], protocol), protocol


def _certificate_of(request: web.BaseRequest) -> bytes:
    """The DER that the peer has shown; empty where it has gone meanwhile, which nobody passes."""
    transport = request.transport
    tls = transport.get_extra_info("ssl_object") if transport is not None else None
    return (tls.getpeercert(binary_form=True) if tls is not None else None) or b""


def _subject_of(request: web.BaseRequest) -> str | None:
    """Who the peer's certificate says it is, which nobody has judged."""
    transport = request.transport
    tls = transport.get_extra_info("ssl_object") if transport is not None else None
    names = (tls.getpeercert() or {}).get("subjectAltName", ()) if tls is not None else ()
    return next((str(value) for kind, value in names if kind == "DNS"), None)
