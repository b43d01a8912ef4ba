"""A candidate that was taken over: whatever it sends costs it its connection, and nothing else."""

import asyncio
import json
from collections.abc import Iterator
from typing import Any

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvmsec.rpc import errors, wire
from kvmsec.rpc import messages as m
from kvmsec.rpc.calls import CALLS, Call, Right
from kvmsec.rpc.gate import Limits
from kvmsec.rpc.service import Service, respond
from kvmsec.rpc.wire import Caller
from tests.contract.rpc.trial import NODE_3, Node1, caller_from, raw, run, until
from tests.unit.kvmsec.rpc.fakes import FakeHome, FakeNode

ASK = ("rules.show", m.Nothing())


def request(path: str = "/rpc/1/rules.show", body: bytes = b"{}", more: str = "") -> bytes:
    head = f"POST {path} HTTP/1.1\r\nHost: a\r\n{more}Content-Length: {len(body)}\r\n\r\n"
    return head.encode() + body


async def said(node: Node1, sent: bytes, *, ends: bool = False) -> bytes:
    """All that a candidate hears that sends this, until the server ends the connection."""
    reader, writer = await raw(node)
    writer.write(sent)
    if ends:
        writer.close()
        return b""
    try:
        return await reader.read()
    except ConnectionError:
        return b""
    finally:
        writer.close()


async def require_alive(node: Node1) -> None:
    """An honest caller still gets its answer."""
    before = len(node.asked)
    transport = caller_from(node)
    await transport.call(*ASK)
    await transport.close()
    assert len(node.asked) == before + 1


# Fuzzed messages -------------------------------------------------------------------------------


class Fuzzed:
    """A server with a whole service behind it, and one kept connection to it."""

    def __init__(self, runner: asyncio.Runner) -> None:
        self.runner = runner
        self.fake = FakeNode()
        self.home = FakeHome()
        self.failures: list[tuple[str, BaseException]] = []
        self.node = Node1(handler=self.answer)
        self.service = Service(self.fake, self.home)

    async def answer(self, caller: Caller, call: Call, protocol: int, body: bytes) -> bytes:
        return await respond(
            self.service.answer,
            caller,
            call.name,
            protocol,
            body,
            on_failure=lambda name, error: self.failures.append((name, error)),
        )

    async def send(self, path: str, body: bytes) -> bytes:
        reader, writer = await raw(self.node)
        writer.write(request(path, body))
        head = await reader.readuntil(b"\r\n\r\n")
        length = int(head.lower().partition(b"content-length: ")[2].partition(b"\r\n")[0])
        answer = await reader.readexactly(length)
        writer.transport.abort()
        return answer


@pytest.fixture(scope="module")
def fuzzed() -> Iterator[Fuzzed]:
    with asyncio.Runner() as runner:
        made = Fuzzed(runner)
        made.node.limits = Limits(handshakes_per_s=1e6, handshakes_at_once=10**6)
        running = made.node.running()
        runner.run(running.__aenter__())
        yield made
        runner.run(running.__aexit__(None, None, None))


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4),
    max_leaves=12,
)
NEARLY = st.fixed_dictionaries(
    {},
    optional={
        "name": JSON,
        "uid": JSON,
        "uids": JSON | st.text(alphabet="0123456789-, "),
        "definition": JSON,
        "revision": JSON,
        "timeout_s": st.just(0) | JSON,
        "cursor": JSON,
        "force": JSON,
        "document": JSON,
        "format": JSON,
        "content": JSON,
        "anchors": JSON,
    },
)
BODIES = (
    st.binary(max_size=300)
    | JSON.map(lambda value: json.dumps(value).encode())
    | NEARLY.map(lambda value: json.dumps(value).encode())
)
QUICK = sorted(name for name in CALLS if name != "instance.events")


