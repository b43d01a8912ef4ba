"""The monitor's client keeps its promises towards servers that keep none."""

import asyncio
import gc
import logging
import os
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Coroutine, Iterator
from pathlib import Path
from typing import Any, TypeVar

import pytest

from hypervisor.monitor import (
    CommandForbidden,
    CommandRefused,
    Monitor,
    MonitorClosed,
    MonitorError,
    MonitorGarbled,
    MonitorTimedOut,
    MonitorUnreachable,
)
from hypervisor.monitor.client import MESSAGE_LIMIT_BYTES, UNSENT_LIMIT_BYTES

Serve = Callable[[str], socket.socket]
T = TypeVar("T")

SERVER = r"""
import json, os, socket, sys, time
peer = socket.socket(fileno=int(sys.argv[1]))
GREETING = b'{"QMP": {"version": {"qemu": {"major": 7}}, "capabilities": ["oob"]}}\r\n'
unread = ""
def hear():
    global unread
    while True:
        try:
            command, end = json.JSONDecoder().raw_decode(unread.lstrip())
            unread = unread.lstrip()[end:]
            return command
        except ValueError:
            chunk = peer.recv(65536)
            if not chunk:
                sys.exit()
            unread += chunk.decode()
def say(message):
    peer.sendall(json.dumps(message).encode() + b"\r\n")
def answer(command, value={}):
    say({"return": value, "id": command["id"]})
def refuse(command, kind="GenericError", words="no"):
    say({"error": {"class": kind, "desc": words}, "id": command["id"]})
def greet():
    peer.sendall(GREETING)
    command = hear()
    assert command["execute"] == "qmp_capabilities", command
    answer(command)
def stay():
    while peer.recv(65536):
        pass
"""


@pytest.fixture
def serve() -> Iterator[Serve]:
    """Run a script as a monitor in a process of its own; gives the client's end of the line."""
    servers = []

    def start(script: str) -> socket.socket:
        ours, theirs = socket.socketpair()
        with theirs:
            argv = [sys.executable, "-I", "-S", "-c", SERVER + script, str(theirs.fileno())]
            servers.append(subprocess.Popen(argv, pass_fds=[theirs.fileno()]))
        return ours

    yield start
    for server in servers:
        server.kill()
        server.wait()


def run(coroutine: Coroutine[Any, Any, T]) -> T:
    """Run to the end, which must come soon, with one thread and no descriptor left over."""
    before = len(os.listdir("/proc/self/fd"))

    async def watched() -> T:
        async with asyncio.timeout(20):
            result = await coroutine
        assert threading.active_count() == 1
        return result

    try:
        return asyncio.run(watched())
    finally:
        gc.collect()
        # What the server's end is stays open in neither case.
        assert len(os.listdir("/proc/self/fd")) <= before


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

    assert run(ask()) == ["query-0", "query-1", "query-2"]


def test_the_short_names_send_what_they_say(serve: Serve) -> None:
    async def ask() -> None:
        script = """
greet()
for wanted in "system_powerdown", "system_reset", "cont", "query-status":
    command = hear()
    assert command["execute"] == wanted
    answer(command, {"status": "running"} if wanted == "query-status" else {})
assert hear()["execute"] == "quit"
"""
        async with await Monitor.attach(serve(script)) as monitor:
            await monitor.powerdown()
            await monitor.reset()
            await monitor.cont()
            assert await monitor.status() == "running"
            await monitor.quit()
            assert isinstance(monitor.ended, MonitorClosed)

    run(ask())


@pytest.mark.parametrize("script", ["stay()", "peer.sendall(GREETING); stay()"])
def test_a_silent_monitor_is_given_up_in_time(serve: Serve, script: str) -> None:
    started = time.monotonic()

    error = run(failure_of(serve(script), timeout_s=0.3))

    assert isinstance(error, MonitorTimedOut)
    assert "within 0.3 s" in error.message
    assert time.monotonic() - started < 5


def test_a_command_without_an_answer_is_given_up_in_time(serve: Serve) -> None:
    error = run(failure_of_command(serve("greet(); stay()"), timeout_s=0.2))

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
    error = run(failure_of(serve(script)))

    assert isinstance(error, MonitorGarbled)
    assert error.message.isprintable()
    assert error.evidence.received.isprintable()
    assert 0 < len(error.evidence.received) < 4000


def test_refused_capabilities_show_qemus_words(serve: Serve) -> None:
    script = "peer.sendall(GREETING); refuse(hear(), words='no\\x1b[2J'); stay()"

    error = run(failure_of(serve(script)))

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
    assert isinstance(run(failure_of(serve(script))), MonitorClosed)


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

    first, second = run(ask())

    assert isinstance(first, MonitorGarbled)
    assert finding in first.finding
    assert second is first


