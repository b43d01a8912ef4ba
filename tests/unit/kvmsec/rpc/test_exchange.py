"""Which version of a call is spoken with a side that speaks certain versions only."""

import asyncio
from typing import Any

import pytest
from attrs import evolve

from kvmsec.rpc import errors, wire
from kvmsec.rpc import messages as m
from kvmsec.rpc.calls import CALLS
from kvmsec.rpc.exchange import ExchangeTransport


class Old:
    """An exchange with a side that speaks certain versions only."""

    node = "node2"

    def __init__(self, oldest: int, newest: int, told: object = None) -> None:
        self.spoken = range(oldest, newest + 1)
        self.told = told or [oldest, newest]
        self.asked: list[int] = []

    async def exchange(self, call: Any, protocol: int, body: bytes, deadline_s: float) -> bytes:
        self.asked.append(protocol)
        if protocol not in self.spoken:
            fault = errors.WrongProtocol(None, "not spoken", evidence={"protocols": self.told})
            return wire.encode_fault(fault)
        return wire.encode_answer(m.Nothing(), protocol)


def ask(exchange: Old, monkeypatch: pytest.MonkeyPatch, times: int = 1) -> None:
    monkeypatch.setattr("kvmsec.rpc.exchange.PROTOCOL", 4)
    monkeypatch.setattr("kvmsec.rpc.wire.PROTOCOL", 4)

    async def test() -> None:
        transport = ExchangeTransport(exchange)
        async with asyncio.timeout(30):
            for _ in range(times):
                await transport.call("rules.sync", m.Nothing())

    asyncio.run(test())


def test_an_older_node_is_asked_in_the_newest_version_that_both_speak(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    old = Old(1, 2)
    ask(old, monkeypatch, times=3)
    assert old.asked == [4, 2, 2, 2]


@pytest.mark.parametrize("old", [Old(7, 9), Old(7, 9, ["a"]), Old(7, 9, [1, 4]), Old(7, 9, [9, 1])])
def test_a_node_without_a_common_version_is_an_error_after_at_most_one_more_try(
    old: Old, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(errors.WrongProtocol, match="node2"):
        ask(old, monkeypatch)
    assert len(old.asked) <= 2


def test_a_call_that_an_older_node_lacks_is_not_made(monkeypatch: pytest.MonkeyPatch) -> None:
    old = Old(1, 2)
    young = {**CALLS, "rules.sync": evolve(CALLS["rules.sync"], since=3)}
    monkeypatch.setattr("kvmsec.rpc.exchange.CALLS", young)
    with pytest.raises(errors.WrongProtocol, match="came with version 3"):
        ask(old, monkeypatch)
    assert old.asked == [4]