@settings(max_examples=150)
@given(name=st.sampled_from(QUICK), body=BODIES)
def test_a_fuzzed_message_is_an_answer_or_a_fault_and_never_a_crash(
    fuzzed: Fuzzed, name: str, body: bytes
) -> None:
    answer = fuzzed.runner.run(fuzzed.send(f"/rpc/1/{name}", body))

    try:
        msgspec.json.decode(body, type=CALLS[name].request)
        is_message = True
    except (msgspec.MsgspecError, ValueError):
        is_message = False
    try:
        wire.decode_answer(CALLS[name], answer)
    except errors.Refused:
        assert CALLS[name].right is not Right.CANDIDATE
    except errors.BadMessage:
        assert not is_message
    except errors.RemoteFault as fault:
        assert is_message, fault
    else:
        assert is_message
    assert fuzzed.failures == []


@settings(max_examples=60)
@given(
    path=st.text(alphabet=st.characters(min_codepoint=33, max_codepoint=126), max_size=40),
    body=st.binary(max_size=20),
)
def test_a_fuzzed_path_is_refused_in_words(fuzzed: Fuzzed, path: str, body: bytes) -> None:
    asked = len(fuzzed.node.asked)
    answer = fuzzed.runner.run(fuzzed.send(f"/rpc/{path}", body))
    if answer.startswith(b"{"):
        with pytest.raises(errors.RemoteFault):
            wire.decode_answer(CALLS["node.leave"], answer)
    assert len(fuzzed.node.asked) == asked


@settings(max_examples=60)
@given(sent=st.binary(min_size=1, max_size=400))
def test_fuzzed_bytes_on_a_trusted_connection_reach_nobody(fuzzed: Fuzzed, sent: bytes) -> None:
    async def test() -> None:
        _, writer = await raw(fuzzed.node)
        writer.write(sent + b"\r\n\r\n")
        await asyncio.sleep(0)
        writer.transport.abort()

    asked = len(fuzzed.node.asked)
    fuzzed.runner.run(test())
    assert len(fuzzed.node.asked) == asked
    fuzzed.runner.run(require_alive(fuzzed.node))


# One request after another ---------------------------------------------------------------------

REFUSED = {
    "another method": b"PUT /rpc/1/rules.show HTTP/1.1\r\nHost: a\r\nContent-Length: 2\r\n\r\n{}",
    "a look": b"GET /rpc/1/rules.show HTTP/1.1\r\nHost: a\r\n\r\n",
    "another path": request("/"),
    "a path with more": request("/rpc/1/rules.show?x"),
    "an escaped path": request("/rpc/1/rules%2eshow"),
    "a climbing path": request("/rpc/1/../1/rules.show"),
    "a whole URL": request("http://node2/rpc/1/rules.show"),
    "another version": request("/rpc/2/rules.show"),
    "version 0": request("/rpc/0/rules.show"),
    "no call": request("/rpc/1/rules.nothing"),
    "a body in chunks": b"POST /rpc/1/rules.show HTTP/1.1\r\nHost: a\r\n"
    b"Transfer-Encoding: chunked\r\n\r\n2\r\n{}\r\n0\r\n\r\n",
    "no length": b"POST /rpc/1/rules.show HTTP/1.1\r\nHost: a\r\n\r\n",
    "two lengths": b"POST /rpc/1/rules.show HTTP/1.1\r\nHost: a\r\nContent-Length: 2\r\n"
    b"Content-Length: 3\r\n\r\n{}",
    "both framings": b"POST /rpc/1/rules.show HTTP/1.1\r\nHost: a\r\nContent-Length: 2\r\n"
    b"Transfer-Encoding: chunked\r\n\r\n2\r\n{}\r\n0\r\n\r\n",
    "a negative length": b"POST /rpc/1/rules.show HTTP/1.1\r\nHost: a\r\n"
    b"Content-Length: -1\r\n\r\n",
    "a length of words": b"POST /rpc/1/rules.show HTTP/1.1\r\nHost: a\r\nContent-Length: x\r\n\r\n",
    "a line without an end": b"POST /rpc/1/" + b"a" * 100_000,
    "a field without an end": request(more="X: " + "a" * 100_000 + "\r\n"),
    "ten thousand fields": request(more="X: a\r\n" * 10_000),
    "too large a body": b"POST /rpc/1/rules.show HTTP/1.1\r\nHost: a\r\n"
    b"Content-Length: 1048577\r\n\r\n" + b" " * 1_048_577,
    "a huge length": b"POST /rpc/1/rules.show HTTP/1.1\r\nHost: a\r\n"
    b"Content-Length: 99999999999999999999\r\n\r\n{}",
}


