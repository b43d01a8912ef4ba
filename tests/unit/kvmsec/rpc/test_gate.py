"""Who may connect, and what is told of those who may not."""

import asyncio
import socket

import pytest
from attrs import evolve
from hypothesis import given
from hypothesis import strategies as st

from kvmsec.rpc.gate import Gate, Limits, origin_of
from kvmsec.rpc.hellos import NoHello, wait_for_hello
from kvmsec.rpc.refusals import Refusal, Refusals

LIMITS = Limits(connections_per_address=3, handshakes_per_s=1.0, handshakes_at_once=5)


def test_an_address_has_its_share_and_gets_it_back() -> None:
    gate = Gate(LIMITS)
    assert [gate.why_not("a", 0.0) for _ in range(3)] == [None] * 3
    assert gate.why_not("a", 0.0) == "3 connections from one address"
    assert gate.why_not("b", 0.0) is None
    gate.leave("a")
    assert gate.why_not("a", 0.0) is None


def test_a_rate_holds_after_the_first_few_and_time_brings_more() -> None:
    gate = Gate(evolve(LIMITS, connections_per_address=100))
    answers = [gate.why_not("a", 0.0) for _ in range(7)]
    assert answers == [None] * 5 + ["1 handshakes a second from one address"] * 2
    assert gate.why_not("b", 0.0) is None
    assert gate.why_not("a", 0.5) is not None
    assert gate.why_not("a", 2.1) is None


@given(st.lists(st.floats(0, 100), min_size=1, max_size=60))
def test_no_order_of_times_lets_more_in_than_the_rate(times: list[float]) -> None:
    gate = Gate(evolve(LIMITS, connections_per_address=1000))
    now, let_in = 0.0, 0
    for step in times:
        now += step
        let_in += gate.why_not("a", now) is None
    assert let_in <= 5 + now * 1.0 + 1


def test_what_is_remembered_of_addresses_is_bounded() -> None:
    gate = Gate(LIMITS)
    for number in range(20_000):
        if gate.why_not(str(number), 0.0) is None:
            gate.leave(str(number))
    assert len(gate._rates) <= 4096
    assert len(gate._open) == 0


@pytest.mark.parametrize(
    ("address", "origin"),
    [
        ("192.0.2.7", "192.0.2.7"),
        ("::ffff:192.0.2.7", "192.0.2.7"),
        ("2001:db8::1", "2001:db8::/64"),
        ("2001:db8::ffff:1:2:3", "2001:db8::/64"),
        ("fe80::1%eth0", "fe80::/64"),
    ],
)
def test_a_host_with_many_addresses_is_one_origin(address: str, origin: str) -> None:
    assert origin_of(address) == origin


# What is told ----------------------------------------------------------------------------------


def test_ten_thousand_of_a_kind_are_told_once_and_counted() -> None:
    told: list[Refusal] = []
    refusals = Refusals(told.append)
    for _ in range(10_000):
        refusals.add("192.0.2.7", "no TLS", 1.0)
    refusals.add("192.0.2.7", "no TLS", 20.0)
    refusals.add("192.0.2.8", "no TLS", 20.0)

    assert [(one.address, one.more) for one in told] == [
        ("192.0.2.7", 0),
        ("192.0.2.7", 9_999),
        ("192.0.2.8", 0),
    ]


def test_what_a_peer_chose_is_escaped_and_bounded() -> None:
    told: list[Refusal] = []
    refusals = Refusals(told.append)
    refusals.add("a", "\x1b[2J\n" + "x" * 9999, 1.0, peer="b\x00", call="c\u202e")

    (one,) = told
    for words in (one.reason, one.peer, one.call):
        assert words is not None
        assert words.isprintable()
        assert len(words) < 1000


def test_what_is_remembered_of_refusals_is_bounded() -> None:
    refusals = Refusals(lambda refusal: None)
    for number in range(5_000):
        refusals.add(str(number), "no TLS", 1.0)
    assert len(refusals._told) <= 1024


# The first bytes -------------------------------------------------------------------------------


async def heard(*parts: bytes, ends: bool = False) -> bytes:
    """What lies there once a hello has been waited for whose sender sent it in these parts."""
    listener = socket.create_server(("127.0.0.1", 0))
    peer = socket.create_connection(listener.getsockname())
    accepted, _ = listener.accept()
    accepted.setblocking(False)
    waiting = asyncio.create_task(wait_for_hello(accepted))
    try:
        for part in parts:
            assert not waiting.done()
            peer.sendall(part)
            await asyncio.sleep(0.02)
        if ends:
            peer.shutdown(socket.SHUT_WR)
        async with asyncio.timeout(10):
            await waiting
        return accepted.recv(65536)
    finally:
        for one in (listener, peer, accepted):
            one.close()


def test_a_hello_in_pieces_is_waited_for_and_left_whole() -> None:
    whole = b"\x16\x03\x01\x00\x04abcd"
    assert asyncio.run(heard(whole[:2], whole[2:6], whole[6:])) == whole


@pytest.mark.parametrize(
    "sent",
    [b"GET / HTTP/1.1", b"\x16\x02\x01\x00\x04", b"\x16\x03\x01\xff\xff", b"\x15\x03\x01\0\2"],
)
def test_what_is_no_hello_is_refused_by_its_first_bytes(sent: bytes) -> None:
    with pytest.raises(NoHello, match="no TLS"):
        asyncio.run(heard(sent))


@pytest.mark.parametrize("sent", [b"", b"\x16\x03", b"\x16\x03\x01\x00\x04abc"])
def test_who_goes_before_the_end_of_its_hello_is_let_go(sent: bytes) -> None:
    with pytest.raises(NoHello, match="gone"):
        asyncio.run(heard(sent, ends=True))