def test_qemus_error_is_told_with_its_class(serve: Serve) -> None:
    script = "greet(); refuse(hear(), 'DeviceNotFound', 'no x\\n'); stay()"

    error = run(failure_of_command(serve(script)))

    assert isinstance(error, CommandRefused)
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

    assert run(ask()) == ("right", "next")


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

    assert run(ask()) == 2


def test_a_monitor_that_goes_away_fails_all_that_wait(serve: Serve) -> None:
    async def ask() -> list[Any]:
        async with await Monitor.attach(serve("greet(); hear(); hear(); sys.exit()")) as monitor:
            tasks = [
                monitor.execute("first"),
                monitor.execute("second"),
                monitor.wait_event(["SHUTDOWN"], timeout_s=10),
            ]
            return await asyncio.gather(*tasks, return_exceptions=True)

    assert [type(result) for result in run(ask())] == [MonitorClosed] * 3


def test_arguments_that_are_no_json_harm_nothing(serve: Serve) -> None:
    async def ask() -> Any:
        async with await Monitor.attach(serve("greet(); answer(hear(), 1); stay()")) as monitor:
            with pytest.raises(TypeError):
                await monitor.execute("x", {"y": object()})
            return await monitor.execute("query-status")

    assert run(ask()) == 1


def test_secret_arguments_are_in_no_error(serve: Serve) -> None:
    async def ask() -> MonitorError:
        async with await Monitor.attach(serve("greet(); refuse(hear()); stay()")) as monitor:
            with pytest.raises(CommandRefused) as caught:
                await monitor.execute("set_password", {"protocol": "vnc", "password": "tulip"})
        return caught.value

    error = run(ask())

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

    assert run(ask()) == "alive"


def test_events_are_waited_for_and_iterated(serve: Serve) -> None:
    async def watch() -> tuple[list[str], str]:
        script = """
peer.sendall(GREETING); c = hear(); say({"event": "EARLY"}); answer(c)
c = hear(); say({"event": "STOP"}); say({"event": "SHUTDOWN", "data": {"guest": True}}); answer(c)
sys.exit()
"""
        async with await Monitor.attach(serve(script)) as monitor:
            position = monitor.position
            await monitor.execute("system_powerdown")
            shutdown = await monitor.wait_event(["SHUTDOWN"], timeout_s=5, after=position)
            assert shutdown.data == {"guest": True}
            with pytest.raises(MonitorClosed):
                await monitor.wait_event(["STOP"], timeout_s=5, after=monitor.position)
            names = [event.name async for event in monitor.events()]
        return names, shutdown.name

    assert run(watch()) == (["EARLY", "STOP", "SHUTDOWN"], "SHUTDOWN")


def test_an_event_that_does_not_come_is_given_up_in_time(serve: Serve) -> None:
    async def watch() -> None:
        script = "greet(); say({'event': 'RESET'}); answer(hear()); stay()"
        async with await Monitor.attach(serve(script)) as monitor:
            await monitor.execute("query-status")
            with pytest.raises(MonitorTimedOut, match="send the event RESET or STOP"):
                await monitor.wait_event(["RESET", "STOP"], timeout_s=0.1)

    run(watch())


def test_closing_ends_whoever_still_waits(serve: Serve) -> None:
    async def close() -> list[Any]:
        monitor = await Monitor.attach(serve("greet(); stay()"))
        waiting = [
            asyncio.create_task(monitor.execute("slow")),
            asyncio.create_task(monitor.wait_event(["X"], timeout_s=10)),
        ]
        await asyncio.sleep(0.05)
        await asyncio.gather(monitor.close(), monitor.close())
        await monitor.close()
        return await asyncio.gather(*waiting, return_exceptions=True)

    results = run(close())

    assert [type(result) for result in results] == [MonitorClosed] * 2
    assert "by this side" in results[0].message


def test_a_monitor_that_reads_nothing_can_be_closed(serve: Serve) -> None:
    async def close() -> float:
        monitor = await Monitor.attach(serve("greet(); time.sleep(60)"))
        with pytest.raises(MonitorTimedOut, match="read what it is sent"):
            for _ in range(30):
                with pytest.raises(MonitorTimedOut, match="answer"):
                    await monitor.execute("x", {"y": "z" * UNSENT_LIMIT_BYTES}, timeout_s=0.01)
                await monitor.execute_with_fd("getfd", {"fdname": "x"}, 0, timeout_s=0.01)
        started = time.monotonic()
        await monitor.close()
        return time.monotonic() - started

    assert run(close()) < 1


def test_a_line_without_an_end_ends_the_connection(serve: Serve) -> None:
    script = f"greet(); hear(); peer.sendall(b'x' * {3 * MESSAGE_LIMIT_BYTES}); stay()"

    error = run(failure_of_command(serve(script)))

    assert isinstance(error, MonitorGarbled)
    assert f"more than {MESSAGE_LIMIT_BYTES} bytes" in error.finding


