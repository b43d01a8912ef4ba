"""The root part: what acts. It believes nothing that the front says but that it was asked.

Each call is decoded and validated again, the peer's name and fingerprint are held against this
node's own files at that moment, and every order is written down before it is carried out.
"""

import asyncio
import contextlib
import socket
from collections.abc import Awaitable, Callable, Iterator
from contextlib import AbstractAsyncContextManager
from typing import Final

from hypervisor.foreign_text import escaped
from kvmsec.daemon.front_messages import REFUSED, RefusalMessage
from kvmsec.daemon.listening import peer_uid
from kvmsec.daemon.orders import Order, OrderJournal, Outcome, target_of
from kvmsec.daemon.remote_orders import RemoteOrderRefused
from kvmsec.daemon.trust_source import TrustSource
from kvmsec.errors import SecurityRefused
from kvmsec.linux.errors import Fault
from kvmsec.pki.errors import BadCandidates, NobodyListed
from kvmsec.rpc import messages as m
from kvmsec.rpc import wire
from kvmsec.rpc.authorization import authorize_again, refusal
from kvmsec.rpc.calls import PROTOCOL, Call
from kvmsec.rpc.errors import BadMessage, Refused
from kvmsec.rpc.frames import Request, serve_frames
from kvmsec.rpc.service import Service, respond
from kvmsec.rpc.wire import Caller

_LOCAL_CONNECTIONS: Final = 64
_ACCEPT_PAUSE_S: Final = 0.2
_CHANGE_TRUST: Final = frozenset(
    {
        *("state.put", "rules.sync", "files.put", "join.admit"),
        *("certificates.prepare", "certificates.commit"),
        *("certificates.rollback", "certificates.finish"),
    }
)
"""After these the front must know before the order is answered. Not `node.leave`: the front goes
with it, and could not pass the answer on."""
_WHO_ARE_YOU: Final = "node.info"
"""A command of this host that has changed this node's files by itself asks for this next: it is
answered once the front has what they hold."""
_LEAVE: Final = "node.leave"
"""Goes on to its end whoever goes: half of it would be a node that is neither in nor out."""
_REFUSALS: Final = (Refused, RemoteOrderRefused, SecurityRefused)


