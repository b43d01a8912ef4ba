"""HTTPS to one node: connections that are kept, a peer that is judged before it is told anything.

HTTP/1.1 is spoken by hand and in its narrowest form: an answer has a status line, a head of a few
KiB, a Content-Length and that many bytes. There is no redirect, cookie, proxy, chunk or coding to
be led astray by, and it costs a third of the time that a whole client does.
"""

import asyncio
import re
import socket
import ssl
import time
from collections import deque
from collections.abc import Callable
from datetime import UTC, datetime
from typing import Final
from uuid import UUID

from attrs import define, frozen

from kvmsec.linux.errors import Fault
from kvmsec.pki.errors import PeerRefused
from kvmsec.pki.judgement import require_node
from kvmsec.pki.standing import Peer, Trust
from kvmsec.rpc import wire
from kvmsec.rpc.authorization import Judgements, refusal
from kvmsec.rpc.calls import Call
from kvmsec.rpc.errors import BadMessage, CallTimedOut, Refused, Unreachable
from kvmsec.rpc.exchange import ExchangeTransport

_HEAD_BYTES: Final = 8192
_STATUS: Final = re.compile(rb"HTTP/1\.1 ([2-5][0-9]{2})(?: [ -~]*)?")
_LENGTH: Final = re.compile(r"[0-9]{1,9}")
_FIRST_PAUSE_S: Final = 0.05
_LONGEST_PAUSE_S: Final = 0.3
_IS_IT_UP: Final = "is the node up, and does its kvmsec daemon run?"
_AN_ORDER: Final = "the order may have been carried out: look before it is repeated"


@frozen(kw_only=True)
class Patience:
    """How long a node is waited for, and how much is kept for it; times in seconds."""

    connect_s: float = 3.0
    handshake_s: float = 5.0
    kept_s: float = 15.0
    """An idle connection is not used after that: well below what a server keeps one
    (`kvmsec.rpc.gate.Limits.idle_s`), so that no order is sent into one that is being closed."""
    kept: int = 4
    connections: int = 8
    """Below what a server takes from one address; a call more waits for its turn."""


@define(eq=False)
class _Kept:
    reader: asyncio.StreamReader
    writer: asyncio.StreamWriter
    context: ssl.SSLContext
    used_at: float

    @property
    def certificate(self) -> bytes:
        tls = self.writer.get_extra_info("ssl_object")
        return (tls.getpeercert(binary_form=True) if tls is not None else None) or b""

    def is_fit(self, context: ssl.SSLContext, kept_s: float) -> bool:
        """Whether a request may be sent into it."""
        is_quiet = not self.reader.at_eof() and not self.writer.is_closing()
        is_young = time.monotonic() - self.used_at < kept_s
        return is_quiet and is_young and self.context is context

    def drop(self) -> None:
        # Not `close`: nobody waits for a peer's goodbye.
        self.writer.transport.abort()


