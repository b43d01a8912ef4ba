"""The connections of a server: which come in, which have to go, and when.

They are taken by ourselves and not by `loop.create_server`, so that one can be refused before
anything is made for it, and so that each new one takes the context that holds then.
"""

import asyncio
import gc
import itertools
import logging
import socket
import ssl
from collections.abc import Awaitable, Callable, Sequence
from typing import Any, Final

from aiohttp import web
from attrs import define

from kvmsec.rpc.gate import Gate, Limits, origin_of
from kvmsec.rpc.hellos import wait_for_hello
from kvmsec.rpc.refusals import Refusals

Serve = Callable[[web.BaseRequest], Awaitable[web.StreamResponse]]

_SHUTDOWN_S: Final = 2.0
"""How long a peer may take to say goodbye (close_notify) before its connection is cut."""
_LINGERING_S: Final = 1.0
"""How long the rest of what was refused is read, so that the refusal arrives before a reset."""
_ACCEPT_PAUSE_S: Final = 0.2
_LOOKED_AT: Final = 16
"""Of those that may have to give way: one look costs a microsecond."""
_STEPS_TO_BEGIN: Final = 4
"""Turns of the loop from `connect_accepted_socket` to the handshake's first step."""
_FAILED_TO_COLLECT: Final = 32
"""Handshakes that failed: what asyncio made for one refers to itself, and its 256 KiB stay until
they are collected; Python, which counts objects and not bytes, would see to it far too late."""
_MOST_KNOWN: Final = 2048
_TO_BE_TOLD: Final = 16
"""Connections over the limit that stand for as long as it takes to say so."""


@define(eq=False)
class Connection:
    """A connection from its acceptance on, with the time at which it must have got on."""

    accepted: socket.socket
    address: str
    origin: str
    is_asyncios: bool = False
    """Whether asyncio has the socket, and closes it."""
    timer: asyncio.TimerHandle | None = None
    transport: asyncio.Transport | None = None
    """Once the handshake is done."""

    def has_unread(self) -> bool:
        """Whether something has come of which nobody has taken notice yet."""
        try:
            return bool(self.accepted.recv(1, socket.MSG_PEEK | socket.MSG_DONTWAIT))
        except OSError:
            return False

    def stop_timer(self) -> None:
        if self.timer is not None:
            self.timer.cancel()
            self.timer = None


class _Http(web.Server):
    """aiohttp's server, which also tells us when a connection stands and when it has ended."""

    def __init__(self, owner: "Connections", serve: Serve, **settings: Any) -> None:
        super().__init__(serve, **settings)
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


