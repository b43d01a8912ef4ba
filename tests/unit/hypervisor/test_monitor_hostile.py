"""The monitor's client keeps its promises towards servers that keep none."""

import asyncio
import contextlib
import socket
import time
from collections.abc import Callable
from typing import Any

import pytest

from hypervisor.monitor import (
    CommandRefused,
    Monitor,
    MonitorClosed,
    MonitorError,
    MonitorGarbled,
    MonitorTimedOut,
)
from hypervisor.monitor.client import MESSAGE_LIMIT_BYTES, UNSENT_LIMIT_BYTES

Serve = Callable[[str], socket.socket]


async def failure_of(connected: socket.socket, timeout_s: float = 10) -> MonitorError:
    """What `attach` raises."""
    with pytest.raises(MonitorError) as caught:
        await Monitor.attach(connected, timeout_s=timeout_s)
    return caught.value


async def failure_of_command(connected: socket.socket, timeout_s: float = 10) -> MonitorError:
    """What `query-status` raises once connected, and that the monitor closes after it."""
    async with await Monitor.attach(connected) as monitor:
        with pytest.raises(MonitorError) as caught:
            await monitor.execute("query-status", timeout_s=timeout_s)
    return caught.value


@pytest.mark.parametrize("script", ["stay()", "peer.sendall(GREETING); stay()"])
def test_a_silent_monitor_is_given_up_in_time(serve: Serve, script: str) -> None:
    started = time.monotonic()

    error = asyncio.run(failure_of(serve(script), timeout_s=0.3))

    assert isinstance(error, MonitorTimedOut)
    assert "within 0.3 s" in error.message
    assert time.monotonic() - started < 5


def test_a_command_without_an_answer_is_given_up_in_time(serve: Serve) -> None:
    error = asyncio.run(failure_of_command(serve("greet(); stay()"), timeout_s=0.2))

    assert isinstance(error, MonitorTimedOut)
    assert error.message == "QEMU's monitor did not answer query-status within 0.2 s"
    assert error.evidence.sent == "query-status()"


@pytest.mark.parametrize(
    "script",
    [
        r"peer.sendall(b'SSH-2.0-OpenSSH\r\n'); stay()",
        r"peer.sendall(b'\x00\xff\x1b[2J\n'); stay()",
        r"peer.sendall(b'{\"a\": ' * 100000 + b'\n'); stay()",
        r"peer.sendall(b'[' * 100000 + b'\n'); stay()",
        r"peer.sendall(b'{\"QMP\": ' + b'9' * 10000 + b'}\n'); stay()",
        "say([]); stay()",
        "say(7); stay()",
        "say({}); stay()",
        "say({'QMP': 7}); stay()",
        "say({'QMP': {'version': [], 'capabilities': 7}}); stay()",
        "say({'event': 'EARLY'}); stay()",
        "peer.sendall(GREETING); say({'return': {}}); stay()",
        "peer.sendall(GREETING); say({'return': {}, 'id': 'other'}); stay()",
        "peer.sendall(GREETING); say({'return': {}, 'id': {}}); stay()",
        "peer.sendall(GREETING); say({'id': hear()['id']}); stay()",
        "peer.sendall(GREETING); peer.sendall(b'nonsense\\n'); stay()",
    ],
)
def test_whoever_does_not_greet_as_qmp_is_hung_up_on(serve: Serve, script: str) -> None:
    error = asyncio.run(failure_of(serve(script)))

    assert isinstance(error, MonitorGarbled)
    assert error.message.isprintable()
    assert error.evidence.received.isprintable()
    assert 0 < len(error.evidence.received) < 4000


def test_refused_capabilities_show_qemus_words(serve: Serve) -> None:
    script = "peer.sendall(GREETING); refuse(hear(), words='no\\x1b[2J'); stay()"

    error = asyncio.run(failure_of(serve(script)))

    assert isinstance(error, CommandRefused)
    assert error.message == r"QEMU refused qmp_capabilities: no\x1b[2J"


