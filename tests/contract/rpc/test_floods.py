"""Connections that lead nowhere: they cost bounded memory, and an honest caller gets its answer."""

import asyncio
import contextlib
import os
import resource
import signal
import socket
import ssl
from collections.abc import Iterator
from pathlib import Path

import pytest

from kvmsec.rpc import errors
from kvmsec.rpc import messages as m
from kvmsec.rpc.gate import Limits
from tests.contract.rpc.trial import Node1, caller_from, raw, run, until

ASK = ("rules.show", m.Nothing())
ASKS = b"POST /rpc/1/rules.show HTTP/1.1\r\nHost: a\r\nContent-Length: %d\r\n\r\n"
FLOOD = 10_000


async def answered(node: Node1) -> None:
    transport = caller_from(node)
    await transport.call(*ASK)
    await transport.close()


class ServerProcess:
    """A server in a process of its own, whose memory can be told from the flood's."""

    def __init__(self) -> None:
        ready, tell = os.pipe()
        self.pid = os.fork()
        if self.pid == 0:
            try:
                os.close(ready)
                asyncio.run(self._serve(tell))
            finally:
                os._exit(1)
        os.close(tell)
        with open(ready) as words:
            self.node = Node1(port=int(words.readline()))

    @staticmethod
    async def _serve(tell: int) -> None:
        async with Node1().running() as node:
            os.write(tell, b"%d\n" % node.port)
            os.close(tell)
            await asyncio.Event().wait()

    def resident_mib(self, which: str) -> float:
        for line in Path(f"/proc/{self.pid}/status").read_text().splitlines():
            if line.startswith(which):
                return int(line.split()[1]) / 1024
        raise AssertionError(which)

    def descriptors(self) -> int:
        return len(os.listdir(f"/proc/{self.pid}/fd"))

    def end(self) -> None:
        os.kill(self.pid, signal.SIGKILL)
        os.waitpid(self.pid, 0)


@pytest.fixture
def server() -> Iterator[ServerProcess]:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    started = ServerProcess()
    try:
        yield started
    finally:
        started.end()
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def one_address(number: int) -> str:
    return "127.0.0.2"


def as_many_addresses(number: int) -> str:
    return f"127.{1 + number // 62_500}.{number // 250 % 250}.{1 + number % 250}"


def whole_hello() -> bytes:
    """What a client says first, all of it."""
    outgoing = ssl.MemoryBIO()
    client = ssl.create_default_context().wrap_bio(
        ssl.MemoryBIO(), outgoing, server_hostname="node1"
    )
    with contextlib.suppress(ssl.SSLWantReadError):
        client.do_handshake()
    return outgoing.read()


SAID = {"nothing": b"", "half a hello": whole_hello()[:-1], "a hello": whole_hello()}


@pytest.mark.parametrize("source", [one_address, as_many_addresses])
@pytest.mark.parametrize("what", SAID)
def test_ten_thousand_handshakes_that_never_end_keep_nobody_out(
    server: ServerProcess, source: object, what: str
) -> None:
    said = SAID[what]
    held: list[socket.socket] = []

    async def flood() -> None:
        loop = asyncio.get_running_loop()
        for number in range(FLOOD):
            one = socket.socket()
            one.setblocking(False)
            one.bind((source(number), 0))  # type: ignore[operator]
            await loop.sock_connect(one, ("127.0.0.1", server.node.port))
            if said:
                with contextlib.suppress(ConnectionError):
                    await loop.sock_sendall(one, said)
            held.append(one)
            if len(held) > 4000:  # What the server has ended long ago makes room.
                held.pop(0).close()

    async def test() -> None:
        await answered(server.node)
        before_mib = server.resident_mib("VmRSS")
        flooding = asyncio.create_task(flood())
        answers = 0
        while not flooding.done():
            await answered(server.node)
            answers += 1
            await asyncio.sleep(0.2)
        await flooding
        await answered(server.node)
        assert answers >= 3
        # 128 unfinished handshakes of some 300 KiB each, and what else a process needs.
        assert server.resident_mib("VmHWM") < before_mib + 64
        assert server.descriptors() < 512 + 128 + 50

    try:
        run(test, timeout_s=200)
    finally:
        for one in held:
            one.close()


QUICK = Limits(handshake_s=0.2, head_s=0.2, idle_s=0.3, body_s=0.2)


def test_a_connection_that_never_begins_its_handshake_is_ended() -> None:
    async def test() -> None:
        async with Node1(limits=QUICK).running() as node:
            reader, writer = await asyncio.open_connection("127.0.0.1", node.port)
            assert await reader.read() == b""
            writer.close()
            await until(lambda: bool(node.refusals))
            assert node.refusals[0].reason.startswith("handshake: ")
            assert not node.connections()
            await answered(node)

    run(test)


