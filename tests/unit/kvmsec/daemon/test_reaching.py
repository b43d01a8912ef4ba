"""The way to the daemon, where one is about to end, begins anew, or says nothing."""

import asyncio
import contextlib
import socket
from collections.abc import Awaitable, Callable
from pathlib import Path

import pytest

from kvmsec.daemon import reaching
from kvmsec.daemon.listening import local_socket
from kvmsec.daemon.reaching import DaemonSilent, reach
from kvmsec.node.waiting import readable
from kvmsec.rpc.frames import Request, serve_frames


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "node.sock"


def run(test: Callable[[], Awaitable[None]]) -> None:
    async def bounded() -> None:
        async with asyncio.timeout(20):
            await test()

    asyncio.run(bounded())


async def take(listener: socket.socket) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    listener.setblocking(False)
    accepted, _ = await asyncio.get_running_loop().sock_accept(listener)
    return await asyncio.open_connection(sock=accepted)


async def greet(request: Request) -> bytes:
    return b"{}"


@pytest.mark.parametrize("is_taken", [False, True])
def test_a_daemon_that_ends_before_it_answers_is_none(path: Path, is_taken: bool) -> None:
    """It listens until all has ended that it waits for, and answers nobody any more."""

    async def act() -> None:
        with contextlib.ExitStack() as connections:
            with local_socket(path) as listener:
                asking = asyncio.create_task(reach(path))
                assert await readable(listener.fileno(), 20)
                if is_taken:
                    connections.enter_context(listener.accept()[0])
            assert not asking.done()
        assert await asking is None

    run(act)


def test_its_successor_is_asked_instead(path: Path) -> None:
    async def act() -> None:
        with local_socket(path) as listener:
            asking = asyncio.create_task(reach(path))
            assert await readable(listener.fileno(), 20)
        with local_socket(path) as listener:
            serving = asyncio.create_task(serve_frames(*await take(listener), greet))
            node = await asking
            assert node is not None
            await node.close()
            await serving

    run(act)


def test_one_that_ends_each_connection_is_asked_a_few_times(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(reaching, "_PAUSES_S", (0.01, 0.02))
    taken = 0

    async def end_each(listener: socket.socket) -> None:
        nonlocal taken
        while True:
            _, writer = await take(listener)
            writer.close()
            taken += 1

    async def act() -> None:
        with local_socket(path) as listener:
            ending = asyncio.create_task(end_each(listener))
            with pytest.raises(DaemonSilent, match="ended the connection"):
                await reach(path)
            ending.cancel()
            await asyncio.gather(ending, return_exceptions=True)

    run(act)
    assert taken == 3


def test_one_that_says_nothing_is_silent(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reaching, "ANSWER_WITHIN_S", 0.2)

    async def act() -> None:
        told = r"nothing came within 0\.2 s"
        with local_socket(path), pytest.raises(DaemonSilent, match=told):
            await reach(path)

    run(act)
