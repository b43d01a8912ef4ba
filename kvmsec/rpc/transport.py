"""The way to one node, whatever it leads over."""

from typing import Protocol

from kvmsec.rpc.messages import Message


class Transport(Protocol):
    """Makes calls to one node."""

    async def call(self, name: str, request: Message) -> Message:
        """Make the call of this name; returns its response's message.

        Raises what the node answered (`kvmsec.rpc.errors.RemoteFault`), and its subclasses:
        Unreachable, CallTimedOut after the call's own deadline (`kvmsec.rpc.calls`), Refused,
        WrongProtocol, BadMessage. A call that failed is not repeated: an order of which no answer
        came may have been carried out.
        """
        ...
