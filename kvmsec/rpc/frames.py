"""Many calls at once over one unix stream socket: between the processes of a daemon, and to it.

A frame is its length (4 bytes, big endian) and a message in msgpack. The bodies in it are those of
`kvmsec.rpc.wire`, so whoever passes a call on passes bytes on.
"""

import asyncio
import contextlib
import itertools
import struct
from collections.abc import Awaitable, Callable, Iterator
from typing import Annotated, Final, TypeVar
from uuid import UUID

import msgspec

from kvmsec.rpc import wire
from kvmsec.rpc.calls import Call
from kvmsec.rpc.errors import BadMessage, CallTimedOut, Overloaded, Unreachable
from kvmsec.rpc.messages import Name
from kvmsec.rpc.wire import Caller

OUTSTANDING: Final = 256
"""Calls that one side has begun and not ended; a cluster of 500 nodes is asked in two rounds."""
HELD_BYTES: Final = 64 << 20
"""Of requests, and of answers: four of the largest. A front that was taken over reads nothing."""
_ENVELOPE_BYTES: Final = 4096
"""More than all of a frame that is no body: names are bounded by 256 characters of 4 bytes."""
_REQUEST_FRAME_BYTES: Final = wire.REQUEST_LIMIT_BYTES + _ENVELOPE_BYTES

_LENGTH: Final = struct.Struct(">I")
_Frame = TypeVar("_Frame", bound=msgspec.Struct)


