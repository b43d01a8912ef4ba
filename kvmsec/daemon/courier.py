"""Calling other nodes: by a confined child that speaks TLS, and never from root's process."""

import asyncio
import contextlib
import ipaddress
import socket
from types import TracebackType
from typing import Final, Self
from uuid import UUID

from kvmsec.daemon.confined_child import ConfinedChild, Start, start_confined
from kvmsec.daemon.front_messages import PEER, TRUST, PeerMessage, TrustMessage
from kvmsec.linux.children import start_child
from kvmsec.linux.errors import ChildFailed, ChildTimedOut
from kvmsec.node.waiting import collect
from kvmsec.rpc import messages as m
from kvmsec.rpc import wire
from kvmsec.rpc.calls import PROTOCOL, Call
from kvmsec.rpc.errors import Unreachable
from kvmsec.rpc.exchange import ExchangeTransport
from kvmsec.rpc.frames import FrameConnection, FrameExchange, Target
from kvmsec.rpc.transport import Transport

_RESOLVE_S: Final = 5.0
_AT_ONCE: Final = 200
"""Calls under way; more wait their turn. Below what a connection of frames takes."""


class Courier:
    """A courier and the ways through it; an asynchronous context manager.

    `message` is what to call with and whom to trust (`TrustSource.message`), or the temporary pair
    and anchor of a join. For a process with one thread. Entering raises ConfinementFailed,
    ManyThreads, BadPem for what can't be called with (as a RemoteFault), and OSError.
    """

    def __init__(self, start: Start, message: TrustMessage) -> None:
        self._start = start
        self._message = message
        self._child: ConfinedChild | None = None
        self._connection: FrameConnection | None = None
        self._turns = asyncio.Semaphore(_AT_ONCE)

    async def __aenter__(self) -> Self:
        self._child = start_confined(self._start, ())
        try:
            await self._child.ready()
            self._connection = FrameConnection(*await self._child.streams(), name="the courier")
            await self.tell(self._message)
        except BaseException:
            await self._end()
            raise
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        await self._end()

    async def _end(self) -> None:
        if self._child is not None:
            self._child.end()
            self._child = None
        if self._connection is not None:
            connection, self._connection = self._connection, None
            with contextlib.suppress(OSError):
                await connection.close()

    @property
    def pid(self) -> int | None:
        """The courier's pid, while there is one."""
        return None if self._child is None else self._child.pid

    @property
    def is_gone(self) -> bool:
        """Whether it has ended: every call fails from then on."""
        return self._connection is None or not self._connection.is_open

    async def tell(self, message: TrustMessage) -> None:
        """Call with this, and trust nobody else, from now on. Raises RemoteFault."""
        body = wire.encode_request(message, PROTOCOL)
        wire.decode_answer(TRUST, await self._open.ask(TRUST, PROTOCOL, body, TRUST.timeout_s))

    def transport(self, *, name: str, uuid: UUID, address: str, port: int) -> Transport:
        """The way to one node; nothing is asked of it yet.

        `address` may be a host name: it is looked up in another child, at the first call.
        """
        return ExchangeTransport(_Way(self._open, self._turns, name, uuid, address, port))

    async def peer_fingerprint(self, *, name: str, uuid: UUID, address: str, port: int) -> str:
        """The fingerprint of the certificate that a node shows. Raises Unreachable."""
        target = Target(name=name, uuid=uuid, address=await resolve(name, address), port=port)
        body = wire.encode_request(m.Nothing(), PROTOCOL)
        answer = await self._open.ask(PEER, PROTOCOL, body, PEER.timeout_s, target=target)
        told = wire.decode_answer(PEER, answer)
        assert isinstance(told, PeerMessage)
        return told.fingerprint

    @property
    def _open(self) -> FrameConnection:
        if self._connection is None:
            raise RuntimeError("the courier is used outside of its context")
        return self._connection


class _Way:
    """`kvmsec.rpc.exchange.Exchange` to one node, by number from the first call on."""

    def __init__(
        self,
        connection: FrameConnection,
        turns: asyncio.Semaphore,
        name: str,
        uuid: UUID,
        address: str,
        port: int,
    ) -> None:
        self._connection = connection
        self._turns = turns
        self._name = name
        self._uuid = uuid
        self._address = address
        self._port = port
        self._found: FrameExchange | None = None

    @property
    def node(self) -> str | None:
        return None  # The fault of a node that a courier asked has its name already.

    async def exchange(self, call: Call, protocol: int, body: bytes, deadline_s: float) -> bytes:
        if self._found is None:
            address = await resolve(self._name, self._address)
            target = Target(name=self._name, uuid=self._uuid, address=address, port=self._port)
            self._found = FrameExchange(self._connection, target)
        async with self._turns:
            return await self._found.exchange(call, protocol, body, deadline_s)


async def resolve(node: str, address: str) -> str:
    """The number of a node's address; a name is looked up by a child that can do nothing else.

    Raises Unreachable.
    """
    with contextlib.suppress(ValueError):
        ipaddress.ip_address(address.partition("%")[0])
        return address

    def look_up() -> str:
        found = socket.getaddrinfo(address, None, type=socket.SOCK_STREAM)
        return str(found[0][4][0])

    child = start_child(look_up, what=f"looking {address} up")
    try:
        return str(await collect(child, _RESOLVE_S))
    except (ChildFailed, ChildTimedOut) as error:
        raise Unreachable(
            node,
            f"its address {address} has no number: {error.message}",
            hint="name it in DNS or /etc/hosts, or give the node's number as its address",
        ) from error
