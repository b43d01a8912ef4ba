"""`instance console`: the terminal and a guest's serial line, byte for byte.

The only place where a guest's bytes reach a terminal as they are. Nothing here changes a
descriptor's blocking mode: terminals and pipes are shared with whoever gave them to us.
"""

from __future__ import annotations

import asyncio
import os
import select
import socket
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from kvmsec.cli.output import ReaderGone
from kvmsec.errors import KvmsecError
from kvmsec.linux import unix_sockets
from kvmsec.linux.unix_diag import waits_for_accept

if TYPE_CHECKING:
    from kvmsec.agent import Agent

_LEAVE: Final = b"\x1d"  # Ctrl-], as telnet(1) has it
_CHUNK_BYTES: Final = 16 * 1024
_TYPED_CHUNKS: Final = 64
_ATOMIC_BYTES: Final = select.PIPE_BUF
_ACCEPT_S: Final = 2.0
_ACCEPT_PAUSE_S: Final = 0.02
_QUIET_S: Final = 1.0
_DRAIN_S: Final = 10.0


class NoConsole(KvmsecError):
    """An instance's serial line can't be attached to."""


async def run_console(node: Agent, name: str) -> None:
    """Attach stdin and stdout to the serial line of an instance.

    Ends at Ctrl-] (where stdin is a terminal), when the guest's end is closed, and a second of
    silence after stdin's end where it is a file or a pipe. Raises NoConsole, UnknownInstance,
    ReaderGone.
    """
    path = _serial_socket(name, (await node.info(name)).details)
    with _connect(name, path) as line:
        await _require_accepted(name, line)
        with _raw_terminal(sys.stdin.fileno()) as is_terminal:
            if is_terminal:
                _tell(f"attached to {name}; Ctrl-] leaves")
            end = await _Exchange(line, sys.stdin.fileno(), sys.stdout.fileno()).run(is_terminal)
            if is_terminal:
                _tell(f"\r\n{name}: {end}")


def _tell(text: str) -> None:
    os.write(sys.stderr.fileno(), f"{text}\r\n".encode())


# Attaching -----------------------------------------------------------------------------------


def _serial_socket(name: str, details: Any) -> Path:
    path = details.get("serial_socket")
    if not path:
        raise NoConsole(
            f"{name} has no serial line to attach to",
            hint=f"see with `kvmsec instance info {name}` whether it runs",
        )
    return Path(path)


def _connect(name: str, path: Path) -> socket.socket:
    """Connect without waiting: a full queue means that others wait already."""
    try:
        return unix_sockets.connect(path)
    except BlockingIOError:
        raise _occupied(name) from None
    except (FileNotFoundError, ConnectionRefusedError):
        raise NoConsole(
            f"the serial line of {name} is gone",
            hint=f"see with `kvmsec instance info {name}` whether it still runs",
        ) from None


async def _require_accepted(name: str, line: socket.socket) -> None:
    """QEMU serves one client at a time, and leaves the others waiting without a word.

    Nothing tells when it has accepted, so the kernel is asked until it has, two seconds at most.
    """
    try:
        async with asyncio.timeout(_ACCEPT_S):
            while waits_for_accept(line):
                await asyncio.sleep(_ACCEPT_PAUSE_S)
    except TimeoutError:
        raise _occupied(name) from None


def _occupied(name: str) -> NoConsole:
    return NoConsole(
        f"the serial line of {name} takes nobody else: somebody is attached to it, or its QEMU "
        "does not answer",
        hint="leave the other console first (Ctrl-] there)",
    )


@contextmanager
def _raw_terminal(descriptor: int) -> Iterator[bool]:
    """Hand every key to the guest while inside; whether there is a terminal at all."""
    if not os.isatty(descriptor):
        yield False
        return
    import termios
    import tty

    before = termios.tcgetattr(descriptor)
    try:
        tty.setraw(descriptor, termios.TCSADRAIN)
        yield True
    finally:
        # What was typed ahead was meant for the guest, not for the shell.
        termios.tcsetattr(descriptor, termios.TCSAFLUSH, before)


