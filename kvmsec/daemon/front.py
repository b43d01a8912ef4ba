"""The front: the process that hears the network, and can do nothing but ask its root part.

A program of its own (`kvmsec.daemon.confined_child`). Everything that it will ever import is
imported by `main` and what that names, before it is shut in.
"""

import asyncio
import os
import sys
from collections.abc import Sequence
from socket import socket
from typing import TYPE_CHECKING, Final

from kvmsec.daemon.front_messages import (
    REFUSED,
    STOP,
    TRUST,
    RefusalMessage,
    TrustMessage,
)
from kvmsec.linux.errors import Fault
from kvmsec.pki.standing import Trust
from kvmsec.rpc import messages as m
from kvmsec.rpc import wire
from kvmsec.rpc.calls import PROTOCOL, Call
from kvmsec.rpc.errors import BadMessage
from kvmsec.rpc.frames import FrameConnection, Request, serve_frames
from kvmsec.rpc.wire import Caller

if TYPE_CHECKING:
    from kvmsec.rpc.refusals import Refusal
    from kvmsec.rpc.server import Server

_STOP_S: Final = 5.0


def main() -> None:
    """The front's whole life. Its command line is `Start.encode`'s."""
    from kvmsec.daemon.confined_life import import_all, shut_in
    from kvmsec.daemon.system_calls import front_rules

    import_all("kvmsec.rpc.server")
    control, calls, *listeners = shut_in(front_rules())
    asyncio.run(_live(control, calls, listeners))
    sys.stderr.flush()
    os._exit(0)  # What the interpreter would tidy up is gone from its tree.


async def _live(control: socket, calls: socket, listeners: Sequence[socket]) -> None:
    reader, writer = await asyncio.open_connection(sock=control)
    upwards = await asyncio.open_connection(sock=calls)
    async with FrameConnection(*upwards, name="the node's root part") as root_part:
        front = _Front(root_part, listeners)
        try:
            await serve_frames(reader, writer, front.told)
        finally:
            await front.stop()


class _Front:
    """Serves with what it was told last."""

    def __init__(self, root_part: FrameConnection, listeners: Sequence[socket]) -> None:
        self._root_part = root_part
        self._listeners = listeners
        self._server: Server | None = None
        self._trust: Trust | None = None
        self._telling: set[asyncio.Task[None]] = set()

    async def told(self, request: Request) -> bytes:
        """Answer what the root part says on the control socket; raises nothing."""
        try:
            match request.call:
                case TRUST.name:
                    await self._take(wire.decode_request(TRUST, request.body))
                case STOP.name:
                    await self.stop()
                case other:
                    raise BadMessage(None, f"the front knows nothing of {other}")
            return wire.encode_answer(m.Nothing(), PROTOCOL)
        except Fault as error:
            return wire.encode_fault(error)

    async def _take(self, told: m.Message) -> None:
        """Serve with this from now on, and trust nobody else: at once, for those connected too."""
        assert isinstance(told, TrustMessage)
        from kvmsec.daemon.told import trust_of
        from kvmsec.pki.certificates import CERTLESS_SERVER_NAME
        from kvmsec.pki.contexts import server_context
        from kvmsec.pki.pems import Pair
        from kvmsec.rpc.server import Server

        by_name = {}
        if told.common is not None:
            by_name[CERTLESS_SERVER_NAME] = Pair.parse(told.common, "the common pair")
        own = Pair.parse(told.pair, "this node's pair")
        context = server_context(own, told.anchors, by_name)
        self._trust = trust_of(told)
        if self._server is not None:
            self._server.use(context)
            return
        self._server = Server(
            self._listeners, context, self._pass_on, lambda: self._trust, tell=self._tell
        )
        await self._server.__aenter__()

    async def stop(self) -> None:
        """Take no more calls, and give those under way a moment."""
        if self._server is not None:
            server, self._server = self._server, None
            await server.close(grace_s=_STOP_S)

    async def _pass_on(self, caller: Caller, call: Call, protocol: int, body: bytes) -> bytes:
        # Decoded here as well: what the root part gets has been through the bounds once.
        request = wire.decode_request(call, body)
        deadline_s = call.deadline_s(request)
        return await self._root_part.ask(call, protocol, body, deadline_s, caller=caller)

    def _tell(self, refusal: "Refusal") -> None:
        task = asyncio.create_task(self._tell_root_part(refusal))
        self._telling.add(task)
        task.add_done_callback(self._telling.discard)

    async def _tell_root_part(self, refusal: "Refusal") -> None:
        message = RefusalMessage(
            address=refusal.address[:256],
            reason=refusal.reason,
            peer=refusal.peer,
            call=refusal.call,
            more=refusal.more,
        )
        try:
            body = wire.encode_request(message, PROTOCOL)
            await self._root_part.ask(REFUSED, PROTOCOL, body, REFUSED.timeout_s)
        except Fault as error:
            sys.stderr.write(f"{error.message}\n")