class HttpsExchange:
    """One node's calls (`kvmsec.rpc.exchange.Exchange`).

    `context` and `trust` give what holds at the time of each request; another context makes the
    connections of the one before useless, and a `trust` of None (this node belongs to no cluster,
    or calls one that doesn't yet) leaves the judgement to the context's anchors alone.
    `server_name` gives what the node is asked for (SNI, RFC 6066 3), empty for nothing: it chooses
    which certificate is shown, and who the peer is is judged by the certificate all the same.
    """

    def __init__(
        self,
        address: str,
        port: int,
        name: str,
        uuid: UUID,
        context: Callable[[], ssl.SSLContext],
        trust: Callable[[], Trust | None],
        *,
        server_name: Callable[[], str] = lambda: "",
        patience: Patience | None = None,
    ) -> None:
        self._address = address
        self._port = port
        self._name = name
        self._uuid = uuid
        self._context = context
        self._trust = trust
        self._server_name = server_name
        self._patience = patience or Patience()
        self._turns = asyncio.Semaphore(self._patience.connections)
        self._idle: deque[_Kept] = deque()
        self._judgements = Judgements()

    @property
    def node(self) -> str:
        return self._name

    async def exchange(self, call: Call, protocol: int, body: bytes, deadline_s: float) -> bytes:
        sent = False

        async def within() -> bytes:
            nonlocal sent
            async with self._turns:
                connection = self._take() or await self._connect()
                try:
                    self._judge(connection)
                    sent = True
                    answer, is_kept = await self._talk(connection, call, protocol, body)
                except BaseException:
                    connection.drop()
                    raise
                self._give_back(connection, is_kept)
                return answer

        try:
            async with asyncio.timeout(deadline_s):
                return await within()
        except TimeoutError:
            raise CallTimedOut(
                self._name,
                f"{call.name} was not answered within {deadline_s:g} s",
                hint=_AN_ORDER if call.is_order and sent else None,
            ) from None
        except ssl.SSLError as error:
            raise self._refused_by_tls(error) from error
        except (OSError, asyncio.IncompleteReadError) as error:
            raise Unreachable(
                self._name,
                f"the connection broke before {call.name} was answered: {_why(error)}",
                hint=_AN_ORDER if call.is_order and sent else None,
            ) from error

    async def close(self) -> None:
        """End the connections that are kept."""
        while self._idle:
            self._idle.popleft().drop()

    # Connections -------------------------------------------------------------------------

    def _take(self) -> _Kept | None:
        context = self._context()
        while self._idle:
            connection = self._idle.pop()
            if connection.is_fit(context, self._patience.kept_s):
                return connection
            connection.drop()
        return None

    def _give_back(self, connection: _Kept, is_kept: bool) -> None:
        if not is_kept or len(self._idle) >= self._patience.kept:
            connection.drop()
            return
        connection.used_at = time.monotonic()
        self._idle.append(connection)

    async def _connect(self) -> _Kept:
        """A new connection on which both sides trust each other, so that a request may be sent.

        TLS 1.3 has ended for a client before the server has looked at its certificate, and a
        server that refuses it just goes. Asked for a sign of life first, it has heard no order by
        then, so that this can be told from one that died over an order.
        """
        for _ in range(2):  # Once may have been a node that is going down.
            connection = await self._shake_hands_at_last()
            try:
                self._judge(connection)
                if await self._is_let_in(connection):
                    return connection
            except BaseException:
                connection.drop()
                raise
            connection.drop()
        raise Refused(
            self._name,
            "it ends each connection after the handshake, as a node does that does not trust the "
            "caller's certificate",
            hint="compare server.pem on both nodes with `kvmsec cluster verify`; the log of the "
            "node's daemon says why",
            evidence={"step": "chain"},
        )

    async def _is_let_in(self, connection: _Kept) -> bool:
        connection.writer.write(b"GET /rpc HTTP/1.1\r\nHost: kvmsec\r\n\r\n")
        try:
            async with asyncio.timeout(self._patience.handshake_s):
                head = await self._head(connection.reader)
                length, is_kept = self._parse(head, _HEAD_BYTES)
                answer = await connection.reader.readexactly(length)
        except TimeoutError:
            raise Unreachable(
                self._name,
                f"it said nothing within {self._patience.handshake_s:g} s after the handshake",
                hint="does its kvmsec daemon hang?",
            ) from None
        except (OSError, asyncio.IncompleteReadError):
            return False
        wire.require_no_fault(answer, node=self._name)
        return is_kept

    async def _shake_hands_at_last(self) -> _Kept:
        """A node under a flood drops handshakes: until then nothing was asked, so try again."""
        give_up_at = time.monotonic() + self._patience.handshake_s
        pause_s = _FIRST_PAUSE_S
        while True:
            try:
                return await self._shake_hands()
            except Unreachable as error:
                was_dropped = isinstance(error.__cause__, ConnectionResetError)
                if not was_dropped or time.monotonic() + pause_s > give_up_at:
                    raise
            await asyncio.sleep(pause_s)
            pause_s = min(2 * pause_s, _LONGEST_PAUSE_S)

    async def _shake_hands(self) -> _Kept:
        context, patience = self._context(), self._patience
        where = f"{self._address} port {self._port}"
        try:
            async with asyncio.timeout(patience.connect_s):
                connected = await _open(self._address, self._port)
        except OSError as error:  # TimeoutError among them
            raise Unreachable(
                self._name, f"{where} can't be reached: {_why(error)}", hint=_IS_IT_UP
            ) from error
        try:
            reader, writer = await asyncio.open_connection(
                sock=connected,
                ssl=context,
                server_hostname=self._server_name(),
                ssl_handshake_timeout=patience.handshake_s,
                limit=_HEAD_BYTES,
            )
        except ssl.SSLError as error:
            raise self._refused_by_tls(error) from error
        except OSError as error:
            raise Unreachable(
                self._name, f"{where} does not speak TLS with us: {_why(error)}", hint=_IS_IT_UP
            ) from error
        return _Kept(reader, writer, context, time.monotonic())

    def _judge(self, connection: _Kept) -> None:
        """Raises Refused for a peer that is not the node that was meant, before it hears a word."""
        trust = self._trust()
        if trust is None:
            return
        der, now = connection.certificate, datetime.now(UTC)

        def judge() -> Peer:
            return require_node(der, trust, name=self._name, uuid=self._uuid, now=now)

        try:
            self._judgements.of(der, trust, now, judge)
        except PeerRefused as error:
            raise refusal(error, self._name) from error

    def _refused_by_tls(self, error: ssl.SSLError) -> Fault:
        """TLS 1.3 tells a client only after its handshake that its certificate was refused."""
        reason = (error.reason or "").replace("_", " ").lower()
        if not isinstance(error, ssl.SSLCertVerificationError) and "alert" not in reason:
            return Unreachable(self._name, f"TLS failed: {reason or error}")
        who = "this node does not trust it" if "verify" in reason else "it does not trust this node"
        return Refused(
            self._name,
            f"{who} ({getattr(error, 'verify_message', '') or reason})",
            hint="compare server.pem on both nodes with `kvmsec cluster verify`",
            evidence={"step": "chain"},
        )

    # HTTP --------------------------------------------------------------------------------

    async def _talk(
        self, connection: _Kept, call: Call, protocol: int, body: bytes
    ) -> tuple[bytes, bool]:
        """Send a request; returns the answer's body and whether the connection may be kept."""
        head = (
            f"POST /rpc/{protocol}/{call.name} HTTP/1.1\r\nHost: kvmsec\r\n"
            f"Content-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
        )
        # At once, not drained: an answer may come, and must be read, before all of it is sent.
        connection.writer.write(head.encode() + body)
        said = await self._head(connection.reader)
        length, is_kept = self._parse(said, call.answer_limit_bytes)
        return await connection.reader.readexactly(length), is_kept

    async def _head(self, reader: asyncio.StreamReader) -> bytes:
        try:
            return await reader.readuntil(b"\r\n\r\n")
        except asyncio.LimitOverrunError:
            raise BadMessage(
                self._name, f"its answer's head is longer than {_HEAD_BYTES} bytes"
            ) from None

    def _parse(self, head: bytes, limit_bytes: int) -> tuple[int, bool]:
        """The length of the body and whether the connection goes on."""
        line, *lines = head[:-4].split(b"\r\n")
        status = _STATUS.fullmatch(line)
        fields: dict[str, str] = {}
        for each in lines:
            name, colon, value = each.decode("latin-1").partition(":")
            if not colon or name.lower() in fields:
                raise BadMessage(self._name, "its answer is no HTTP that is understood here")
            fields[name.lower()] = value.strip()
        if status is None or "transfer-encoding" in fields or "content-encoding" in fields:
            raise BadMessage(self._name, "its answer is no HTTP that is understood here")
        length = _LENGTH.fullmatch(fields.get("content-length", ""))
        if length is None:
            raise BadMessage(self._name, "its answer has no length")
        if int(length[0]) > limit_bytes:
            raise BadMessage(
                self._name,
                f"its answer has {length[0]} bytes, and at most {limit_bytes} are taken",
            )
        return int(length[0]), fields.get("connection", "").lower() != "close"