# Copying -------------------------------------------------------------------------------------


class _Exchange:
    """The two directions between a serial line and a pair of descriptors."""

    def __init__(self, line: socket.socket, source: int, target: int) -> None:
        self._line = line
        self._source = source
        self._target = target
        self._loop = asyncio.get_running_loop()
        self._typed: asyncio.Queue[bytes] = asyncio.Queue(_TYPED_CHUNKS)
        self._heard_at = self._loop.time()

    async def run(self, is_terminal: bool) -> str:
        """Copy until one side has had enough; returns which, in words."""
        read = self._read_keys() if is_terminal else self._read_all()
        reading = asyncio.create_task(read)
        sending = asyncio.create_task(self._send())
        hearing = asyncio.create_task(self._show_heard())
        tasks = (reading, sending, hearing)
        try:
            await asyncio.wait((reading, hearing), return_when=asyncio.FIRST_COMPLETED)
            if reading.done() and not hearing.done():
                await reading
                if not is_terminal:
                    await self._drain(hearing)
            if hearing.done():
                await hearing
                return "the guest's end of the line was closed"
            return "left"
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    async def _read_keys(self) -> None:
        """Take what is typed until it is the key to leave, whether the guest listens or not."""
        while data := await self._read():
            keys, leave, _ = data.partition(_LEAVE)
            try:
                self._typed.put_nowait(keys)
            except asyncio.QueueFull:
                os.write(self._target, b"\a")
            if leave:
                return

    async def _read_all(self) -> None:
        """Take what a file or a pipe holds, as fast as the guest does."""
        while data := await self._read():
            await self._typed.put(data)

    async def _read(self) -> bytes:
        await self._until_ready(self._source, self._loop.add_reader, self._loop.remove_reader)
        return os.read(self._source, _CHUNK_BYTES)

    async def _send(self) -> None:
        # A line that was closed is seen, and told of, by the other direction.
        with suppress(BrokenPipeError, ConnectionResetError):
            while True:
                await self._loop.sock_sendall(self._line, await self._typed.get())
                self._typed.task_done()

    async def _show_heard(self) -> None:
        """Copy what the guest says, until its end is closed."""
        while True:
            try:
                data = await self._loop.sock_recv(self._line, _CHUNK_BYTES)
            except ConnectionResetError:
                return
            if not data:
                return
            self._heard_at = self._loop.time()
            await self._show(data)

    async def _show(self, data: bytes) -> None:
        try:
            for start in range(0, len(data), _ATOMIC_BYTES):
                # A pipe that is ready takes this much without making us wait (pipe(7)).
                await self._until_ready(
                    self._target, self._loop.add_writer, self._loop.remove_writer
                )
                piece = data[start : start + _ATOMIC_BYTES]
                while piece:
                    piece = piece[os.write(self._target, piece) :]
        except BrokenPipeError:
            raise ReaderGone from None

    async def _drain(self, hearing: asyncio.Task[None]) -> None:
        """Have the guest take what it was sent last, and answer it."""
        deadline = self._loop.time() + _DRAIN_S
        sent = asyncio.create_task(self._typed.join())
        try:
            await asyncio.wait(
                (sent, hearing), timeout=_DRAIN_S, return_when=asyncio.FIRST_COMPLETED
            )
        finally:
            sent.cancel()
        self._heard_at = self._loop.time()
        while not hearing.done():
            remaining = min(self._heard_at + _QUIET_S, deadline) - self._loop.time()
            if remaining <= 0:
                return
            await asyncio.wait((hearing,), timeout=remaining)

    async def _until_ready(
        self, descriptor: int, add: Callable[..., Any], remove: Callable[[int], Any]
    ) -> None:
        """Wait for a descriptor; a regular file is always ready and can't be watched."""
        ready = asyncio.Event()
        try:
            add(descriptor, ready.set)
        except PermissionError:  # epoll_ctl(2)
            return
        try:
            await ready.wait()
        finally:
            remove(descriptor)
