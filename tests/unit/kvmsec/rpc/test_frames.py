"""Many calls over one socket: each gets its own answer, or a clear error in time."""

import asyncio
import struct
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import Any
from uuid import UUID

import msgspec
import pytest

from kvmsec.rpc import errors, frames, wire
from kvmsec.rpc.calls import CALLS
from kvmsec.rpc.exchange import ExchangeTransport
from kvmsec.rpc.remote import RemoteAgent
from kvmsec.rpc.service import Service, respond
from kvmsec.rpc.wire import Caller
from tests.unit.kvmsec.rpc.fakes import FakeHome, FakeNode

INFO = CALLS["instance.info"]
REBOOT = CALLS["instance.reboot"]
Streams = tuple[asyncio.StreamReader, asyncio.StreamWriter]


async def streams() -> tuple[Streams, Streams]:
    import socket

    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
    return (
        await asyncio.open_unix_connection(sock=ours),
        await asyncio.open_unix_connection(sock=theirs),
    )


@asynccontextmanager
async def served(
    handler: frames.Handler, **limits: Any
) -> AsyncIterator[tuple[frames.FrameConnection, "asyncio.Task[None]"]]:
    near, far = await streams()
    serving = asyncio.create_task(frames.serve_frames(*far, handler, **limits))
    async with frames.FrameConnection(*near) as connection:
        yield connection, serving
    await asyncio.gather(serving, return_exceptions=True)


def run(test: Callable[[], Awaitable[None]]) -> None:
    async def bounded() -> None:
        async with asyncio.timeout(30):
            await test()

    asyncio.run(bounded())


async def echo(request: frames.Request) -> bytes:
    await asyncio.sleep(0)
    return request.body


def test_every_call_gets_its_own_answer_in_whatever_order_they_come() -> None:
    async def backwards(request: frames.Request) -> bytes:
        await asyncio.sleep(0.02 if int(request.body) < 25 else 0)
        return request.body

    async def test() -> None:
        async with served(backwards) as (connection, _):
            numbers = [str(number).encode() for number in range(50)]
            answers = await asyncio.gather(
                *(connection.ask(INFO, 1, number, 20) for number in numbers)
            )
            assert answers == numbers

    run(test)


def test_a_call_goes_through_with_its_caller_and_its_target() -> None:
    caller = Caller(fingerprint="a" * 64, name="master", uuid=UUID(int=1))
    target = frames.Target("node2", UUID(int=2), "192.0.2.2", 1811)
    seen: list[frames.Request] = []

    async def note(request: frames.Request) -> bytes:
        seen.append(request)
        return b"done"

    async def test() -> None:
        async with served(note) as (connection, _):
            await connection.ask(REBOOT, 1, b"{}", 20, caller=caller, target=target)
        (request,) = seen
        assert (request.call, request.protocol, request.body) == ("instance.reboot", 1, b"{}")
        assert (request.caller, request.target) == (caller, target)

    run(test)


def test_a_node_is_asked_over_a_socket_as_if_it_were_here() -> None:
    node = FakeNode()

    async def test() -> None:
        service = Service(node, FakeHome())

        async def handler(request: frames.Request) -> bytes:
            return await respond(
                service.answer, request.caller, request.call, request.protocol, request.body
            )

        async with served(handler) as (connection, _):
            remote = RemoteAgent(ExchangeTransport(frames.FrameExchange(connection)), "node1")
            assert (await remote.list())[0].name == "web1"
            assert (await remote.info("web1")).name == "web1"
            with pytest.raises(errors.RemoteFault, match=r"\Athere is no instance web2"):
                await remote.info("web2")

    run(test)


def test_a_large_body_goes_both_ways() -> None:
    async def grow(request: frames.Request) -> bytes:
        return request.body * 16

    async def test() -> None:
        async with served(grow) as (connection, _):
            body = b"x" * wire.REQUEST_LIMIT_BYTES
            assert await connection.ask(INFO, 1, body, 20) == body * 16

    run(test)


