"""Calls to other nodes that go through a courier, over a socket and real TLS."""

import asyncio
import socket
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest

from kvmsec.pki.contexts import client_context
from kvmsec.rpc import errors
from kvmsec.rpc import messages as m
from kvmsec.rpc.courier import Courier
from kvmsec.rpc.exchange import ExchangeTransport
from kvmsec.rpc.frames import FrameConnection, FrameExchange, Target, serve_frames
from tests.contract.rpc.trial import CLUSTER, NODE_1, NODE_2, PAIRS, TRUST, Node1, run, without

ASK = ("rules.show", m.Nothing())


@asynccontextmanager
async def couriered() -> AsyncIterator[FrameConnection]:
    context = client_context(PAIRS[NODE_2], CLUSTER.certificate_pem)
    courier = Courier(lambda: context, lambda: TRUST)
    ours, theirs = socket.socketpair()
    near = await asyncio.open_unix_connection(sock=ours)
    far = await asyncio.open_unix_connection(sock=theirs)
    serving = asyncio.create_task(serve_frames(*far, courier.carry))
    async with FrameConnection(*near, name="the courier") as connection:
        yield connection
    await serving
    await courier.close()


def way(connection: FrameConnection, node: Node1) -> ExchangeTransport:
    target = Target("node1", NODE_1, "127.0.0.1", node.port)
    return ExchangeTransport(FrameExchange(connection, target))


def test_a_call_goes_through_a_courier_and_back() -> None:
    async def test() -> None:
        async with Node1().running() as node, couriered() as connection:
            transport = way(connection, node)
            for _ in range(20):
                assert await transport.call(*ASK) == m.Shown(values={"by": "node2"})
            assert node.connections() == 1

    run(test)


def test_a_refusal_comes_back_with_its_class_its_step_and_the_name_once() -> None:
    async def test() -> None:
        async with Node1(trust=without(NODE_2)).running() as node, couriered() as connection:
            with pytest.raises(errors.Refused) as caught:
                await way(connection, node).call(*ASK)
            assert caught.value.evidence == {"step": "role"}
            assert caught.value.node == "node1"
            assert caught.value.message.startswith("node1: the peer is refused by its role: ")

    run(test)


def test_a_node_that_is_down_comes_back_as_unreachable() -> None:
    async def test() -> None:
        async with Node1().running() as node:
            pass
        async with couriered() as connection:
            with pytest.raises(errors.Unreachable, match="node1: "):
                await way(connection, node).call(*ASK)

    run(test)


def test_a_courier_without_a_node_to_go_to_says_so() -> None:
    async def test() -> None:
        async with couriered() as connection:
            with pytest.raises(errors.BadMessage, match="without a node"):
                await ExchangeTransport(FrameExchange(connection)).call(*ASK)

    run(test)
