"""Calls over whatever carries bytes to the other side and back, in a version that both speak."""

from typing import Protocol

from kvmsec.rpc import wire
from kvmsec.rpc.calls import CALLS, PROTOCOL, Call
from kvmsec.rpc.errors import WrongProtocol
from kvmsec.rpc.messages import Message


class Exchange(Protocol):
    """Carries a request's bytes to one other side, and the answer's back."""

    @property
    def node(self) -> str | None:
        """Who the other side is, for errors; None for the daemon of this host."""
        ...

    async def exchange(self, call: Call, protocol: int, body: bytes, deadline_s: float) -> bytes:
        """The envelope that a request is answered with (`kvmsec.rpc.wire`).

        Raises Unreachable, CallTimedOut after `deadline_s` seconds, Refused, BadMessage.
        """
        ...


class ExchangeTransport:
    """`kvmsec.rpc.transport.Transport` over an exchange.

    The first call is made in our newest version; a node that doesn't speak it says which it does,
    has done nothing then, and is asked again in the newest that both have.
    """

    def __init__(self, exchange: Exchange) -> None:
        self._exchange = exchange
        self._protocol = PROTOCOL

    async def call(self, name: str, request: Message) -> Message:
        try:
            return await self._call(CALLS[name], request, self._protocol)
        except WrongProtocol as error:
            theirs = _protocols_in(error)
            if theirs is None:
                raise
            common = wire.newest_common(theirs, self._exchange.node)
            if common == self._protocol:
                raise
            self._protocol = common
        return await self._call(CALLS[name], request, self._protocol)

    async def _call(self, call: Call, request: Message, protocol: int) -> Message:
        node = self._exchange.node
        wire.require_call(call, protocol, node)
        body = wire.encode_request(request, protocol, node=node)
        answer = await self._exchange.exchange(call, protocol, body, call.deadline_s(request))
        return wire.decode_answer(call, answer, node=node)


def _protocols_in(error: WrongProtocol) -> tuple[int, int] | None:
    match error.evidence.get("protocols"):
        case [int() as oldest, int() as newest]:
            return oldest, newest
        case _:
            return None
