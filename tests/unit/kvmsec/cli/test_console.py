"""`instance console`: bytes both ways, the terminal put back, and every way to end."""

import asyncio
import contextlib
import os
import pty
import socket
import termios
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from kvmsec.agent import InstanceInfo, InstanceState
from kvmsec.cli import console
from kvmsec.cli.console import NoConsole, run_console
from kvmsec.cli.output import ReaderGone
from kvmsec.errors import UnknownInstance

DEADLINE_S = 10.0

Guest = Callable[[socket.socket], Awaitable[None]]


@pytest.fixture(autouse=True)
def short_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(console, "_QUIET_S", 0.2)
    monkeypatch.setattr(console, "_ACCEPT_S", 0.3)


@pytest.fixture
def listener(tmp_path: Path, node: Any) -> Iterator[socket.socket]:
    """The serial socket of the running instance `web`, below a path too long for an address."""
    folder = tmp_path / ("deep" * 30)
    folder.mkdir()
    directory = os.open(folder, os.O_PATH)
    with socket.socket(socket.AF_UNIX) as listening:
        listening.bind(f"/proc/self/fd/{directory}/serial.sock")
        os.close(directory)
        listening.listen(1)
        listening.setblocking(False)
        path = str(folder / "serial.sock")
        node.infos = [
            InstanceInfo(name="web", state=InstanceState.RUNNING, details={"serial_socket": path})
        ]
        yield listening


@pytest.fixture
def streams(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[int, int], None]]:
    """Puts descriptors in place of stdin and stdout; stderr goes nowhere."""
    nowhere = os.open(os.devnull, os.O_WRONLY)

    def put(stdin: int, stdout: int) -> None:
        for name, descriptor in (("stdin", stdin), ("stdout", stdout), ("stderr", nowhere)):
            stream = SimpleNamespace(fileno=lambda descriptor=descriptor: descriptor)
            monkeypatch.setattr(f"sys.{name}", stream)

    yield put
    os.close(nowhere)


def attach(node: Any, listener: socket.socket, guest: Guest) -> None:
    """Run the console against a guest that has accepted it."""

    async def serve() -> None:
        line, _ = await asyncio.get_running_loop().sock_accept(listener)
        with line:
            await guest(line)

    async def both() -> None:
        async with asyncio.timeout(DEADLINE_S), asyncio.TaskGroup() as group:
            group.create_task(serve())
            await run_console(node, "web")

    asyncio.run(both())


async def hear(line: socket.socket, wanted: bytes) -> None:
    heard = b""
    while wanted not in heard:
        data = await asyncio.get_running_loop().sock_recv(line, 4096)
        assert data, f"closed after {heard!r}"
        heard += data


async def say(line: socket.socket, data: bytes) -> None:
    await asyncio.get_running_loop().sock_sendall(line, data)


def test_a_pipe_is_copied_and_the_answer_awaited(
    node: Any, listener: socket.socket, streams: Any, tmp_path: Path
) -> None:
    read, write = os.pipe()
    out = os.open(tmp_path / "out", os.O_WRONLY | os.O_CREAT)
    os.write(write, b"hello\x1d\x03")
    os.close(write)
    streams(read, out)

    async def guest(line: socket.socket) -> None:
        await hear(line, b"hello\x1d\x03")
        await asyncio.sleep(0.05)
        await say(line, b"\x1b[2J\xffanswer")
        await hear_end(line)

    attach(node, listener, guest)

    assert (tmp_path / "out").read_bytes() == b"\x1b[2J\xffanswer"


async def hear_end(line: socket.socket) -> None:
    while await asyncio.get_running_loop().sock_recv(line, 4096):
        pass


def test_a_file_is_sent_whole(
    node: Any, listener: socket.socket, streams: Any, tmp_path: Path
) -> None:
    content = os.urandom(3_000_000)
    (tmp_path / "in").write_bytes(content)
    source = os.open(tmp_path / "in", os.O_RDONLY)
    out = os.open(tmp_path / "out", os.O_WRONLY | os.O_CREAT)
    streams(source, out)
    heard = bytearray()

    async def guest(line: socket.socket) -> None:
        while data := await asyncio.get_running_loop().sock_recv(line, 65536):
            heard.extend(data)

    attach(node, listener, guest)

    assert bytes(heard) == content


def test_it_ends_when_the_guest_does(
    node: Any, listener: socket.socket, streams: Any, tmp_path: Path
) -> None:
    read, write = os.pipe()
    out = os.open(tmp_path / "out", os.O_WRONLY | os.O_CREAT)
    streams(read, out)

    attach(node, listener, lambda line: say(line, b"bye"))

    os.close(write)
    assert (tmp_path / "out").read_bytes() == b"bye"