class HttpsTransport(ExchangeTransport):
    """`kvmsec.rpc.transport.Transport` to a node over HTTPS; see `HttpsExchange`."""

    def __init__(
        self,
        address: str,
        port: int,
        name: str,
        uuid: UUID,
        context: Callable[[], ssl.SSLContext],
        trust: Callable[[], Trust | None],
        *,
        server_name: Callable[[], str] = lambda: "",
        patience: Patience | None = None,
    ) -> None:
        self._https = HttpsExchange(
            *(address, port, name, uuid, context, trust),
            server_name=server_name,
            patience=patience,
        )
        super().__init__(self._https)

    async def close(self) -> None:
        """End the connections that are kept."""
        await self._https.close()


async def _open(address: str, port: int) -> socket.socket:
    """A connected socket. Raises OSError of the last address that a name has."""
    loop = asyncio.get_running_loop()
    try:
        # A number needs no resolver, whose thread nobody wants in a process that may fork.
        numeric = socket.AI_NUMERICHOST | socket.AI_NUMERICSERV
        found = socket.getaddrinfo(address, port, type=socket.SOCK_STREAM, flags=numeric)
    except socket.gaierror:
        found = await loop.getaddrinfo(address, port, type=socket.SOCK_STREAM)
    failure = OSError(f"{address!a} has no address")
    for family, kind, protocol, _, where in found:
        made = socket.socket(family, kind | socket.SOCK_NONBLOCK, protocol)
        try:
            made.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            await loop.sock_connect(made, where)
        except OSError as error:
            made.close()
            failure = error
        except BaseException:
            made.close()
            raise
        else:
            return made
    raise failure


def _why(error: OSError | asyncio.IncompleteReadError) -> str:
    if isinstance(error, asyncio.IncompleteReadError):
        return "it ended"
    if isinstance(error, TimeoutError):
        return "no answer in time"
    return error.strerror or str(error) or type(error).__name__