def test_a_dead_other_side_fails_every_call_at_once() -> None:
    begun = asyncio.Event()

    async def never(request: frames.Request) -> bytes:
        begun.set()
        await asyncio.Event().wait()
        raise AssertionError

    async def test() -> None:
        async with served(never) as (connection, serving):
            calls = [asyncio.create_task(connection.ask(REBOOT, 1, b"", 20)) for _ in range(3)]
            await begun.wait()
            serving.cancel()
            for outcome in await asyncio.gather(*calls, return_exceptions=True):
                assert isinstance(outcome, errors.Unreachable)
            with pytest.raises(errors.Unreachable):
                await connection.ask(REBOOT, 1, b"", 20)
            assert not connection.is_open

    run(test)


def test_a_call_ends_at_its_deadline_and_the_next_one_is_fine() -> None:
    async def slow(request: frames.Request) -> bytes:
        if request.body == b"slow":
            await asyncio.sleep(0.05)
        return request.body

    async def test() -> None:
        async with served(slow) as (connection, _):
            with pytest.raises(errors.CallTimedOut, match=r"instance\.reboot") as caught:
                await connection.ask(REBOOT, 1, b"slow", 0.01)
            assert caught.value.hint is not None
            await asyncio.sleep(0.06)  # The late answer is nobody's.
            assert await connection.ask(REBOOT, 1, b"quick", 20) == b"quick"

    run(test)


def test_what_is_over_the_limit_of_calls_is_refused_on_either_side() -> None:
    gate = asyncio.Event()

    async def wait(request: frames.Request) -> bytes:
        await gate.wait()
        return b"done"

    async def test() -> None:
        async with served(wait, outstanding=2) as (connection, _):
            held = [asyncio.create_task(connection.ask(INFO, 1, b"", 20)) for _ in range(2)]
            await asyncio.sleep(0)
            with pytest.raises(errors.Overloaded):
                wire.decode_answer(INFO, await connection.ask(INFO, 1, b"", 20))
            connection._outstanding = 2
            with pytest.raises(errors.Overloaded):
                await connection.ask(INFO, 1, b"", 20)
            gate.set()
            assert await asyncio.gather(*held) == [b"done", b"done"]

    run(test)


def test_no_two_calls_begin_in_one_turn_of_the_loop() -> None:
    """Each may take its time at once, and everybody else of this process waits meanwhile."""
    turn, begun = 0, []

    async def note(request: frames.Request) -> bytes:
        begun.append(turn)
        return b""

    async def count() -> None:
        nonlocal turn
        while True:
            turn += 1
            await asyncio.sleep(0)

    async def test() -> None:
        async with served(note) as (connection, _):
            counting = asyncio.create_task(count())
            await asyncio.gather(*(connection.ask(INFO, 1, b"", 20) for _ in range(50)))
            counting.cancel()
        assert len(set(begun)) == len(begun) == 50

    run(test)


def test_what_was_begun_is_cancelled_when_the_caller_has_gone() -> None:
    begun, ended = asyncio.Event(), asyncio.Event()

    async def never(request: frames.Request) -> bytes:
        begun.set()
        try:
            await asyncio.Event().wait()
        finally:
            ended.set()
        raise AssertionError

    async def test() -> None:
        async with served(never) as (connection, serving):
            call = asyncio.create_task(connection.ask(REBOOT, 1, b"", 20))
            await begun.wait()
            await connection.close()
            await serving
            assert ended.is_set()
            with pytest.raises(errors.Unreachable):
                await call

    run(test)


def test_who_never_reads_answers_makes_none_pile_up() -> None:
    """A front that was taken over asks for logs and lets them wait in the root part."""
    made: list[int] = []

    async def log(request: frames.Request) -> bytes:
        made.append(request.id)
        return bytes(1 << 20)

    async def test() -> None:
        near, far = await streams()
        serving = asyncio.create_task(frames.serve_frames(*far, log, held_bytes=4 << 20))
        for number in range(200):
            frame = framed(frames.Request(id=number, call="instance.log", protocol=1, body=b""))
            near[1].write(frame)
        while len(made) < 200:
            await asyncio.sleep(0.01)
        waiting = sum(
            len(task.get_coro().cr_frame.f_locals.get("body", b""))
            for task in asyncio.all_tasks()
            if "answer" in task.get_coro().__qualname__
        )
        near[1].transport.abort()
        await serving
        assert waiting < 6 << 20

    run(test)


