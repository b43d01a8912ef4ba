"""Keeping a front alive that has what is in force: the root part's side of it."""

import asyncio
import contextlib
import socket
from collections import deque
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from typing import Final

from hypervisor.foreign_text import escaped
from kvmsec.daemon.confined_child import (
    ConfinedChild,
    Start,
    refuse_descriptors,
    start_confined,
)
from kvmsec.daemon.confinement import ConfinementFailed
from kvmsec.daemon.front_messages import STOP, TRUST, TrustMessage
from kvmsec.daemon.trust_source import Signature, TrustSource
from kvmsec.errors import KvmsecError
from kvmsec.linux.errors import Fault
from kvmsec.node.waiting import readable
from kvmsec.rpc import messages as m
from kvmsec.rpc import wire
from kvmsec.rpc.calls import PROTOCOL, Call
from kvmsec.rpc.errors import CallTimedOut, Unreachable
from kvmsec.rpc.frames import FrameConnection, Handler, serve_frames

_MOST_DEATHS: Final = 5
_WITHIN_S: Final = 60.0
_PAUSE_S: Final = 0.1
_DYING_S: Final = 0.2
_LOOK_S: Final = 2.0
"""How often files are looked at that a command may have changed without this daemon."""


class FrontFailed(KvmsecError):
    """The front can't be kept alive."""


class _Front:
    """One front process: its control connection, and the calls that come out of it."""

    def __init__(self, child: ConfinedChild, control: FrameConnection, calls: asyncio.Task[None]):
        self.child = child
        self.pushed: Signature | None = None
        self._control = control
        self._calls = calls
        self._ending: asyncio.Task[None] | None = None

    @classmethod
    async def begin(
        cls, start: Start, listeners: Sequence[socket.socket], handler: Handler
    ) -> "_Front":
        ours, theirs = socket.socketpair()
        async with contextlib.AsyncExitStack() as undo:
            undo.callback(ours.close)
            with theirs:
                refuse_descriptors(ours)
                child = start_confined(start, (theirs, *listeners))
            undo.callback(child.end)
            await child.ready()
            control = FrameConnection(
                *await child.streams(),
                name="the front",
                answer_bytes=TRUST.answer_limit_bytes,
            )
            undo.push_async_callback(control.close)
            streams = await asyncio.open_connection(sock=ours)
            undo.pop_all()
        return cls(child, control, asyncio.create_task(serve_frames(*streams, handler)))

    async def tell(self, call: Call, request: m.Message) -> None:
        """Raises what the front answers, Unreachable and CallTimedOut."""
        body = wire.encode_request(request, PROTOCOL)
        answer = await self._control.ask(call, PROTOCOL, body, call.timeout_s)
        wire.decode_answer(call, answer)

    def fault(self) -> str | None:
        """Why it is of no use though it lives: it sent what is no frame, or hung up."""
        if self._calls.done():
            error = None if self._calls.cancelled() else self._calls.exception()
            return getattr(error, "message", None) or "it asks nothing any more"
        return self._control.why_closed

    def end(self) -> str:
        """End it, and have what it had ordered cancelled; says how it ended.

        What is cancelled may be the very order that ends it, so nobody waits for that here.
        """
        how = self.child.end()
        self._calls.cancel()
        self._ending = asyncio.create_task(self._close())
        return how

    async def _close(self) -> None:
        await asyncio.gather(self._calls, return_exceptions=True)
        with contextlib.suppress(Exception):
            await self._control.close()

    async def ended(self) -> None:
        """Wait, after `end`, for what it had ordered; not for an order of its own to call."""
        if self._ending is not None:
            await self._ending