def test_a_connection_that_stands_and_says_nothing_is_ended() -> None:
    async def test() -> None:
        async with Node1(limits=QUICK).running() as node:
            reader, writer = await raw(node)
            with pytest.raises(ConnectionError):
                assert await reader.read() == b""
                raise ConnectionResetError
            writer.close()
            await until(lambda: not node.connections())
            assert "no whole request" in node.refusals[0].reason
            await answered(node)

    run(test)


def test_a_head_that_comes_byte_by_byte_is_ended() -> None:
    async def test() -> None:
        async with Node1(limits=QUICK).running() as node:
            _, writer = await raw(node)
            for byte in b"POST /rpc/1/rules.show HTTP/1.1\r\n" + b"X: a\r\n" * 1000:
                writer.write(bytes([byte]))
                await asyncio.sleep(0.02)
                if writer.is_closing() or not node.connections():
                    break
            assert not node.connections()
            assert node.asked == []
            writer.transport.abort()
            await answered(node)

    run(test)


def test_a_body_that_comes_byte_by_byte_is_refused() -> None:
    async def test() -> None:
        async with Node1(limits=QUICK).running() as node:
            reader, writer = await raw(node)
            writer.write(
                b"POST /rpc/1/rules.show HTTP/1.1\r\nHost: a\r\nContent-Length: 99\r\n\r\n"
            )
            answer = asyncio.create_task(reader.readuntil(b"\r\n\r\n"))
            while not answer.done():
                writer.write(b" ")
                await asyncio.sleep(0.02)
            assert b"HTTP/1.1 408" in await answer
            assert node.asked == []
            writer.transport.abort()
            await answered(node)

    run(test)


def test_an_answer_that_is_not_read_does_not_keep_its_connection() -> None:
    async def large(*_: object) -> bytes:
        return b'{"ok":"' + b"x" * (8 << 20) + b'"}'

    async def test() -> None:
        async with Node1(limits=QUICK, handler=large).running() as node:
            reader, writer = await raw(node)
            writer.transport.pause_reading()  # type: ignore[attr-defined]
            writer.write(
                b"POST /rpc/1/rules.show HTTP/1.1\r\nHost: a\r\nContent-Length: 2\r\n\r\n{}"
            )
            await until(lambda: bool(node.asked) and not node.connections())
            assert reader is not None
            writer.transport.abort()

    run(test)


def test_an_address_has_a_share_of_the_connections() -> None:
    async def test() -> None:
        limits = Limits(connections_per_address=3)
        async with Node1(limits=limits).running() as node:
            held = [await raw(node, source="127.0.0.2") for _ in range(3)]
            with pytest.raises(OSError):
                await raw(node, source="127.0.0.2")
            await answered(node)
            assert "3 connections from one address" in [one.reason for one in node.refusals]
            held.pop()[1].transport.abort()
            await until(lambda: node.connections() == 2)
            held.append(await raw(node, source="127.0.0.2"))
            for _, writer in held:
                writer.transport.abort()

    run(test)


def test_a_server_that_is_full_says_so() -> None:
    async def test() -> None:
        async with Node1(limits=Limits(connections=2)).running() as node:
            held = [await raw(node) for _ in range(2)]
            with pytest.raises(errors.RemoteFault) as caught:
                await answered(node)
            assert isinstance(caught.value, errors.Overloaded), caught.value
            for _, writer in held:
                writer.transport.abort()
            await until(lambda: not node.connections())
            await answered(node)

    run(test)


def test_an_address_that_shakes_hands_too_often_has_to_wait() -> None:
    async def test() -> None:
        limits = Limits(handshakes_at_once=5, handshakes_per_s=0.01)
        async with Node1(limits=limits).running() as node:
            outcomes = await asyncio.gather(
                *(raw(node, source="127.0.0.2") for _ in range(9)), return_exceptions=True
            )
            refused = [one for one in outcomes if isinstance(one, OSError)]
            assert len(refused) == 4
            await answered(node)
            for one in outcomes:
                if not isinstance(one, BaseException):
                    one[1].transport.abort()

    run(test)


def test_a_stop_ends_every_connection_and_waits_for_a_call() -> None:
    going_on, ended = asyncio.Event(), []

    async def slow(*_: object) -> bytes:
        going_on.set()
        await asyncio.sleep(0.1)
        ended.append(True)
        return b'{"ok":{"values":{}}}'

    async def test() -> None:
        async with Node1(handler=slow).running() as node:
            transport = caller_from(node)
            call = asyncio.create_task(transport.call(*ASK))
            reader, writer = await raw(node)
            opened = asyncio.create_task(asyncio.open_connection("127.0.0.1", node.port))
            await going_on.wait()
            await node.server.close()
            assert await call == m.Shown(values={})
            assert ended == [True]
            writer.transport.abort()
            (await opened)[1].transport.abort()
            assert reader is not None
            await transport.close()

    run(test)