def test_a_large_reply_within_the_bound_is_fine(serve: Serve) -> None:
    async def ask() -> Any:
        script = f"greet(); answer(hear(), 'x' * {MESSAGE_LIMIT_BYTES - 100}); stay()"
        async with await Monitor.attach(serve(script)) as monitor:
            return await monitor.execute("query-qmp-schema")

    assert len(run(ask())) == MESSAGE_LIMIT_BYTES - 100


def test_a_descriptor_arrives_with_its_command(serve: Serve) -> None:
    async def pass_them() -> list[Any]:
        script = r"""
greet()
for _ in range(2):
    data, descriptors, _, _ = socket.recv_fds(peer, 1, 4)
    assert (data, len(descriptors)) == (b" ", 1)
    answer(hear(), os.read(descriptors[0], 100).decode())
stay()
"""
        pipes = [os.pipe(), os.pipe()]
        for number, (_, writer) in enumerate(pipes):
            os.write(writer, f"pipe {number}".encode())
        try:
            async with await Monitor.attach(serve(script)) as monitor:
                return await asyncio.gather(
                    *(
                        monitor.execute_with_fd("getfd", {"fdname": "x"}, reader)
                        for reader, _ in pipes
                    )
                )
        finally:
            for descriptor in (*pipes[0], *pipes[1]):
                os.close(descriptor)

    assert run(pass_them()) == ["pipe 0", "pipe 1"]


def test_a_descriptor_without_an_answer_ends_the_connection(serve: Serve) -> None:
    async def pass_it() -> None:
        async with await Monitor.attach(serve("greet(); stay()")) as monitor:
            with pytest.raises(MonitorTimedOut) as caught:
                await monitor.execute_with_fd("getfd", {"fdname": "x"}, 0, timeout_s=0.1)
            assert monitor.ended is caught.value

    run(pass_it())


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

    run(forget())
    gc.collect()

    assert [record for record in caplog.records if "secret" in str(record.__dict__)] == []
    assert [record for record in caplog.records if record.levelno > logging.DEBUG] == []


LISTENER = r"""
listening = peer
print(flush=True)
peer, _ = listening.accept()
greet(); answer(hear(), {"status": "running"}); stay()
"""


@pytest.fixture
def listen() -> Iterator[Callable[[Path], socket.socket]]:
    """Bind a listening socket at a path of any length."""
    sockets = []

    def bind(path: Path) -> socket.socket:
        listening = socket.socket(socket.AF_UNIX)
        sockets.append(listening)
        directory = os.open(path.parent, os.O_PATH)
        listening.bind(f"/proc/self/fd/{directory}/{path.name}")
        os.close(directory)
        listening.listen(0)
        return listening

    yield bind
    for listening in sockets:
        listening.close()


@pytest.mark.parametrize("depth", [0, 3])
def test_a_path_may_be_longer_than_a_socket_address(
    tmp_path: Path, listen: Callable[[Path], socket.socket], depth: int
) -> None:
    path = tmp_path.joinpath(*["d" * 60] * depth, "monitor")
    path.parent.mkdir(parents=True, exist_ok=True)
    listening = listen(path)
    argv = [sys.executable, "-I", "-S", "-c", SERVER + LISTENER, str(listening.fileno())]

    async def ask() -> str:
        async with await Monitor.connect(path) as monitor:
            return await monitor.status()

    with subprocess.Popen(argv, pass_fds=[listening.fileno()], stdout=subprocess.PIPE) as server:
        assert server.stdout is not None
        server.stdout.readline()
        assert run(ask()) == "running"
        server.kill()


def test_a_path_without_a_monitor_is_said(tmp_path: Path) -> None:
    plain = tmp_path / "file"
    plain.touch()
    stale = tmp_path / "stale"
    with socket.socket(socket.AF_UNIX) as listening:
        listening.bind(str(stale))

    for path in (tmp_path / "missing", plain, stale, tmp_path / ("x" * 200) / "missing"):
        with pytest.raises(MonitorUnreachable) as caught:
            run(Monitor.connect(path))
        assert path.name in caught.value.message


def test_a_monitor_that_serves_another_is_given_up_in_time(
    tmp_path: Path, listen: Callable[[Path], socket.socket]
) -> None:
    listen(tmp_path / "monitor")
    waiting = socket.socket(socket.AF_UNIX)

    with waiting:
        waiting.connect(str(tmp_path / "monitor"))
        with pytest.raises(MonitorTimedOut) as caught:
            run(Monitor.connect(tmp_path / "monitor", timeout_s=0.2))
    assert caught.value.what == "take a call"
    assert caught.value.hint is not None