class RootPart:
    """Answers the front's calls, and those of root of this host.

    `refresh` has the front know what holds now (`FrontKeeper.refresh`), `held` keeps it as it is
    meanwhile (`FrontKeeper.held`), `left` is called once this node has left its cluster, before
    that is answered; `say` prints a line.
    """

    def __init__(
        self,
        service: Service,
        source: TrustSource,
        journal: OrderJournal,
        say: Callable[[str], None],
    ) -> None:
        self._service = service
        self._source = source
        self._journal = journal
        self._say = say
        self._busy: set[asyncio.Task[None]] = set()
        self._under_way = 0
        self._leaving: set[asyncio.Task[m.Message]] = set()
        self.refresh: Callable[[], Awaitable[None]] | None = None
        self.held: Callable[[], AbstractAsyncContextManager[None]] = contextlib.nullcontext
        self.left: Callable[[], Awaitable[None]] | None = None

    @property
    def orders_under_way(self) -> int:
        return self._under_way

    # Where calls come from ---------------------------------------------------------------------

    async def answer_front(self, request: Request) -> bytes:
        """Answer a call that the front passes on; raises nothing."""
        if request.call == REFUSED.name:
            return self._note_refusal(request)
        if request.caller is None or request.target is not None:
            # Nobody but a taken-over front would pretend to be root of this host.
            error = Refused(None, "a call from the network needs its caller")
            return wire.encode_fault(error)
        return await self._respond(request, request.caller)

    async def answer_local(self, request: Request) -> bytes:
        """Answer a call of root of this host; raises nothing."""
        if request.caller is not None or request.target is not None:
            return wire.encode_fault(BadMessage(None, "a local call has no caller and no target"))
        return await self._respond(request, None)

    async def _respond(self, request: Request, caller: Caller | None) -> bytes:
        return await respond(
            self._answer,
            caller,
            request.call,
            request.protocol,
            request.body,
            on_failure=self._note_failure,
        )

    # What is done with them --------------------------------------------------------------------

    async def _answer(self, call: Call, request: m.Message, caller: Caller | None) -> m.Message:
        if not call.is_order:
            self._judge(call, caller)
            if caller is None and call.name == _WHO_ARE_YOU:
                await self._refresh()
            return await self._service.answer(call, request, caller)
        if call.name != _LEAVE:
            return await self._carry_out(call, request, caller)
        leaving = asyncio.create_task(self._leave(call, request, caller))
        self._leaving.add(leaving)
        leaving.add_done_callback(self._left)
        return await asyncio.shield(leaving)

    async def _leave(self, call: Call, request: m.Message, caller: Caller | None) -> m.Message:
        async with self.held():
            answer = await self._carry_out(call, request, caller)
            if self.left is not None:
                await self.left()
            return answer

    def _left(self, leaving: "asyncio.Task[m.Message]") -> None:
        self._leaving.discard(leaving)
        if not leaving.cancelled():
            leaving.exception()  # Written down by now, and whoever asked may be gone.

    async def _carry_out(self, call: Call, request: m.Message, caller: Caller | None) -> m.Message:
        """Carry an order out, and write it down."""
        self._under_way += 1
        try:
            with self._written_down(call, request, caller) as begun:
                self._judge(call, caller)
                begun()
                answer = await self._service.answer(call, request, caller)
                if call.name in _CHANGE_TRUST:
                    await self._refresh()
                return answer
        finally:
            self._under_way -= 1

    def _judge(self, call: Call, caller: Caller | None) -> None:
        """Hold a caller against this node's files, as they are now. Raises Refused."""
        if caller is None:
            return
        try:
            trust = self._source.standing()
        except Fault as error:
            self._say(f"nobody may order: {error.message}")
            if isinstance(error, BadCandidates):
                raise refusal(NobodyListed()) from error
            raise Refused(
                None, "this node can't tell whom it trusts", evidence={"step": "fingerprint"}
            ) from error
        authorize_again(call, caller, trust)

    async def _refresh(self) -> None:
        if self.refresh is not None:
            await self.refresh()

    @contextlib.contextmanager
    def _written_down(
        self, call: Call, request: m.Message, caller: Caller | None
    ) -> Iterator[Callable[[], None]]:
        """Write an order's end down; what is given is to be called at its beginning."""

        def note(outcome: Outcome, error: BaseException | None = None) -> None:
            self._journal.note(
                Order(
                    peer=None if caller is None else caller.name or "unknown",
                    fingerprint=None if caller is None else caller.fingerprint,
                    call=call.name,
                    target=target_of(request),
                    outcome=outcome,
                    error=None if error is None else type(error).__name__,
                    message=getattr(error, "message", None),
                )
            )

        try:
            yield lambda: note("begun")
        except _REFUSALS as error:
            note("refused", error)
            raise
        except BaseException as error:
            note("failed", error)
            raise
        note("done")

    def _note_refusal(self, request: Request) -> bytes:
        try:
            told = wire.decode_request(REFUSED, request.body)
        except Fault as error:
            return wire.encode_fault(error)
        assert isinstance(told, RefusalMessage)
        more = f" (and {told.more} more)" if told.more else ""
        self._journal.note(
            Order(
                # Cut: a taken-over front could push all orders out of the journal with a few.
                peer=escaped(f"{told.address} {told.peer or ''}".strip(), limit_chars=400),
                fingerprint=None,
                call=escaped(told.call or "-", limit_chars=80),
                target=None,
                outcome="refused",
                error="Refused",
                message=f"{told.reason}{more}",
            )
        )
        return wire.encode_answer(m.Nothing(), PROTOCOL)

    def _note_failure(self, call: str, error: BaseException) -> None:
        words = f"{type(error).__name__}: {error}"
        self._say(f"{escaped(call)} failed: {escaped(words, limit_chars=1000)}")

    # This host's socket ------------------------------------------------------------------------

    async def serve_local(self, listener: socket.socket) -> None:
        """Take connections of root's on this host until cancelled."""
        loop = asyncio.get_running_loop()
        listener.setblocking(False)
        try:
            while True:
                try:
                    accepted, _ = await loop.sock_accept(listener)
                except OSError as error:  # accept(2): out of descriptors
                    self._say(f"a local connection was not taken: {error.strerror}")
                    await asyncio.sleep(_ACCEPT_PAUSE_S)
                    continue
                self._take(accepted)
        finally:
            for task in self._busy:
                task.cancel()
            await asyncio.gather(*self._busy, return_exceptions=True)

    def _take(self, accepted: socket.socket) -> None:
        uid = peer_uid(accepted)
        if uid != 0:
            self._say(f"a connection of uid {uid} to the local socket was refused")
            accepted.close()
        elif len(self._busy) >= _LOCAL_CONNECTIONS:
            self._say(f"more than {_LOCAL_CONNECTIONS} local connections: one was refused")
            accepted.close()
        else:
            task = asyncio.create_task(self._serve(accepted))
            self._busy.add(task)
            task.add_done_callback(self._busy.discard)

    async def _serve(self, accepted: socket.socket) -> None:
        try:
            streams = await asyncio.open_connection(sock=accepted)
        except BaseException:
            accepted.close()
            raise
        with contextlib.suppress(BadMessage):
            await serve_frames(*streams, self.answer_local)