class Target(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The node that a courier is to make a call to."""

    name: Name
    uuid: UUID
    address: Name
    port: Annotated[int, msgspec.Meta(ge=1, le=65535)]


class Request(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One call; `caller` is who made it over the network, `target` whom a courier is to ask."""

    id: int
    call: Name
    protocol: int
    body: bytes
    caller: Caller | None = None
    target: Target | None = None


class _Response(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    id: int
    body: bytes


Handler = Callable[[Request], Awaitable[bytes]]
"""Answers a request with an envelope (`kvmsec.rpc.service.respond`); raises nothing."""


class _Held:
    """Counts bytes that are held, for the moment, for somebody else."""

    def __init__(self, limit_bytes: int) -> None:
        self._left_bytes = limit_bytes

    def has_room(self, size: int) -> bool:
        return size <= self._left_bytes

    def hold(self, size: int) -> None:
        self._left_bytes -= size

    @contextlib.contextmanager
    def letting_go_of(self, size: int) -> Iterator[None]:
        """At the end of what is done with them."""
        try:
            yield
        finally:
            self._left_bytes += size


async def serve_frames(
    reader: asyncio.StreamReader,
    writer: asyncio.StreamWriter,
    handler: Handler,
    *,
    outstanding: int = OUTSTANDING,
    held_bytes: int = HELD_BYTES,
) -> None:
    """Answer the calls of one connection until it ends; then what is being done is cancelled.

    At most `outstanding` at once, and of requests that are being answered, as of answers that wait
    to be read, at most `held_bytes`; the rest is answered with Overloaded. Raises BadMessage for
    what is no frame; nothing else is read from that connection then. Closes the writer.
    """
    sending = asyncio.Lock()
    tasks: set[asyncio.Task[None]] = set()
    asked, unread = _Held(held_bytes), _Held(held_bytes)
    too_much = wire.encode_fault(
        Overloaded(None, f"{outstanding} calls are being answered", hint="try again later")
    )

    async def send(request: Request, body: bytes) -> None:
        with contextlib.suppress(ConnectionError):
            await _send(writer, _Response(id=request.id, body=body), sending)

    async def answer(request: Request) -> None:
        with asked.letting_go_of(len(request.body)):
            body = await handler(request)
        if not unread.has_room(len(body)):
            body = too_much
        unread.hold(len(body))
        with unread.letting_go_of(len(body)):
            await send(request, body)

    try:
        while (request := await _receive(reader, Request, _REQUEST_FRAME_BYTES)) is not None:
            if len(tasks) >= outstanding or not asked.has_room(len(request.body)):
                await send(request, too_much)
                continue
            asked.hold(len(request.body))  # Now: the task begins only when others have been read.
            task = asyncio.create_task(answer(request))
            tasks.add(task)
            task.add_done_callback(tasks.discard)
            # One begins in each turn of the loop: 256 at 20 ms each would hold all others up.
            await asyncio.sleep(0)
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        await _close(writer)


class FrameConnection:
    """The calling end of a connection; an asynchronous context manager around its use.

    `name` is what errors call the other side, `answer_bytes` the most that is taken for an answer.
    """

    def __init__(
        self,
        reader: asyncio.StreamReader,
        writer: asyncio.StreamWriter,
        *,
        name: str = "the node's daemon",
        outstanding: int = OUTSTANDING,
        answer_bytes: int = wire.RESPONSE_LIMIT_BYTES,
    ) -> None:
        self._writer = writer
        self._frame_bytes = answer_bytes + _ENVELOPE_BYTES
        self._name = name
        self._ids = itertools.count(1)
        self._pending: dict[int, asyncio.Future[bytes]] = {}
        self._outstanding = outstanding
        self._sending = asyncio.Lock()
        self._end: Unreachable | BadMessage | None = None
        self._listening = asyncio.create_task(self._listen(reader))

    async def __aenter__(self) -> "FrameConnection":
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()

    @property
    def is_open(self) -> bool:
        return self._end is None

    @property
    def why_closed(self) -> str | None:
        return None if self._end is None else self._end.message

    async def ask(
        self,
        call: Call,
        protocol: int,
        body: bytes,
        deadline_s: float,
        *,
        caller: Caller | None = None,
        target: Target | None = None,
    ) -> bytes:
        """Pass a request on as it is; returns the envelope that it was answered with.

        Raises Overloaded, Unreachable once the other side is gone, CallTimedOut.
        """
        if self._end is not None:
            raise self._ended(self._end)
        if len(self._pending) >= self._outstanding:
            raise Overloaded(None, f"{self._outstanding} calls wait for {self._name} already")
        request = Request(
            id=next(self._ids),
            call=call.name,
            protocol=protocol,
            body=body,
            caller=caller,
            target=target,
        )
        answer: asyncio.Future[bytes] = asyncio.get_running_loop().create_future()
        self._pending[request.id] = answer
        try:
            async with asyncio.timeout(deadline_s):
                await self._put(request)
                return await answer
        except TimeoutError:
            raise CallTimedOut(
                target.name if target else None,
                f"{call.name} was not answered within {deadline_s:g} s by {self._name}",
                hint="an order may have been carried out nevertheless: look before it is repeated"
                if call.is_order
                else None,
            ) from None
        finally:
            self._pending.pop(request.id, None)

    async def _put(self, request: Request) -> None:
        try:
            await _send(self._writer, request, self._sending)
        except ConnectionError as error:
            raise self._gone() from error

    async def close(self) -> None:
        """End the connection; what is under way fails."""
        self._listening.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await self._listening
        await _close(self._writer)

    async def _listen(self, reader: asyncio.StreamReader) -> None:
        end: Unreachable | BadMessage = self._gone()
        try:
            while (got := await _receive(reader, _Response, self._frame_bytes)) is not None:
                answer = self._pending.get(got.id)  # None where nobody waits any more.
                if answer is not None and not answer.done():
                    answer.set_result(got.body)
        except BadMessage as error:
            end = error
        finally:
            self._end = end
            for answer in self._pending.values():
                if not answer.done():
                    answer.set_exception(self._ended(end))
            self._writer.close()

    def _ended(self, end: Unreachable | BadMessage) -> Unreachable | BadMessage:
        """The error anew: one that is raised again and again would grow by each traceback."""
        return type(end)(None, end.message, hint=end.hint)

    def _gone(self) -> Unreachable:
        return Unreachable(
            None,
            f"{self._name} has gone, with calls under way or before one was made",
            hint="an order under way may have been carried out: look before it is repeated",
        )


class FrameExchange:
    """Calls to the daemon of this host (`kvmsec.rpc.exchange.Exchange`), or through its courier."""

    _GRACE_S: Final = 2.0
    """A courier has the same deadline, and its words on what took so long are better than ours."""

    def __init__(self, connection: FrameConnection, target: Target | None = None) -> None:
        self._connection = connection
        self._target = target

    @property
    def node(self) -> str | None:
        return None  # The fault of a node that a courier asked has its name already.

    async def exchange(self, call: Call, protocol: int, body: bytes, deadline_s: float) -> bytes:
        grace_s = self._GRACE_S if self._target else 0.0
        return await self._connection.ask(
            call, protocol, body, deadline_s + grace_s, target=self._target
        )


async def _send(writer: asyncio.StreamWriter, frame: msgspec.Struct, sending: asyncio.Lock) -> None:
    """Put a frame into the socket, one after the other: what waits is bounded by their number.

    Raises ConnectionError.
    """
    encoded = msgspec.msgpack.encode(frame)
    async with sending:
        if writer.is_closing():
            raise ConnectionResetError("closed")
        writer.writelines((_LENGTH.pack(len(encoded)), encoded))
        await writer.drain()


async def _receive(
    reader: asyncio.StreamReader, kind: type[_Frame], limit_bytes: int
) -> _Frame | None:
    """The next frame, or None at the end of the stream. Raises BadMessage."""
    try:
        (length,) = _LENGTH.unpack(await reader.readexactly(_LENGTH.size))
        if length > limit_bytes:
            raise BadMessage(None, f"a frame of {length} bytes came, {limit_bytes} are the most")
        return msgspec.msgpack.decode(await reader.readexactly(length), type=kind)
    except (asyncio.IncompleteReadError, ConnectionError):
        return None
    except (msgspec.MsgspecError, ValueError, RecursionError) as error:
        raise BadMessage(None, f"what came is no frame: {str(error)[:300]}") from error


async def _close(writer: asyncio.StreamWriter) -> None:
    writer.close()
    with contextlib.suppress(ConnectionError):
        await writer.wait_closed()
