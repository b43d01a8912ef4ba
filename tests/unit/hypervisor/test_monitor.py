"""Commands get their own answers, events are kept, and an end is an end."""

import asyncio
import gc
import logging
import socket
from collections.abc import Callable
from typing import Any

import pytest

from hypervisor.monitor import (
    CommandForbidden,
    CommandRefused,
    Monitor,
    MonitorClosed,
    MonitorError,
    MonitorGarbled,
    MonitorTimedOut,
)
from hypervisor.monitor.client import MESSAGE_LIMIT_BYTES

Serve = Callable[[str], socket.socket]


def test_a_command_gets_its_own_answer(serve: Serve) -> None:
    async def ask() -> list[Any]:
        script = """
greet()
a, b, c = hear(), hear(), hear()
for command in c, a, b:
    answer(command, command["execute"])
stay()
"""
        async with await Monitor.attach(serve(script)) as monitor:
            assert monitor.ended is None
            return await asyncio.gather(*(monitor.execute(f"query-{n}") for n in range(3)))

    assert asyncio.run(ask()) == ["query-0", "query-1", "query-2"]


def test_the_short_names_send_what_they_say(serve: Serve) -> None:
    async def ask() -> None:
        script = """
greet()
for wanted in "system_powerdown", "system_reset", "cont", "query-status":
    command = hear()
    assert command["execute"] == wanted
    answer(command, {"status": "running"} if wanted == "query-status" else {})
stay()
"""
        async with await Monitor.attach(serve(script)) as monitor:
            await monitor.powerdown()
            await monitor.reset()
            await monitor.cont()
            assert await monitor.status() == "running"

    asyncio.run(ask())


def test_qemus_error_is_told_with_its_class(serve: Serve) -> None:
    async def ask() -> CommandRefused:
        script = "greet(); refuse(hear(), 'DeviceNotFound', 'no x\\n'); stay()"
        async with await Monitor.attach(serve(script)) as monitor:
            with pytest.raises(CommandRefused) as caught:
                await monitor.execute("query-status")
        return caught.value

    error = asyncio.run(ask())

    assert (error.command, error.error_class) == ("query-status", "DeviceNotFound")
    assert error.description == "no x\n"
    assert error.message == r"QEMU refused query-status: no x\n"
    assert "DeviceNotFound" in error.evidence.received


def test_a_late_answer_is_dropped_and_the_connection_stays(serve: Serve) -> None:
    async def ask() -> Any:
        script = """
greet()
late, quick = hear(), hear()
answer(late, "late"); answer(quick, "right"); answer(quick, "twice")
answer(hear(), "next")
stay()
"""
        async with await Monitor.attach(serve(script)) as monitor:
            with pytest.raises(MonitorTimedOut):
                await monitor.execute("slow", timeout_s=0.1)
            return await monitor.execute("quick"), await monitor.execute("next")

    assert asyncio.run(ask()) == ("right", "next")


def test_a_command_that_is_cancelled_harms_no_other(serve: Serve) -> None:
    async def ask() -> Any:
        script = "greet(); first, second = hear(), hear(); answer(first); answer(second, 2); stay()"
        async with await Monitor.attach(serve(script)) as monitor:
            task = asyncio.create_task(monitor.execute("first"))
            await asyncio.sleep(0.05)
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
            return await monitor.execute("second")

    assert asyncio.run(ask()) == 2


def test_arguments_that_are_no_json_harm_nothing(serve: Serve) -> None:
    async def ask() -> Any:
        async with await Monitor.attach(serve("greet(); answer(hear(), 1); stay()")) as monitor:
            with pytest.raises(TypeError):
                await monitor.execute("x", {"y": object()})
            return await monitor.execute("query-status")

    assert asyncio.run(ask()) == 1


def test_secret_arguments_are_in_no_error(serve: Serve) -> None:
    async def ask() -> MonitorError:
        async with await Monitor.attach(serve("greet(); refuse(hear()); stay()")) as monitor:
            with pytest.raises(CommandRefused) as caught:
                await monitor.execute("set_password", {"protocol": "vnc", "password": "tulip"})
        return caught.value

    error = asyncio.run(ask())

    assert error.evidence.sent == "set_password(protocol, password)"
    assert "tulip" not in repr(vars(error))


def test_a_program_is_never_started_for_a_migration(serve: Serve) -> None:
    async def ask() -> Any:
        async with await Monitor.attach(
            serve("greet(); answer(hear(), 'alive'); stay()")
        ) as monitor:
            with pytest.raises(CommandForbidden):
                await monitor.execute("migrate", {"uri": "exec:cat"})
            return await monitor.execute("query-status")

    assert asyncio.run(ask()) == "alive"


def test_events_are_kept_in_their_order(serve: Serve) -> None:
    async def watch() -> list[tuple[int, str]]:
        script = """
peer.sendall(GREETING); c = hear(); say({"event": "EARLY"}); answer(c)
c = hear(); say({"event": "STOP"}); say({"event": "SHUTDOWN", "data": {"guest": True}}); answer(c)
sys.exit()
"""
        async with await Monitor.attach(serve(script)) as monitor:
            await monitor.execute("system_powerdown")
        return [(event.sequence, event.name) for event in monitor.events]

    assert asyncio.run(watch()) == [(0, "EARLY"), (1, "STOP"), (2, "SHUTDOWN")]


def test_closing_ends_whoever_still_waits(serve: Serve) -> None:
    async def close() -> list[Any]:
        monitor = await Monitor.attach(serve("greet(); stay()"))
        waiting = [
            asyncio.create_task(monitor.execute("slow")),
            asyncio.create_task(monitor.execute("slower")),
        ]
        await asyncio.sleep(0.05)
        await asyncio.gather(monitor.close(), monitor.close())
        await monitor.close()
        return await asyncio.gather(*waiting, return_exceptions=True)

    results = asyncio.run(close())

    assert [type(result) for result in results] == [MonitorClosed] * 2
    assert "by this side" in results[0].message


def test_a_large_reply_within_the_bound_is_fine(serve: Serve) -> None:
    async def ask() -> Any:
        script = f"greet(); answer(hear(), 'x' * {MESSAGE_LIMIT_BYTES - 100}); stay()"
        async with await Monitor.attach(serve(script)) as monitor:
            return await monitor.execute("query-qmp-schema")

    assert len(asyncio.run(ask())) == MESSAGE_LIMIT_BYTES - 100


def test_nothing_is_logged_even_when_nobody_closes(
    serve: Serve, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG)

    async def forget() -> None:
        monitor = await Monitor.attach(
            serve("greet(); c = hear(); peer.sendall(b'secret\\n'); stay()")
        )
        with pytest.raises(MonitorGarbled):
            await monitor.execute("set_password", {"password": "secret"})
        with pytest.raises(MonitorGarbled):
            await Monitor.attach(serve("peer.sendall(b'secret\\n'); stay()"))

    asyncio.run(forget())
    gc.collect()

    assert [record for record in caplog.records if "secret" in str(record.__dict__)] == []
    assert [record for record in caplog.records if record.levelno > logging.DEBUG] == []
