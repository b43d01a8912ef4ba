"""HTTPS for the calls of other nodes: `POST /rpc/VERSION/CALL` over mutual TLS 1.3.

Connections are taken by ourselves and not by `loop.create_server`, so that one can be refused
before anything is made for it, and so that each new one takes the context that holds then.
"""

import asyncio
import logging
import re
import socket
import ssl
from collections.abc import Awaitable, Callable, Sequence
from datetime import UTC, datetime
from types import TracebackType
from typing import Any, Final, Self

from aiohttp import web
from attrs import define, field

from kvmsec.linux.errors import Fault
from kvmsec.pki.standing import Trust
from kvmsec.rpc import wire
from kvmsec.rpc.authorization import Judgements, authorize
from kvmsec.rpc.calls import Call
from kvmsec.rpc.errors import BadMessage, CallTimedOut, Overloaded, Refused
from kvmsec.rpc.gate import Gate, Limits, origin_of
from kvmsec.rpc.refusals import Refusal, Refusals
from kvmsec.rpc.wire import Caller

Handler = Callable[[Caller, Call, int, bytes], Awaitable[bytes]]
"""Answers a call (caller, call, version, request) with an envelope (`kvmsec.rpc.wire`)."""

_PATH: Final = re.compile(r"/rpc/([0-9]{1,4})/([a-z_.]{1,64})")
_SHUTDOWN_S: Final = 2.0
"""How long a peer may take to say goodbye (close_notify) before its connection is cut."""
_LINGERING_S: Final = 1.0
"""How long the rest of what was refused is read, so that the refusal arrives before a reset."""
_ACCEPT_PAUSE_S: Final = 0.2
_JSON: Final = "application/json"
_LET_IN: Final = b'{"ok":{}}'
"""To `GET /rpc`: the handshake is done, which TLS itself doesn't tell a client."""


@define(eq=False)
class _Connection:
    """A connection from its acceptance on, with the time at which it must have got on."""

    address: str
    origin: str
    is_asyncios: bool = False
    """Whether asyncio has the socket, and closes it."""
    timer: asyncio.TimerHandle | None = None
    transport: asyncio.Transport | None = None
    """Once the handshake is done."""

    def stop_timer(self) -> None:
        if self.timer is not None:
            self.timer.cancel()
            self.timer = None


@define
class _State:
    """What may be exchanged while the server runs."""

    context: ssl.SSLContext
    unfinished: "dict[_Connection, asyncio.Task[None]]" = field(factory=dict)
    """In the order in which they came."""
    by_protocol: dict[Any, _Connection] = field(factory=dict)
    """By the protocol object that aiohttp hands to us with each request."""
    standing: int = 0


class _Http(web.Server):
    """aiohttp's server, which also tells us when a connection stands and when it has ended."""

    def __init__(self, owner: "Server", **settings: Any) -> None:
        super().__init__(owner._serve, **settings)
        self._owner = owner

    def connection_made(self, handler: Any, transport: asyncio.Transport) -> None:
        super().connection_made(handler, transport)
        self._owner._stands(handler, transport)

    def connection_lost(self, handler: Any, exc: BaseException | None = None) -> None:
        super().connection_lost(handler, exc)
        self._owner._has_ended(handler)


