"""A node that was taken over and answers as it likes: its caller gets a clear error in time."""

import asyncio
import contextlib
import tracemalloc
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager

import pytest
from attrs import evolve

from kvmsec.pki.contexts import server_context
from kvmsec.rpc import errors, wire
from kvmsec.rpc import messages as m
from kvmsec.rpc.calls import CALLS
from kvmsec.rpc.client import HttpsTransport, Patience
from tests.contract.rpc.trial import CLUSTER, NODE_1, PAIRS, Node1, caller_from, run

Says = Callable[[asyncio.StreamWriter], Awaitable[None]]
LIST = ("instance.list", m.Nothing())
PATIENCE = Patience(connect_s=1.0, handshake_s=0.3)


@asynccontextmanager
async def lying(says: Says, *, lets_in: bool = True) -> AsyncIterator[HttpsTransport]:
    """A node with the right certificate that says anything; the transport calls it."""

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(OSError, asyncio.IncompleteReadError):
            await reader.readuntil(b"\r\n\r\n")
            if lets_in:
                writer.write(b'HTTP/1.1 200 OK\r\nContent-Length: 9\r\n\r\n{"ok":{}}')
                await reader.readuntil(b"\r\n\r\n")
            await says(writer)
            writer.close()

    context = server_context(PAIRS[NODE_1], CLUSTER.certificate_pem)
    server = await asyncio.start_server(serve, "127.0.0.1", 0, ssl=context)
    node = Node1(port=server.sockets[0].getsockname()[1])
    transport = caller_from(node, patience=PATIENCE)
    try:
        yield transport
    finally:
        await transport.close()
        server.close()


def once(said: bytes) -> Says:
    async def says(writer: asyncio.StreamWriter) -> None:
        writer.write(said)
        await writer.drain()

    return says


def ok(body: bytes, more: bytes = b"") -> bytes:
    return b"HTTP/1.1 200 OK\r\n%sContent-Length: %d\r\n\r\n%s" % (more, len(body), body)


LIES = {
    "another type": ok(b'{"ok":{"instances":5}}'),
    "another message": ok(b'{"ok":{"holders":{},"instances":[]}}'),
    "more than is known": ok(b'{"ok":{"instances":[],"more":1}}'),
    "no envelope": ok(b"[]"),
    "no JSON": ok(b"\xff\xfe"),
    "nothing": ok(b""),
    "a deep one": ok(b'{"ok":' + b"[" * 100_000),
    "a large head": b"HTTP/1.1 200 OK\r\nX: " + b"a" * 20_000 + b"\r\n\r\n",
    "a huge length": b"HTTP/1.1 200 OK\r\nContent-Length: 99999999999\r\n\r\n",
    "a length over the limit": b"HTTP/1.1 200 OK\r\nContent-Length: 4194305\r\n\r\n",
    "no length": b"HTTP/1.1 200 OK\r\n\r\n{}",
    "two lengths": b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\nContent-Length: 3\r\n\r\n{}",
    "chunks": b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n2\r\n{}\r\n0\r\n\r\n",
    "a bomb": ok(b"\x1f\x8b", b"Content-Encoding: gzip\r\n"),
    "no HTTP": b"SSH-2.0-OpenSSH_9.2\r\n\r\n",
    "an interim answer": b"HTTP/1.1 100 Continue\r\n\r\n",
    "another HTTP": b"HTTP/1.0 200 OK\r\nContent-Length: 2\r\n\r\n{}",
    "a redirect": b"HTTP/1.1 307 Temporary Redirect\r\nLocation: https://127.0.0.1:1/\r\n"
    b"Content-Length: 0\r\n\r\n",
    "a cookie and nothing": b"HTTP/1.1 200 OK\r\nSet-Cookie: a=b\r\nContent-Length: 0\r\n\r\n",
}


@pytest.mark.parametrize("lie", LIES)
def test_an_answer_that_is_none_is_an_error_that_names_the_node(lie: str) -> None:
    async def test() -> None:
        async with lying(once(LIES[lie])) as transport:
            with pytest.raises(errors.BadMessage, match="node1: ") as caught:
                await transport.call(*LIST)
            assert len(caught.value.message) < 1000

    run(test)


@pytest.mark.parametrize("said", [b"", b"HTTP/1.1 200", ok(b'{"ok":{"instances":[]}}')[:-3]])
def test_an_answer_that_is_cut_off_is_a_broken_connection(said: bytes) -> None:
    async def test() -> None:
        async with lying(once(said)) as transport:
            with pytest.raises(errors.Unreachable, match="broke before"):
                await transport.call(*LIST)

    run(test)