def test_requests_that_hold_too_much_together_are_refused() -> None:
    gate = asyncio.Event()

    async def wait(request: frames.Request) -> bytes:
        await gate.wait()
        return b"done"

    async def test() -> None:
        async with served(wait, held_bytes=1000) as (connection, _):
            held = asyncio.create_task(connection.ask(INFO, 1, b"x" * 900, 20))
            await asyncio.sleep(0)
            with pytest.raises(errors.Overloaded):
                wire.decode_answer(INFO, await connection.ask(INFO, 1, b"x" * 900, 20))
            gate.set()
            assert await held == b"done"
            assert await connection.ask(INFO, 1, b"x" * 900, 20) == b"done"

    run(test)


def framed(value: object) -> bytes:
    encoded = msgspec.msgpack.encode(value)
    return struct.pack(">I", len(encoded)) + encoded


BAD = [
    struct.pack(">I", 0xFFFFFFFF),
    struct.pack(">I", wire.REQUEST_LIMIT_BYTES + 5000) + b"x",
    struct.pack(">I", 3) + b"abc",
    struct.pack(">I", 1) + b"\x80",
    struct.pack(">I", 0),
    struct.pack(">I", 60_000) + b"\x91" * 60_000,
    framed({"id": 1, "call": "a", "protocol": 1, "body": b"", "more": 1}),
    framed({"id": 1, "call": "a", "protocol": 1}),
    framed({"id": 1, "call": "a", "protocol": 1, "body": b"", "caller": {"fingerprint": "A"}}),
]


@pytest.mark.parametrize("sent", BAD)
def test_what_is_no_frame_ends_the_connection_with_a_clear_error(sent: bytes) -> None:
    async def test() -> None:
        near, far = await streams()
        serving = asyncio.create_task(frames.serve_frames(*far, echo))
        near[1].write(sent)
        near[1].write_eof()
        with pytest.raises(errors.BadMessage):
            await serving
        assert await near[0].read() == b""
        near[1].close()

    run(test)


@pytest.mark.parametrize("cut", [0, 1, 4, 5, 20])
def test_a_frame_that_is_cut_off_is_the_end(cut: int) -> None:
    whole = framed(frames.Request(id=1, call="a", protocol=1, body=b"x" * 20))

    async def test() -> None:
        near, far = await streams()
        serving = asyncio.create_task(frames.serve_frames(*far, echo))
        near[1].write(whole[:cut])
        near[1].write_eof()
        await serving
        near[1].close()

    run(test)


def test_an_answer_that_is_no_frame_fails_every_call_with_a_clear_error() -> None:
    async def test() -> None:
        near, far = await streams()
        async with frames.FrameConnection(*near) as connection:
            call = asyncio.create_task(connection.ask(INFO, 1, b"", 20))
            await far[0].readexactly(4)
            far[1].write(struct.pack(">I", 0xFFFFFFFF))
            with pytest.raises(errors.BadMessage):
                await call
            with pytest.raises(errors.BadMessage):
                await connection.ask(INFO, 1, b"", 20)
        far[1].close()

    run(test)


def test_an_answer_to_what_nobody_asked_is_dropped() -> None:
    async def test() -> None:
        near, far = await streams()
        async with frames.FrameConnection(*near) as connection:
            call = asyncio.create_task(connection.ask(INFO, 1, b"", 20))
            await far[0].readexactly(4)
            for number, body in ((77, b"other"), (1, b"mine"), (1, b"again")):
                far[1].write(framed({"id": number, "body": body}))
            assert await call == b"mine"
        far[1].close()

    run(test)
