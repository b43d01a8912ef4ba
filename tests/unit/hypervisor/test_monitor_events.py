"""Events are kept within a bound, and one that is waited for is never missed."""

import asyncio
import json

import pytest

from hypervisor.monitor.events import KEPT_BYTES, KEPT_EVENTS, Event, EventLog


def add(log: EventLog, name: str, **data: object) -> None:
    log.add(name, json.dumps({"event": name, "data": data}).encode())


def names(log: EventLog) -> list[str]:
    return [event.name for event in log.since(0)]


def test_the_oldest_events_are_dropped_and_counted() -> None:
    log = EventLog()
    for number in range(KEPT_EVENTS + 10):
        add(log, f"E{number}")

    kept = list(log.since(0))
    assert [kept[0].name, kept[-1].name] == ["E10", f"E{KEPT_EVENTS + 9}"]
    assert (len(kept), log.dropped, log.position) == (KEPT_EVENTS, 10, KEPT_EVENTS + 10)


def test_large_events_are_bounded_by_their_size() -> None:
    log = EventLog()
    for _ in range(20):
        log.add("BIG", bytes(KEPT_BYTES // 4))

    assert len(list(log.since(0))) == 4
    log.add("HUGE", bytes(2 * KEPT_BYTES))
    assert names(log) == ["HUGE"]
    assert log.dropped == 20


@pytest.mark.parametrize(
    ("message", "data", "timestamp_s"),
    [
        ({"data": {"a": 1}, "timestamp": {"seconds": 5, "microseconds": 500000}}, {"a": 1}, 5.5),
        ({}, {}, None),
        ({"data": 7, "timestamp": 7}, {}, None),
        ({"data": None, "timestamp": {"seconds": "x", "microseconds": 0}}, {}, None),
        ({"timestamp": {"seconds": 10**400, "microseconds": 0}}, {}, None),
    ],
)
def test_what_an_event_says_is_taken_with_care(
    message: dict[str, object], data: dict[str, object], timestamp_s: float | None
) -> None:
    event = Event(0, "X", json.dumps({"event": "X"} | message).encode())

    assert event.data == data
    assert event.timestamp_s == timestamp_s


def test_events_before_the_position_do_not_count() -> None:
    async def wait() -> Event | None:
        log = EventLog()
        add(log, "SHUTDOWN", n=1)
        position = log.position
        add(log, "STOP")
        add(log, "SHUTDOWN", n=2)
        return await log.next(["SHUTDOWN"], position)

    event = asyncio.run(wait())

    assert event is not None
    assert event.data == {"n": 2}


def test_a_burst_can_not_wash_away_what_is_waited_for() -> None:
    async def wait() -> Event | None:
        log = EventLog()
        waiting = asyncio.create_task(log.next(["SHUTDOWN"], 0))
        await asyncio.sleep(0)
        add(log, "SHUTDOWN")
        for _ in range(2 * KEPT_EVENTS):
            add(log, "NOISE")
        assert "SHUTDOWN" not in names(log)
        return await waiting

    event = asyncio.run(wait())

    assert event is not None
    assert event.name == "SHUTDOWN"


def test_everyone_who_waits_gets_the_event_and_the_end() -> None:
    async def wait() -> tuple[list[Event | None], Event | None]:
        log = EventLog()
        waiting = [asyncio.create_task(log.next(["STOP"], 0)) for _ in range(3)]
        forever = asyncio.create_task(log.next(["NEVER"], 0))
        await asyncio.sleep(0)
        add(log, "STOP")
        got = list(await asyncio.gather(*waiting))
        log.end()
        assert await log.next(["NEVER"], 0) is None
        return got, await forever

    got, never = asyncio.run(wait())

    assert [event and event.name for event in got] == ["STOP"] * 3
    assert never is None


def test_who_gives_up_waiting_leaves_nothing_behind() -> None:
    async def give_up() -> EventLog:
        log = EventLog()
        for _ in range(10):
            with pytest.raises(TimeoutError):
                await asyncio.wait_for(log.next(["NEVER"], 0), 0.001)
        return log

    assert asyncio.run(give_up())._waiters == []


def test_a_slow_reader_goes_on_with_what_is_kept() -> None:
    async def read() -> list[int]:
        log = EventLog()
        add(log, "FIRST")
        events = log.follow(0)
        seen = [(await anext(events)).sequence]
        for _ in range(KEPT_EVENTS + 5):
            add(log, "NOISE")
        log.end()
        return seen + [event.sequence async for event in events]

    assert asyncio.run(read()) == [0, *range(6, KEPT_EVENTS + 6)]
