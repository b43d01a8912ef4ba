"""A monitor that sends without end costs bounded memory and leaves others their time."""

import asyncio
import resource
import socket
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from hypervisor.monitor import Monitor, MonitorGarbled, MonitorTimedOut
from hypervisor.monitor.events import KEPT_BYTES, KEPT_EVENTS

Serve = Callable[[str], socket.socket]

FLOOD_EVENTS = 100_000
MIB = 1 << 20


def resident_bytes() -> int:
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * resource.getpagesize()


def seen(monitor: Monitor) -> int:
    """How many events have come so far."""
    return monitor.events[-1].sequence + 1 if monitor.events else 0


def test_a_flood_of_events_costs_bounded_memory(serve: Serve) -> None:
    async def survive() -> int:
        script = f"greet()\nfor _ in range({FLOOD_EVENTS // 1000}): peer.sendall(EVENT * 1000)\n"
        async with await Monitor.attach(serve(f"{script}answer(hear())")) as monitor:
            before = resident_bytes()
            answer = await monitor.execute("query-status", timeout_s=60)
            growth = resident_bytes() - before
            assert answer == {}
            assert len(monitor.events) == KEPT_EVENTS
            assert monitor.events[-1].sequence == FLOOD_EVENTS - 1
        return growth

    assert asyncio.run(survive()) < 16 * MIB


def test_events_that_swell_when_parsed_are_kept_as_text(serve: Serve) -> None:
    async def survive() -> int:
        async with await Monitor.attach(serve("greet()\nflood(BOMB)")) as monitor:
            before = resident_bytes()
            async with asyncio.timeout(20):
                while seen(monitor) < 20:
                    await asyncio.sleep(0.01)
            assert sum(len(event.line) for event in monitor.events) <= KEPT_BYTES
            return resident_bytes() - before

    # One message of 1 MiB takes 25 MiB while it is parsed; 20 that were kept would take 500.
    assert asyncio.run(survive()) < 120 * MIB


def test_a_flood_leaves_everybody_else_their_turn(serve: Serve) -> None:
    async def live_on() -> tuple[int, int]:
        """How many events there were, and how many at most in one turn of the event loop."""
        async with await Monitor.attach(serve("greet()\nflood(SMALL * 10000)")) as monitor:
            largest, end = 0, time.monotonic() + 1
            while time.monotonic() < end:
                before = seen(monitor)
                await asyncio.sleep(0)
                largest = max(largest, seen(monitor) - before)
            return seen(monitor), largest

    total, largest = asyncio.run(live_on())

    # A turn of the reader ends after 2 ms; one read from the socket brings 17,000 such events.
    assert total > 5000
    assert largest < 5000


def test_a_flood_does_not_outlast_a_deadline(serve: Serve) -> None:
    async def give_up() -> None:
        async with await Monitor.attach(serve("greet()\nflood(EVENT * 1000)")) as monitor:
            with pytest.raises(MonitorTimedOut):
                await monitor.execute("query-status", timeout_s=0.3)

    started = time.monotonic()
    asyncio.run(give_up())
    assert time.monotonic() - started < 5


@pytest.mark.parametrize(
    ("script", "error"),
    [
        ("flood(EVENT * 1000)", MonitorGarbled),
        ("flood(b'x' * 100000)", MonitorGarbled),
        ("flood(GREETING * 1000)", MonitorGarbled),
        ("peer.sendall(GREETING)\nflood(b'x' * 100000)", MonitorGarbled),
        ("peer.sendall(GREETING)\nflood(EVENT * 1000)", MonitorTimedOut),
        ("peer.sendall(GREETING)\nflood(b' ' * 100 + b'\\n')", MonitorGarbled),
    ],
)
def test_a_flood_before_the_greeting_is_over_is_bounded(
    serve: Serve, script: str, error: type[Exception]
) -> None:
    async def refuse() -> None:
        with pytest.raises(error):
            await Monitor.attach(serve(script), timeout_s=0.5)

    before, started = resident_bytes(), time.monotonic()
    asyncio.run(refuse())
    assert resident_bytes() - before < 16 * MIB
    assert time.monotonic() - started < 5