@pytest.fixture
def terminal(streams: Any) -> Iterator["Terminal"]:
    far, near = pty.openpty()
    before = termios.tcgetattr(near)
    yield Terminal(far, near, streams)
    assert termios.tcgetattr(near) == before, "the terminal was not put back"
    os.close(far)
    os.close(near)


class Terminal:
    """A person's side of a terminal."""

    def __init__(self, far: int, near: int, streams: Any) -> None:
        self._far = far
        self._near = near
        self._streams = streams
        self.seen = b""
        os.set_blocking(far, False)

    def use(self) -> None:
        """Make it stdin and stdout; in the test itself, since pytest puts its own there before."""
        self._streams(self._near, self._near)

    async def until_raw(self) -> None:
        """What is typed before is not the guest's."""
        while termios.tcgetattr(self._near)[3] & termios.ICANON:
            await asyncio.sleep(0.01)

    async def type_in(self, data: bytes) -> None:
        while data:
            with contextlib.suppress(BlockingIOError):
                data = data[os.write(self._far, data) :]
            await self.look()

    async def see(self, wanted: bytes) -> None:
        while wanted not in self.seen:
            await self.look()

    async def look(self) -> None:
        with contextlib.suppress(BlockingIOError):
            self.seen += os.read(self._far, 1 << 16)
        await asyncio.sleep(0)


def test_keys_reach_the_guest_as_they_are_until_the_one_that_leaves(
    node: Any, listener: socket.socket, terminal: Terminal
) -> None:
    terminal.use()

    async def guest(line: socket.socket) -> None:
        await terminal.until_raw()
        await terminal.type_in(b"\x03\x04\r\x1a")
        await hear(line, b"\x03\x04\r\x1a")
        await say(line, b"\x1b[31mred\n")
        await terminal.see(b"\x1b[31mred\n")  # no CR was put before the LF
        await terminal.type_in(b"x\x1dafter")
        await hear(line, b"x")
        await hear_end(line)

    attach(node, listener, guest)


def test_a_guest_that_does_not_listen_can_be_left(
    node: Any, listener: socket.socket, terminal: Terminal
) -> None:
    """More is typed than a line holds that nobody reads; the bell tells of what is lost."""
    terminal.use()

    async def guest(line: socket.socket) -> None:
        await terminal.until_raw()
        await terminal.type_in(b"y" * 2_000_000 + b"\x1d")
        await hear_end(line)

    attach(node, listener, guest)

    assert b"\a" in terminal.seen


def test_an_interrupted_console_puts_the_terminal_back(
    node: Any, listener: socket.socket, terminal: Terminal
) -> None:
    terminal.use()

    async def attach_and_cancel() -> None:
        task = asyncio.create_task(run_console(node, "web"))
        async with asyncio.timeout(DEADLINE_S):
            line, _ = await asyncio.get_running_loop().sock_accept(listener)
        with line:
            await terminal.until_raw()
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task

    asyncio.run(attach_and_cancel())


def test_a_reader_that_leaves_ends_it(node: Any, listener: socket.socket, streams: Any) -> None:
    source, keep = os.pipe()
    read, write = os.pipe()
    os.close(read)
    streams(source, write)

    async def guest(line: socket.socket) -> None:
        await say(line, b"x")
        await hear_end(line)

    with pytest.raises(ExceptionGroup) as caught:
        attach(node, listener, guest)
    assert caught.group_contains(ReaderGone)
    for descriptor in (source, keep, write):
        os.close(descriptor)


# Not attaching -------------------------------------------------------------------------------


def test_a_line_that_somebody_else_has_is_refused(
    node: Any, listener: socket.socket, streams: Any
) -> None:
    """Nobody accepts here, as QEMU doesn't while it serves another."""
    streams(0, 1)

    with pytest.raises(NoConsole, match="takes nobody else"):
        asyncio.run(run_console(node, "web"))


def test_a_queue_that_is_full_is_refused_at_once(
    node: Any, listener: socket.socket, streams: Any
) -> None:
    path = Path(node.infos[0].details["serial_socket"])
    waiting = [console._connect("web", path) for _ in range(2)]

    with pytest.raises(NoConsole, match="takes nobody else"):
        asyncio.run(run_console(node, "web"))
    for line in waiting:
        line.close()


def test_a_line_that_is_gone_is_told(node: Any, listener: socket.socket) -> None:
    listener.close()

    with pytest.raises(NoConsole, match="is gone"):
        asyncio.run(run_console(node, "web"))


@pytest.mark.parametrize("details", [{}, {"serial_socket": None}])
def test_an_instance_without_a_line_is_told(node: Any, details: dict[str, Any]) -> None:
    node.infos = [InstanceInfo(name="web", state=InstanceState.STOPPED, details=details)]

    with pytest.raises(NoConsole, match="no serial line"):
        asyncio.run(run_console(node, "web"))


def test_an_unknown_instance_is_told(node: Any) -> None:
    with pytest.raises(UnknownInstance):
        asyncio.run(run_console(node, "web"))
