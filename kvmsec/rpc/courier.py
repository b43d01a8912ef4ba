"""Makes calls to other nodes for those who must not parse what a node sends.

It runs in a process of its own, takes requests in frames whose `target` names the node, speaks TLS
to that node and hands back what it answered once that has been decoded and encoded anew.
"""

import ssl
from collections.abc import Callable
from typing import Final

from kvmsec.linux.errors import Fault
from kvmsec.pki.standing import Trust
from kvmsec.rpc import wire
from kvmsec.rpc.client import HttpsTransport, Patience
from kvmsec.rpc.errors import BadMessage
from kvmsec.rpc.frames import Request, Target

_MOST_KEPT: Final = 1024
"""Nodes to which connections may be kept: more than a cluster has."""


class Courier:
    """Carries calls; `context`, `trust` and `server_name` give what holds at the time of each.

    `server_name` is what a node is asked for (SNI), empty for nothing.
    """

    def __init__(
        self,
        context: Callable[[], ssl.SSLContext],
        trust: Callable[[], Trust | None],
        *,
        server_name: Callable[[], str] = lambda: "",
        patience: Patience | None = None,
    ) -> None:
        self._context = context
        self._trust = trust
        self._server_name = server_name
        self._patience = patience
        self._ways: dict[Target, HttpsTransport] = {}

    async def carry(self, request: Request) -> bytes:
        """Answer a frame (`kvmsec.rpc.frames.Handler`): with the node's answer, or a fault."""
        try:
            return await self.answer(request)
        except Fault as error:
            return wire.encode_fault(error)

    async def answer(self, request: Request) -> bytes:
        """As `carry`, but a fault is raised: one that is `Refused` says that nothing was done."""
        if request.target is None:
            raise BadMessage(None, "a call without a node to make it to")
        call = wire.find_call(request.call, request.protocol)
        message = wire.decode_request(call, request.body)
        way = await self._way_to(request.target)
        return wire.encode_answer(await way.call(call.name, message), request.protocol)

    async def close(self) -> None:
        """End all connections."""
        for way in self._ways.values():
            await way.close()
        self._ways.clear()

    async def _way_to(self, target: Target) -> HttpsTransport:
        way = self._ways.pop(target, None)
        if way is None:
            way = HttpsTransport(
                target.address,
                target.port,
                target.name,
                target.uuid,
                self._context,
                self._trust,
                server_name=self._server_name,
                patience=self._patience,
            )
        self._ways[target] = way  # The last in the order of dict: the first is asked least.
        if len(self._ways) > _MOST_KEPT:
            await self._ways.pop(next(iter(self._ways))).close()
        return way