class _Log(logging.Handler):
    """What aiohttp itself refuses, it logs with the address as the argument."""

    def __init__(self, tell: Callable[[str, str], None]) -> None:
        super().__init__()
        self._tell = tell

    def emit(self, record: logging.LogRecord) -> None:
        address = record.args[0] if isinstance(record.args, tuple) and record.args else ""
        error = record.exc_info[1] if record.exc_info else None
        self._tell(str(address), f"{record.msg % '…' if record.args else record.msg}: {error}")


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
        self._state = _State(context)
        self._gate = Gate(self._limits)
        self._refusals = Refusals(tell)
        self._judgements = Judgements()
        self._accepting: list[asyncio.Task[None]] = []
        self._http: _Http | None = None

    def use(self, context: ssl.SSLContext) -> None:
        """Take this context for every connection from now on; those there are go on."""
        self._state.context = context

    async def __aenter__(self) -> Self:
        limits = self._limits
        logger = logging.Logger("kvmsec.rpc")
        logger.addHandler(_Log(self._note_of_aiohttp))
        self._http = _Http(
            self,
            logger=logger,
            request_factory=self._request,
            access_log=None,
            auto_decompress=False,
            keepalive_timeout=limits.idle_s,
            lingering_time=_LINGERING_S,
            max_line_size=limits.line_bytes,
            max_field_size=limits.line_bytes,
        )
        for listener in self._listeners:
            listener.setblocking(False)
            self._accepting.append(asyncio.create_task(self._accept(listener)))
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
        tasks = [*self._accepting, *self._state.unfinished.values()]
        self._accepting.clear()
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        if self._http is not None:
            await self._http.shutdown(grace_s)
            self._http = None
        for connection in self._state.by_protocol.values():
            connection.stop_timer()

    # Connections -------------------------------------------------------------------------

    async def _accept(self, listener: socket.socket) -> None:
        loop = asyncio.get_running_loop()
        while True:
            try:
                accepted, address = await loop.sock_accept(listener)
            except OSError as error:  # accept(2): out of descriptors, or a peer that has gone
                self._refusals.add("", f"accept: {error.strerror}", loop.time())
                await asyncio.sleep(_ACCEPT_PAUSE_S)
                continue
            self._admit(accepted, address[0])

    def _admit(self, accepted: socket.socket, address: str) -> None:
        loop, origin = asyncio.get_running_loop(), origin_of(address)
        if (why := self._gate.why_not(origin, loop.time())) is not None:
            accepted.close()
            self._refusals.add(address, why, loop.time())
            return
        connection = _Connection(address, origin)
        unfinished = self._state.unfinished
        if len(unfinished) >= self._limits.handshakes:
            oldest = next(iter(unfinished))
            self._note(oldest, f"{self._limits.handshakes} unfinished handshakes")
            unfinished.pop(oldest).cancel()
        task = asyncio.create_task(self._shake_hands(accepted, connection))
        unfinished[connection] = task
        # A task that is cancelled before its first step runs none of its own code.
        task.add_done_callback(lambda _: self._handshake_over(accepted, connection))

    async def _shake_hands(self, accepted: socket.socket, connection: _Connection) -> None:
        assert self._http is not None
        connection.is_asyncios = True
        protocol = self._http()
        self._state.by_protocol[protocol] = connection
        try:
            accepted.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            await asyncio.get_running_loop().connect_accepted_socket(
                lambda: protocol,
                accepted,
                ssl=self._state.context,
                ssl_handshake_timeout=self._limits.handshake_s,
                ssl_shutdown_timeout=_SHUTDOWN_S,
            )
        except OSError as error:  # ssl.SSLError and TimeoutError among them
            self._note(connection, f"handshake: {_why(error)}")
        finally:
            if connection.transport is None:
                self._state.by_protocol.pop(protocol, None)

    def _handshake_over(self, accepted: socket.socket, connection: _Connection) -> None:
        self._state.unfinished.pop(connection, None)
        if not connection.is_asyncios:
            accepted.close()
        if connection.transport is None:
            self._gate.leave(connection.origin)

    def _stands(self, protocol: Any, transport: asyncio.Transport) -> None:
        """The handshake is done: the peer has shown a certificate that OpenSSL accepts."""
        connection = self._state.by_protocol[protocol]
        connection.transport = transport
        self._state.standing += 1
        self._start_timer(connection, self._limits.head_s)

    def _has_ended(self, protocol: Any) -> None:
        connection = self._state.by_protocol.pop(protocol, None)
        if connection is not None:
            connection.stop_timer()
            self._state.standing -= 1
            self._gate.leave(connection.origin)

    def _start_timer(self, connection: _Connection, after_s: float) -> None:
        def cut() -> None:
            self._note(connection, f"no whole request within {after_s:g} s")
            if connection.transport is not None:
                connection.transport.abort()

        connection.stop_timer()
        connection.timer = asyncio.get_running_loop().call_later(after_s, cut)

    def _note(self, connection: _Connection, reason: str, **more: str | None) -> None:
        now = asyncio.get_running_loop().time()
        self._refusals.add(connection.address, reason, now, **more)

    def _note_of_aiohttp(self, address: str, reason: str) -> None:
        self._refusals.add(address, reason, asyncio.get_running_loop().time())

    # Requests ----------------------------------------------------------------------------

    def _request(
        self, message: Any, payload: Any, protocol: Any, writer: Any, task: Any
    ) -> web.BaseRequest:
        loop = asyncio.get_running_loop()
        limit = self._limits.request_bytes
        return web.BaseRequest(
            message, payload, protocol, writer, task, loop, client_max_size=limit
        )

    async def _serve(self, request: web.BaseRequest) -> web.StreamResponse:
        connection = self._state.by_protocol.get(request.protocol)
        if connection is None:  # It was cut.
            raise ConnectionResetError
        connection.stop_timer()
        try:
            return await self._answer(request, connection)
        finally:
            if connection.transport is not None and not connection.transport.is_closing():
                self._start_timer(connection, self._limits.idle_s)

    async def _answer(
        self, request: web.BaseRequest, connection: _Connection
    ) -> web.StreamResponse:
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
        if self._state.standing > self._limits.connections:
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
        connection: _Connection,
        call: str | None,
        request: web.BaseRequest,
    ) -> web.StreamResponse:
        """Say why, and end the connection: what follows on it has nothing to say either."""
        cause = error.__cause__ if isinstance(error, Refused) else None
        told = cause.message if isinstance(cause, Fault) else error.message
        self._note(connection, told, call=call, peer=_subject_of(request))
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


def _why(error: OSError) -> str:
    if isinstance(error, ssl.SSLError):
        return error.reason or "TLS failed"
    if isinstance(error, TimeoutError):
        return "not finished in time"
    return error.strerror or str(error)