@pytest.mark.parametrize("what", REFUSED)
def test_what_is_no_call_is_refused_and_ends_the_connection(what: str) -> None:
    async def test() -> None:
        async with Node1().running() as node:
            heard = await said(node, REFUSED[what])
            assert b" 200 " not in heard
            assert node.asked == []
            await until(lambda: bool(node.refusals))
            assert all(one.reason.isprintable() for one in node.refusals)
            assert all(len(one.reason) < 2000 for one in node.refusals)
            await require_alive(node)

    run(test)


@pytest.mark.parametrize("cut", [1, 20, 60, 62, 64])
def test_a_request_that_is_cut_off_is_not_carried_out(cut: int) -> None:
    async def test() -> None:
        async with Node1().running() as node:
            assert cut < len(request())
            await said(node, request()[:cut], ends=True)
            await until(lambda: not node.connections())
            assert node.asked == []
            await require_alive(node)

    run(test)


def test_what_is_sent_before_its_answers_is_answered_in_order() -> None:
    async def test() -> None:
        async with Node1().running() as node:
            reader, writer = await raw(node)
            writer.write(b"".join(request(body=b'{"n":%d}' % number) for number in range(200)))
            for _ in range(200):
                assert b"200 OK" in await reader.readuntil(b"\r\n\r\n")
                await reader.readuntil(b"}}")
            assert [body for _, _, body in node.asked] == [b'{"n":%d}' % n for n in range(200)]
            writer.close()

    run(test)


def test_nothing_behind_a_refused_request_is_heard() -> None:
    async def test() -> None:
        async with Node1().running() as node:
            await said(node, request("/rpc/1/rules.nothing") + request() * 50)
            assert node.asked == []

    run(test)


def test_who_may_not_order_costs_no_more_than_its_head() -> None:
    """A plain node's request is refused before its body is read."""

    async def test() -> None:
        async with Node1().running() as node:
            reader, writer = await raw(node, NODE_3)
            writer.write(b"POST /rpc/1/rules.show HTTP/1.1\r\nHost: a\r\nContent-Length: 9\r\n\r\n")
            assert b"HTTP/1.1 403" in await reader.readuntil(b"\r\n\r\n")
            writer.close()
            (refusal,) = node.refusals
            assert (refusal.peer, refusal.call) == ("node3", "rules.show")

    run(test)


def test_bytes_that_were_recorded_on_the_way_say_nothing_to_anybody_again() -> None:
    """A recorded connection, sent again record for record, ends in the handshake."""

    async def test() -> None:
        recorded = bytearray()
        async with Node1().running() as node:

            async def pass_on(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
                far_reader, far_writer = await asyncio.open_connection("127.0.0.1", node.port)

                async def pump(source: Any, sink: Any, copy: bytearray | None) -> None:
                    while data := await source.read(65536):
                        if copy is not None:
                            copy += data
                        sink.write(data)
                    sink.close()

                await asyncio.gather(
                    pump(reader, far_writer, recorded),
                    pump(far_reader, writer, None),
                    return_exceptions=True,
                )

            between = await asyncio.start_server(pass_on, "127.0.0.1", 0)
            through = Node1(port=between.sockets[0].getsockname()[1])
            transport = caller_from(through)
            await transport.call(*ASK)
            assert len(node.asked) == 1
            await transport.close()

            reader, writer = await asyncio.open_connection("127.0.0.1", node.port)
            writer.write(bytes(recorded))
            while await reader.read(65536):
                pass
            writer.close()
            assert len(node.asked) == 1
            between.close()
            await require_alive(node)

    run(test)
