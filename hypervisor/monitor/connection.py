"""A connection to one QEMU's monitor, from its first byte to its end."""

import asyncio
import os
import socket
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Any, Final, NoReturn, Self

from qemu.qmp import (
    ConnectError,
    ExecInterruptedError,
    ExecuteError,
    Runstate,
    StateError,
)

from hypervisor.foreign_text import escaped
from hypervisor.monitor.client import UNSENT_LIMIT_BYTES, BoundedClient
from hypervisor.monitor.errors import (
    CommandForbidden,
    Evidence,
    MonitorClosed,
    MonitorError,
    MonitorGarbled,
    MonitorTimedOut,
    MonitorUnreachable,
)
from hypervisor.monitor.events import Event
from hypervisor.monitor.forbidden import reason_against
from kvmsec.linux import unix_sockets

DEFAULT_TIMEOUT_S: Final = 10.0

_BACKLOG_RETRY_S: Final = 0.05
_TAKEN_HINT: Final = "QEMU serves one monitor client at a time: another process may be connected"


class Monitor:
    """The monitor of a running QEMU, ready for commands; made by `connect` or `attach`.

    All of it belongs to one event loop. No method waits longer than its deadline (seconds). Once
    the connection has ended every call raises what ended it. An asynchronous context manager that
    closes itself. Unread events cost nothing beyond the last 256 (1 MiB), which are kept.
    """

    def __init__(self, client: BoundedClient) -> None:
        self._client = client

    @classmethod
    async def connect(cls, path: Path, *, timeout_s: float = DEFAULT_TIMEOUT_S) -> Self:
        """Connect to the unix socket at `path`, which may be longer than the kernel's 108 bytes.

        Returns with the reply to `qmp_capabilities`: QEMU is then ready for commands. Raises
        MonitorUnreachable when nothing listens there, and what `attach` raises.
        """
        deadline = asyncio.get_running_loop().time() + timeout_s
        try:
            async with asyncio.timeout_at(deadline):
                connected = await _connect_unix(path)
        except TimeoutError:
            raise MonitorTimedOut("take a call", timeout_s, Evidence(), hint=_TAKEN_HINT) from None
        except OSError as error:
            words = os.strerror(error.errno or 0)
            raise MonitorUnreachable(
                f"there is no monitor at {escaped(str(path), limit_chars=4096)}: {words}",
                Evidence(),
                hint="the instance has ended, or its QEMU has not opened the socket yet",
            ) from error
        return cls(await _greet(connected, deadline, timeout_s))

    @classmethod
    async def attach(
        cls, connected: socket.socket, *, timeout_s: float = DEFAULT_TIMEOUT_S
    ) -> Self:
        """Greet over a connected stream socket, which is this method's from now on.

        Raises MonitorTimedOut, MonitorClosed, MonitorGarbled and CommandRefused; the socket is
        closed then.
        """
        deadline = asyncio.get_running_loop().time() + timeout_s
        return cls(await _greet(connected, deadline, timeout_s))

    @property
    def ended(self) -> MonitorError | None:
        """What ended the connection; None while it holds."""
        if self._client.runstate is Runstate.RUNNING:
            return None
        return self._client.failure or MonitorClosed(
            "the connection to QEMU's monitor was closed by this side", self._client.evidence
        )

    async def execute(
        self,
        command: str,
        arguments: Mapping[str, Any] | None = None,
        *,
        timeout_s: float = DEFAULT_TIMEOUT_S,
    ) -> Any:
        """Send one command and return what QEMU returned; several may be under way at once.

        Raises CommandRefused when QEMU answers with an error, MonitorTimedOut when it does not
        answer (the connection stays, and a late answer is dropped), CommandForbidden before
        anything is sent, and what ended the connection. ValueError or TypeError: `arguments` is no
        JSON.
        """
        reason = reason_against(command, arguments or {})
        if reason is not None:
            raise CommandForbidden(command, reason)
        try:
            async with asyncio.timeout(timeout_s):
                return await self._ask(command, arguments)
        except TimeoutError:
            raise MonitorTimedOut(f"answer {command}", timeout_s, self._client.evidence) from None

    @property
    def events(self) -> tuple[Event, ...]:
        """The last events that came, oldest first, as far as they are kept."""
        return tuple(self._client.log.kept)

    async def powerdown(self) -> None:
        """Press the guest's power button (ACPI); whether it reacts is the guest's affair."""
        await self.execute("system_powerdown")

    async def reset(self) -> None:
        """Reset the guest as its reset button does."""
        await self.execute("system_reset")

    async def cont(self) -> None:
        """Let the guest's processors run."""
        await self.execute("cont")

    async def status(self) -> str:
        """The run state (`running`, `paused`, `prelaunch`, …); see QEMU's qapi/run-state.json."""
        answer = await self.execute("query-status")
        status = answer.get("status") if isinstance(answer, dict) else None
        if not isinstance(status, str):
            raise MonitorGarbled("answered query-status without a status", self._client.evidence)
        return escaped(status)

    async def close(self) -> None:
        """End the connection, whatever state it is in; never raises, never waits for QEMU."""
        if self._client.runstate is not Runstate.IDLE:
            with suppress(Exception):
                # What ended the connection is raised here once more; `ended` has it.
                await self._client.disconnect()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        await self.close()

    async def _ask(self, command: str, arguments: Mapping[str, Any] | None) -> Any:
        if self._client.unsent_bytes > UNSENT_LIMIT_BYTES:
            raise MonitorTimedOut("read what it is sent", 0, self._client.evidence)
        try:
            return await self._client.execute(command, arguments)
        except ExecuteError as error:
            raise self._client.refusal(error.sent, error.received) from None
        except (ExecInterruptedError, StateError):
            self._raise_ended()

    def _raise_ended(self) -> NoReturn:
        raise self.ended or MonitorClosed(
            "the connection to QEMU's monitor was lost", self._client.evidence
        )


async def _greet(connected: socket.socket, deadline: float, timeout_s: float) -> BoundedClient:
    """Begin a session before the event loop's time `deadline`; `timeout_s` is for the error."""
    client = BoundedClient()
    try:
        async with asyncio.timeout_at(deadline):
            await client.connect(connected)
    except TimeoutError:
        raise MonitorTimedOut("greet", timeout_s, client.evidence, hint=_TAKEN_HINT) from None
    except ConnectError as error:
        raise client.explain(error) from error
    finally:
        if client.runstate is not Runstate.RUNNING:
            connected.close()
    return client


async def _connect_unix(path: Path) -> socket.socket:
    """Connect, waiting while the server's backlog is full; raises OSError."""
    while True:
        with suppress(BlockingIOError):
            return unix_sockets.connect(path)
        # The kernel says EAGAIN and offers nothing to wait on (connect(2), AF_UNIX).
        await asyncio.sleep(_BACKLOG_RETRY_S)