class FrontKeeper:
    """Serves the network while this node is a member, and not otherwise.

    `handler` answers the front's calls, `listen` opens the listening sockets, `say` prints a line.
    `follow` is called after each look at the files: for who else was told what they hold.
    """

    def __init__(
        self,
        start: Callable[[], Start],
        source: TrustSource,
        handler: Handler,
        listen: Callable[[], Sequence[socket.socket]],
        say: Callable[[str], None],
        follow: Callable[[], Awaitable[None]],
    ) -> None:
        self._start = start
        self._source = source
        self._handler = handler
        self._listen = listen
        self._say = say
        self._follow = follow
        self._listeners: Sequence[socket.socket] | None = None
        self._front: _Front | None = None
        self._turn = asyncio.Lock()
        self._refused: Signature | None = None
        self._is_lost = False
        self._deaths: deque[float] = deque(maxlen=_MOST_DEATHS)

    @property
    def is_serving(self) -> bool:
        return self._front is not None

    @property
    def pid(self) -> int | None:
        """The front's pid, while there is one."""
        return None if self._front is None else self._front.child.pid

    @property
    def addresses(self) -> list[str]:
        found = [one.getsockname() for one in self._listeners or ()]
        return [f"[{one[0]}]:{one[1]}" if ":" in one[0] else f"{one[0]}:{one[1]}" for one in found]

    @contextlib.asynccontextmanager
    async def held(self) -> AsyncIterator[None]:
        """The front stays, and is told nothing, until what is done within has ended."""
        async with self._turn:
            yield

    async def refresh(self) -> None:
        """Have the front know what the files say now; returns once it has said that it does.

        A front that can't take it is ended: what it knew is not in force any more. Raises
        CannotListen and ConfinementFailed where a front can't be started.
        """
        async with self._turn:
            await self._look()
        await self._follow()

    async def _look(self) -> None:
        signature = self._source.signature()
        known = self._refused if self._front is None else self._front.pushed
        if known == signature and known is not None:
            return
        self._refused = None
        try:
            message = self._source.message()
        except Fault as error:
            self._serve_nobody(signature, error)
            return
        if message is None:
            # This node has left: the one who had it do so is yet to hear that it did.
            await self._dismiss_front()
            self._stop_listening()
            self._refused = signature
            return
        await self._tell(message, signature)

    async def _tell(self, message: TrustMessage, signature: Signature) -> None:
        if self._front is None:
            await self._begin()
        assert self._front is not None
        try:
            await self._front.tell(TRUST, message)
        except Fault as error:
            if isinstance(error, Unreachable | CallTimedOut) or self._front.fault() is not None:
                await self._lose(self._front, error.message)  # Another can take it.
            else:
                self._serve_nobody(signature, error)
            return
        self._front.pushed = signature

    def _serve_nobody(self, signature: Signature, error: Fault) -> None:
        """Until the files change."""
        self._end_front()
        self._stop_listening()
        self._refused = signature
        self._say(f"other nodes are not served: {error.message}")
        if error.hint:
            self._say(f"hint: {error.hint}")

    async def _begin(self) -> None:
        if self._listeners is None:
            self._listeners = self._listen()
        start = self._start()
        try:
            self._front = await _Front.begin(start, self._listeners, self._handler)
        except OSError as error:
            # Out of processes, which may last for a moment only: it counts as a front that failed.
            raise ConfinementFailed("start", error.errno or 0, str(error)) from error

    async def _dismiss_front(self) -> None:
        """Have it take no more calls, and end it once those under way are answered."""
        if self._front is not None:
            with contextlib.suppress(Fault):
                await self._front.tell(STOP, m.Nothing())
        self._end_front()

    def _stop_listening(self) -> None:
        """Who calls a node that serves nobody is refused at once, and has not to wait."""
        for one in self._listeners or ():
            one.close()
        self._listeners = None

    def _end_front(self) -> None:
        if self._front is not None:
            front, self._front = self._front, None
            front.end()

    async def run(self) -> None:
        """See to the front until cancelled. Raises FrontFailed, and what `refresh` raises."""
        while True:
            front = self._front
            if front is None:
                await asyncio.sleep(0 if self._is_lost else _LOOK_S)
            elif await readable(front.child.pidfd, _LOOK_S) or front.fault() is not None:
                await self._bury(front)
            if self._is_lost:
                self._is_lost = False
                await self._count_death()
            try:
                await self.refresh()
            except ConfinementFailed as error:
                self._say(error.message)
                await self._count_death()

    async def _bury(self, front: _Front) -> None:
        async with self._turn:
            if self._front is front:  # Else it was ended on purpose.
                await self._lose(front, front.fault())
            await front.ended()

    async def _lose(self, front: _Front, why: str | None) -> None:
        """Take away a front that has ended, or is of no use; `run` has another one begin."""
        if why is not None and await readable(front.child.pidfd, _DYING_S):
            why = None  # That it dies is seen on its sockets first.
        self._front, self._is_lost = None, True
        how = front.end()
        words = front.child.words()
        told = how if why is None else f"was ended: {escaped(why, limit_chars=300)}"
        self._say(f"the front {told}" + (f"; it said: {words}" if words else ""))

    async def _count_death(self) -> None:
        now = asyncio.get_running_loop().time()
        self._deaths.append(now)
        if len(self._deaths) == _MOST_DEATHS and now - self._deaths[0] < _WITHIN_S:
            raise FrontFailed(
                f"the front ended {_MOST_DEATHS} times within {_WITHIN_S:g} s",
                hint="what it said is above; `kvmsec doctor` shows what this host lacks",
            )
        await asyncio.sleep(_PAUSE_S * len(self._deaths))
        self._say("the front is started again")

    async def stop(self) -> None:
        """Take no more calls from the network, and end the front once those under way are done."""
        async with self._turn:
            front = self._front
            await self._dismiss_front()
            self._stop_listening()
            if front is not None:
                await front.ended()