class Connections:
    """Takes connections on listening sockets, and has aiohttp serve those that stand."""

    def __init__(self, context: ssl.SSLContext, limits: Limits, refusals: Refusals) -> None:
        self.context = context
        """What each new connection takes."""
        self._limits = limits
        self._refusals = refusals
        self._gate = Gate(limits)
        self._accepting: list[asyncio.Task[None]] = []
        self._http: _Http | None = None
        # Both in the order in which they came to be there.
        self._silent: dict[Connection, asyncio.Task[None]] = {}
        self._shaking: dict[Connection, asyncio.Task[None]] = {}
        self._by_protocol: dict[Any, Connection] = {}
        self._standing = 0
        self._failed = 0
        # One begins after the other: asyncio can't end a handshake that is only about to begin.
        self._beginning = asyncio.Lock()
        # Of the strangers one at a time waits for that: whoever is known is the next but one.
        self._strangers = asyncio.Lock()
        # From where a peer has come that had a certificate; the one seen least lately comes first.
        self._known: dict[str, None] = {}

    def open(self, listeners: Sequence[socket.socket], serve: Serve) -> None:
        """Take connections from now on."""
        limits = self._limits
        logger = logging.Logger("kvmsec.rpc")
        logger.addHandler(_Log(self._note_of_aiohttp))
        self._http = _Http(
            self,
            serve,
            logger=logger,
            request_factory=self._request,
            access_log=None,
            auto_decompress=False,
            keepalive_timeout=limits.idle_s,
            lingering_time=_LINGERING_S,
            max_line_size=limits.line_bytes,
            max_field_size=limits.line_bytes,
        )
        for listener in listeners:
            listener.setblocking(False)
            self._accepting.append(asyncio.create_task(self._accept(listener)))

    async def close(self, grace_s: float) -> None:
        """Take no more and end those there are; a call under way has `grace_s` seconds."""
        tasks = [*self._accepting, *self._silent.values(), *self._shaking.values()]
        self._accepting.clear()
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        if self._http is not None:
            self._http.pre_shutdown()
            await self._http.shutdown(grace_s)
            self._http = None
        for connection in self._by_protocol.values():
            connection.stop_timer()

    @property
    def standing(self) -> int:
        """How many have done their handshake."""
        return self._standing

    def of(self, request: web.BaseRequest) -> Connection | None:
        """The connection of a request; None once it has ended."""
        return self._by_protocol.get(request.protocol)

    def start_timer(self, connection: Connection, after_s: float) -> None:
        """Cut the connection unless a whole head has come within `after_s` seconds."""

        def cut() -> None:
            self.note(connection, f"no whole request within {after_s:g} s")
            if connection.transport is not None:
                connection.transport.abort()

        connection.stop_timer()
        connection.timer = asyncio.get_running_loop().call_later(after_s, cut)

    def note(self, connection: Connection, reason: str, **more: str | None) -> None:
        """Tell of a refusal; `more` is what `Refusals.add` takes."""
        now = asyncio.get_running_loop().time()
        self._refusals.add(connection.address, reason, now, **more)

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
            # As long as more wait, `sock_accept` gives nobody else a turn: a flood of new ones
            # would hold up all that has come in.
            await asyncio.sleep(0)

    def _admit(self, accepted: socket.socket, address: str) -> None:
        loop, origin = asyncio.get_running_loop(), origin_of(address)
        if (why := self._gate.why_not(origin, loop.time())) is not None:
            accepted.close()
            self._refusals.add(address, why, loop.time())
            return
        connection = Connection(accepted, address, origin)
        self._make_room(self._silent, self._limits.silent, "silent connections")
        task = asyncio.create_task(self._welcome(connection))
        self._silent[connection] = task
        # A task that is cancelled before its first step runs none of its own code.
        task.add_done_callback(lambda _: self._welcome_over(connection))

    def _make_room(
        self, begun: "dict[Connection, asyncio.Task[None]]", most: int, what: str
    ) -> None:
        if len(begun) < most:
            return
        strangers = (one for one in begun if one.origin not in self._known)
        oldest = list(itertools.islice(strangers, _LOOKED_AT)) or [next(iter(begun))]
        # Whose next words lie there already is kept waiting by us, not by its peer.
        chosen = next((one for one in oldest if not one.has_unread()), oldest[0])
        self.note(chosen, f"more than {most} {what}")
        begun.pop(chosen).cancel()

    async def _welcome(self, connection: Connection) -> None:
        try:
            connection.accepted.setblocking(False)
            async with asyncio.timeout(self._limits.handshake_s):
                await wait_for_hello(connection.accepted)
            if connection.origin in self._known:
                shaking = await self._begin(connection)
            else:
                async with self._strangers:
                    shaking = await self._begin(connection)
            await shaking
        except OSError as error:  # ssl.SSLError and TimeoutError among them
            self.note(connection, f"handshake: {_why(error)}")

    async def _begin(self, connection: Connection) -> "asyncio.Task[None]":
        """Begin a handshake, and return once it has begun."""
        async with self._beginning:
            task = self._silent.pop(connection)
            self._make_room(self._shaking, self._limits.handshakes, "unfinished handshakes")
            self._shaking[connection] = task
            shaking = asyncio.create_task(self._shake_hands(connection))
            try:
                for _ in range(_STEPS_TO_BEGIN):
                    await asyncio.sleep(0)
            except BaseException:
                shaking.cancel()
                raise
            return shaking

    async def _shake_hands(self, connection: Connection) -> None:
        assert self._http is not None
        connection.is_asyncios = True
        protocol = self._http()
        self._by_protocol[protocol] = connection
        try:
            connection.accepted.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            await asyncio.get_running_loop().connect_accepted_socket(
                lambda: protocol,
                connection.accepted,
                ssl=self.context,
                ssl_handshake_timeout=self._limits.handshake_s,
                ssl_shutdown_timeout=_SHUTDOWN_S,
            )
        finally:
            if connection.transport is None:
                self._by_protocol.pop(protocol, None)

    def _welcome_over(self, connection: Connection) -> None:
        self._silent.pop(connection, None)
        self._shaking.pop(connection, None)
        if not connection.is_asyncios:
            connection.accepted.close()
        if connection.transport is None:
            self._gate.leave(connection.origin)
        if connection.transport is None and connection.is_asyncios:
            self._failed += 1
            if self._failed % _FAILED_TO_COLLECT == 0:
                gc.collect()

    def _stands(self, protocol: Any, transport: asyncio.Transport) -> None:
        """The handshake is done: the peer has shown a certificate that OpenSSL accepts."""
        connection = self._by_protocol.get(protocol)
        if connection is None:  # It had to give way at this very moment.
            transport.abort()
            return
        connection.transport = transport
        self._known.pop(connection.origin, None)
        self._known[connection.origin] = None
        if len(self._known) > _MOST_KNOWN:
            del self._known[next(iter(self._known))]
        self._standing += 1
        self.start_timer(connection, self._limits.head_s)
        if self._standing > self._limits.connections + _TO_BE_TOLD:
            self.note(connection, f"{self._limits.connections} connections")
            transport.abort()

    def _has_ended(self, protocol: Any) -> None:
        connection = self._by_protocol.pop(protocol, None)
        if connection is not None:
            connection.stop_timer()
            self._standing -= 1
            self._gate.leave(connection.origin)

    def _note_of_aiohttp(self, address: str, reason: str) -> None:
        self._refusals.add(address, reason, asyncio.get_running_loop().time())

    def _request(
        self, message: Any, payload: Any, protocol: Any, writer: Any, task: Any
    ) -> web.BaseRequest:
        loop = asyncio.get_running_loop()
        limit = self._limits.request_bytes
        return web.BaseRequest(
            message, payload, protocol, writer, task, loop, client_max_size=limit
        )


def _why(error: OSError) -> str:
    if isinstance(error, ssl.SSLError):
        return error.reason or "TLS failed"
    if isinstance(error, TimeoutError):
        return "not finished in time"
    return error.strerror or str(error)
