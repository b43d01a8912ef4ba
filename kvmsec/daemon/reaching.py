"""The way of this host's root to its daemon: by a socket that is root's, to a process that is."""

import asyncio
import contextlib
import os
import socket
import stat
from pathlib import Path
from typing import Final

from kvmsec.daemon.listening import peer_uid
from kvmsec.errors import KvmsecError, NoCluster
from kvmsec.linux import unix_sockets
from kvmsec.linux.errors import Fault
from kvmsec.rpc import messages as m
from kvmsec.rpc import wire
from kvmsec.rpc.calls import CALLS, PROTOCOL
from kvmsec.rpc.errors import CallTimedOut, RemoteFault, Unreachable
from kvmsec.rpc.exchange import ExchangeTransport
from kvmsec.rpc.frames import FrameConnection, FrameExchange
from kvmsec.rpc.messages import Message
from kvmsec.rpc.remote import RemoteAgent

ANSWER_WITHIN_S: Final = 5.0
"""An idle daemon answers within a millisecond, one that starts instances within a few."""
_UNDONE_WITHIN_S: Final = 120.0
_LOOK_S: Final = 0.005
_PAUSES_S: Final = (0.1, 0.2, 0.4, 0.8, 1.6)


class DaemonSilent(KvmsecError):
    """Something listens on the daemon's socket and does not answer."""

    def __init__(self, path: Path, reason: str) -> None:
        super().__init__(
            f"the daemon of this node does not answer on {path}: {reason}",
            hint="look at it with `systemctl status kvmsec-node`, then restart it: instances live "
            "on, and without a daemon commands work by themselves",
        )


class ForeignSocket(KvmsecError):
    """What lies in the place of the daemon's socket is not root's."""

    def __init__(self, path: Path, problem: str) -> None:
        super().__init__(
            f"{path} {problem}",
            hint="find out who put it there, then remove it; commands work without a daemon",
        )


class _Transport(ExchangeTransport):
    """Knows whether a call was given up before it was answered."""

    def __init__(self, connection: FrameConnection) -> None:
        super().__init__(FrameExchange(connection))
        self.gave_up = False

    async def call(self, name: str, request: Message) -> Message:
        try:
            return await super().call(name, request)
        except (asyncio.CancelledError, CallTimedOut):
            self.gave_up = True
            raise


class DaemonNode(RemoteAgent):
    """This node, by way of its daemon."""

    def __init__(
        self, transport: _Transport, connection: FrameConnection, writer: asyncio.StreamWriter
    ) -> None:
        super().__init__(transport, socket.gethostname())
        self._given_up_by = transport
        self._connection = connection
        self._writer = writer

    async def close(self) -> None:
        """End the connection; what was given up is undone by the daemon, which is waited for."""
        if self._given_up_by.gave_up:
            with contextlib.suppress(OSError):
                self._writer.write_eof()
            deadline = asyncio.get_running_loop().time() + _UNDONE_WITHIN_S
            while self._connection.is_open and asyncio.get_running_loop().time() < deadline:
                await asyncio.sleep(_LOOK_S)
        await self._connection.close()


async def have_taken_up(here: object) -> None:
    """Return once this node's daemon, where `here` goes by one, lives by what the files hold now.

    For a command that has changed them by itself. Raises what keeps the daemon from it.
    """
    if not isinstance(here, DaemonNode):
        return
    try:
        await here.household.info()  # answered once the daemon has looked at them
    except RemoteFault as error:
        if error.kind != NoCluster.__name__:
            raise


async def reach(path: Path) -> DaemonNode | None:
    """The node's daemon; None where nobody listens (a killed daemon leaves its socket behind).

    One that is about to end still listens, and ends the connection before it has answered: then
    another is made, to its successor if there is one. Raises ForeignSocket, DaemonSilent where no
    answer comes within 5 seconds, and OSError.
    """
    deadline = asyncio.get_running_loop().time() + ANSWER_WITHIN_S
    pauses = iter(_PAUSES_S)
    while (connected := _connect(path)) is not None:
        try:
            return await _greeted(path, connected, deadline)
        except Unreachable as error:
            pause_s = next(pauses, None)
            if pause_s is None or asyncio.get_running_loop().time() + pause_s >= deadline:
                raise DaemonSilent(path, "it has ended the connection") from error
        await asyncio.sleep(pause_s)
    return None


async def _greeted(path: Path, connected: socket.socket, deadline: float) -> DaemonNode:
    """The daemon behind a connection. Raises DaemonSilent; Unreachable where it is ended."""
    try:
        reader, writer = await asyncio.open_connection(sock=connected)
    except BaseException:
        connected.close()
        raise
    connection = FrameConnection(reader, writer)
    try:
        await _require_answer(path, connection, deadline)
    except BaseException:
        await connection.close()
        raise
    return DaemonNode(_Transport(connection), connection, writer)


def _connect(path: Path) -> socket.socket | None:
    try:
        status = path.lstat()
        if not stat.S_ISSOCK(status.st_mode):
            raise ForeignSocket(path, "is no socket")
        if status.st_uid != os.geteuid():
            raise ForeignSocket(path, f"belongs to uid {status.st_uid}")
        connected = unix_sockets.connect_to_own(path)
    except (FileNotFoundError, ConnectionRefusedError):
        return None
    except BlockingIOError as error:
        raise DaemonSilent(path, "it takes no more connections") from error
    # Who connects is told the uid of whoever has called listen(2).
    if (uid := peer_uid(connected)) != os.geteuid():
        connected.close()
        raise ForeignSocket(path, f"is served by uid {uid}")
    return connected


async def _require_answer(path: Path, connection: FrameConnection, deadline: float) -> None:
    """Ask for something that costs nothing: an order must not be sent to a daemon that hangs."""
    call = CALLS["instance.events"]
    body = wire.encode_request(m.EventsRequest(timeout_s=0.0), PROTOCOL)
    try:
        left_s = deadline - asyncio.get_running_loop().time()
        await connection.ask(call, PROTOCOL, body, left_s)
    except CallTimedOut as error:
        raise DaemonSilent(path, f"nothing came within {ANSWER_WITHIN_S:g} s") from error
    except Unreachable:
        raise
    except Fault as error:
        raise DaemonSilent(path, error.message) from error