def test_an_order_whose_answer_was_cut_off_may_have_been_carried_out() -> None:
    async def test() -> None:
        async with lying(once(b"")) as transport:
            with pytest.raises(errors.Unreachable) as caught:
                await transport.call("rules.sync", m.Nothing())
            assert "may have been carried out" in str(caught.value.hint)

    run(test)


def test_who_is_not_let_in_has_ordered_nothing() -> None:
    async def test() -> None:
        async with lying(once(b""), lets_in=False) as transport:
            with pytest.raises(errors.Refused) as caught:
                await transport.call("rules.sync", m.Nothing())
            assert caught.value.evidence == {"step": "chain"}

    run(test)


def test_an_endless_answer_costs_no_more_than_the_limit() -> None:
    async def forever(writer: asyncio.StreamWriter) -> None:
        writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n" % wire.RESPONSE_LIMIT_BYTES)
        while True:
            writer.write(b" " * 65536)
            await writer.drain()
            # What is written after a hang-up is never full: else the loop would not come to see it.
            await asyncio.sleep(0)

    async def test() -> None:
        async with lying(forever) as transport:
            tracemalloc.start()
            try:
                with pytest.raises(errors.BadMessage):
                    await transport.call("instance.log", m.InstanceRequest(name="web1"))
                _, peak = tracemalloc.get_traced_memory()
            finally:
                tracemalloc.stop()
            # What was read, the same as bytes, and one growth of the buffer.
            assert peak < 6 * wire.RESPONSE_LIMIT_BYTES

    run(test)


def test_a_node_that_never_answers_is_given_up_at_the_deadline(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    async def never(writer: asyncio.StreamWriter) -> None:
        await asyncio.Event().wait()

    quick = {name: evolve(call, timeout_s=0.3) for name, call in CALLS.items()}
    monkeypatch.setattr("kvmsec.rpc.exchange.CALLS", quick)

    async def test() -> None:
        async with lying(never) as transport:
            with pytest.raises(errors.CallTimedOut, match="node1: ") as look:
                await transport.call(*LIST)
            assert look.value.hint is None
            with pytest.raises(errors.CallTimedOut) as order:
                await transport.call("rules.sync", m.Nothing())
            assert "may have been carried out" in str(order.value.hint)

    run(test)


def test_a_node_that_says_a_byte_now_and_then_is_given_up_as_well(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    async def trickle(writer: asyncio.StreamWriter) -> None:
        writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: 1000\r\n\r\n")
        while True:
            writer.write(b" ")
            await writer.drain()
            await asyncio.sleep(0.02)

    quick = {name: evolve(call, timeout_s=0.3) for name, call in CALLS.items()}
    monkeypatch.setattr("kvmsec.rpc.exchange.CALLS", quick)

    async def test() -> None:
        async with lying(trickle) as transport:
            with pytest.raises(errors.CallTimedOut):
                await transport.call(*LIST)

    run(test)


def test_a_node_that_only_shakes_hands_is_unreachable() -> None:
    async def never(writer: asyncio.StreamWriter) -> None:
        await asyncio.Event().wait()

    async def test() -> None:
        async with lying(never, lets_in=False) as transport:
            with pytest.raises(errors.Unreachable, match="after the handshake"):
                await transport.call(*LIST)

    run(test)


def test_a_port_that_takes_connections_and_says_nothing_is_unreachable() -> None:
    async def mute(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.read()
        writer.close()

    async def test() -> None:
        server = await asyncio.start_server(mute, "127.0.0.1", 0)
        node = Node1(port=server.sockets[0].getsockname()[1])
        with pytest.raises(errors.Unreachable, match="node1: "):
            await caller_from(node, patience=PATIENCE).call(*LIST)
        server.close()

    run(test)


def test_a_port_without_a_daemon_is_unreachable() -> None:
    async def test() -> None:
        async with Node1().running() as node:
            pass
        with pytest.raises(errors.Unreachable, match="Connect"):
            await caller_from(node).call(*LIST)

    run(test)


def test_no_proxy_of_the_environment_is_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("http_proxy", "https_proxy", "all_proxy", "HTTPS_PROXY", "ALL_PROXY"):
        monkeypatch.setenv(name, "http://127.0.0.1:1")

    async def test() -> None:
        async with Node1().running() as node:
            transport = caller_from(node)
            await transport.call("rules.show", m.Nothing())
            await transport.close()

    run(test)


def test_words_of_a_hostile_node_are_escaped_and_its_name_stands_before_them() -> None:
    said = ok(b'{"fault":{"kind":"Fault","message":"\\u001b[2Jall is well\\u202e"}}')

    async def test() -> None:
        async with lying(once(said)) as transport:
            with pytest.raises(errors.RemoteFault) as caught:
                await transport.call(*LIST)
            assert caught.value.message == "node1: \\x1b[2Jall is well\\u202e"

    run(test)