@pytest.mark.parametrize(
    "script",
    [
        "sys.exit()",
        "peer.sendall(GREETING); sys.exit()",
        "peer.sendall(GREETING); hear(); sys.exit()",
    ],
)
def test_a_monitor_that_hangs_up_early_is_said(serve: Serve, script: str) -> None:
    assert isinstance(asyncio.run(failure_of(serve(script))), MonitorClosed)


@pytest.mark.parametrize(
    ("reply", "finding"),
    [
        ("say({'return': {}, 'id': 'x'})", "never sent"),
        ("say({'return': {}, 'id': '__qmp#00099'})", "never sent"),
        ("say({'return': {}, 'id': '__qmp#٣'})", "never sent"),
        ("say({'return': {}, 'id': '__qmp#' + '9' * 5000})", "never sent"),
        ("say({'return': {}, 'id': []})", "never sent"),
        ("say({'return': {}})", "never sent"),
        ("say({'error': {'class': 'GenericError', 'desc': 'JSON'}})", "could not read"),
        ("say({'id': c['id']})", "neither a result nor an error"),
        ("say({'error': 7, 'id': c['id']})", "malformed error"),
        ("say({'error': {'class': 1, 'desc': 'x'}, 'id': c['id']})", "malformed error"),
        ("say({'event': 7})", "proper name"),
        ("say({'event': 'x' * 1000})", "proper name"),
        ("say([1])", "not a JSON object"),
        ("peer.sendall(b'\\xff\\n')", "not a JSON object"),
        ("peer.sendall(b'{\"ret'); sys.exit()", "in the middle of a message"),
    ],
)
def test_a_garbled_reply_ends_the_connection(serve: Serve, reply: str, finding: str) -> None:
    async def ask() -> tuple[MonitorError, MonitorError]:
        async with await Monitor.attach(serve(f"greet(); c = hear(); {reply}; stay()")) as monitor:
            with pytest.raises(MonitorError) as first:
                await monitor.execute("query-status")
            with pytest.raises(MonitorError) as second:
                await monitor.execute("query-status")
            assert monitor.ended is second.value
        return first.value, second.value

    first, second = asyncio.run(ask())

    assert isinstance(first, MonitorGarbled)
    assert finding in first.finding
    assert second is first


def test_a_monitor_that_goes_away_fails_all_that_wait(serve: Serve) -> None:
    async def ask() -> list[Any]:
        async with await Monitor.attach(serve("greet(); hear(); hear(); sys.exit()")) as monitor:
            tasks = [
                monitor.execute("first"),
                monitor.execute("second"),
            ]
            return await asyncio.gather(*tasks, return_exceptions=True)

    assert [type(result) for result in asyncio.run(ask())] == [MonitorClosed] * 2


def test_a_monitor_that_reads_nothing_can_be_closed(serve: Serve) -> None:
    async def close() -> float:
        monitor = await Monitor.attach(serve("greet(); time.sleep(60)"))
        with pytest.raises(MonitorTimedOut, match="read what it is sent"):
            for _ in range(30):
                with contextlib.suppress(MonitorTimedOut):
                    await monitor.execute("x", {"y": "z" * UNSENT_LIMIT_BYTES}, timeout_s=0.01)
            await monitor.execute("query-status", timeout_s=0.01)
        started = time.monotonic()
        await monitor.close()
        return time.monotonic() - started

    assert asyncio.run(close()) < 1


def test_a_line_without_an_end_ends_the_connection(serve: Serve) -> None:
    script = f"greet(); hear(); peer.sendall(b'x' * {3 * MESSAGE_LIMIT_BYTES}); stay()"

    error = asyncio.run(failure_of_command(serve(script)))

    assert isinstance(error, MonitorGarbled)
    assert f"more than {MESSAGE_LIMIT_BYTES} bytes" in error.finding
