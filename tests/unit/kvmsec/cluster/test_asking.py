"""Asking many nodes at once: each one answers, refuses or is silent, and holds nobody up."""

import asyncio
from collections.abc import Awaitable, Callable

import pytest
from attrs import frozen

from kvmsec.cluster.asking import AT_ONCE, ask_all, is_silence
from kvmsec.linux.errors import Fault
from tests.unit.kvmsec.fake_node import Refusal, Silence


@frozen
class Node:
    name: str
    answer: Callable[[], Awaitable[int]]


async def seven() -> int:
    return 7


async def silence() -> int:
    raise Silence("no route")


async def refusal() -> int:
    raise Refusal("not I", "PoolRefused")


async def never() -> int:
    await asyncio.Event().wait()
    return 0


async def stubborn() -> int:
    while True:
        try:
            await asyncio.sleep(60)
        except asyncio.CancelledError:
            continue


async def bug() -> int:
    raise ZeroDivisionError


def test_every_node_is_one_of_answered_refused_and_silent() -> None:
    nodes = [Node("a", seven), Node("b", silence), Node("c", refusal), Node("d", never)]

    got = asyncio.run(ask_all(nodes, lambda node: node.answer(), deadline_s=0.05))

    assert got.answered == {"a": 7}
    assert list(got.refused) == ["c"]
    assert got.silent == {"b": "no route", "d": "no answer within 0.05 s"}


def test_all_are_asked_before_the_first_has_answered() -> None:
    async def check() -> None:
        met = asyncio.Barrier(3)

        async def meet() -> int:
            await met.wait()
            return 1

        got = await ask_all([Node(name, meet) for name in "abc"], lambda node: node.answer())
        assert len(got.answered) == 3

    asyncio.run(check())


def test_of_many_nodes_no_more_are_asked_at_once_than_can_be_answered_in_time() -> None:
    under_way, most = 0, 0

    async def count() -> int:
        nonlocal under_way, most
        under_way += 1
        most = max(most, under_way)
        await asyncio.sleep(0)
        under_way -= 1
        return 1

    nodes = [Node(f"node{number}", count) for number in range(3 * AT_ONCE)]

    got = asyncio.run(ask_all(nodes, lambda node: node.answer()))

    assert len(got.answered) == len(nodes)
    assert most == AT_ONCE


def test_nodes_that_wait_for_their_turn_are_silent_at_the_deadline() -> None:
    nodes = [Node(f"node{number}", never) for number in range(AT_ONCE + 1)]

    got = asyncio.run(ask_all(nodes, lambda node: node.answer(), deadline_s=0.05))

    assert len(got.silent) == len(nodes)


def test_a_call_that_will_not_be_cancelled_holds_nobody_up() -> None:
    async def check() -> None:
        got = await ask_all([Node("a", stubborn)], lambda node: node.answer(), deadline_s=0.01)
        assert set(got.silent) == {"a"}
        for task in asyncio.all_tasks() - {asyncio.current_task()}:
            task.get_coro().throw(GeneratorExit)  # type: ignore[union-attr]

    # The one that can't be ended is ended with its loop.
    loop = asyncio.new_event_loop()
    with pytest.raises(GeneratorExit):
        loop.run_until_complete(check())
    loop.close()


def test_a_bug_is_raised_and_not_taken_for_an_answer() -> None:
    nodes = [Node("a", seven), Node("b", bug)]
    with pytest.raises(ZeroDivisionError):
        asyncio.run(ask_all(nodes, lambda node: node.answer()))


def test_nobody_to_ask_is_no_question() -> None:
    assert not asyncio.run(ask_all([], lambda node: node.answer())).answered


@pytest.mark.parametrize(
    ("error", "is_silent"),
    [
        (Silence("gone"), True),
        (Refusal("late", "CallTimedOut"), True),
        (Refusal("busy", "Overloaded"), True),
        (TimeoutError(), True),
        (Refusal("who are you", "Refused"), False),
        (Fault("no"), False),
        (OSError(5, "Input/output error"), False),
    ],
)
def test_what_counts_as_silence(error: Exception, is_silent: bool) -> None:
    assert is_silence(error) is is_silent
