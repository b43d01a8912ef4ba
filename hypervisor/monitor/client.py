"""qemu.qmp's client, bounded: in memory, in time spent on one monitor, and in what it logs.

What the library leaves open towards a hostile QEMU and is closed here: its event listener and its
history grow without end; it reads on as long as bytes are there, without letting others work; it
blocks for ever on a second reply to one command; closing waits for the other side to read what was
written; its checks of the greeting are assertions, which `python -O` removes; and it logs what
it reads.
"""

import asyncio
import logging
import time
from collections.abc import Mapping
from typing import Final

from qemu.qmp import Message, QMPClient
from qemu.qmp.error import ProtocolError
from qemu.qmp.models import ErrorResponse

from hypervisor.foreign_text import escaped
from hypervisor.monitor.errors import (
    EVIDENCE_LIMIT_CHARS,
    CommandRefused,
    Evidence,
    MonitorClosed,
    MonitorError,
    MonitorGarbled,
)
from hypervisor.monitor.events import EventLog

MESSAGE_LIMIT_BYTES: Final = 1 << 20
"""The longest line that is taken; QEMU's largest reply (query-qmp-schema) has about 200 KiB."""

UNSENT_LIMIT_BYTES: Final = 256 * 1024
"""How much may wait for a monitor that does not read."""

_EVENT_NAME_LIMIT_CHARS: Final = 128
_REST_AFTER_S: Final = 0.002
_REST_AT_MOST_S: Final = 0.25
_ID_PREFIX: Final = "__qmp#"

# In no hierarchy, so that no configuration of logging can make it write.
_SILENT: Final = logging.Logger("qmp", level=logging.CRITICAL + 1)


class BoundedClient(QMPClient):
    """One connection to one monitor; what ended it is in `failure`, as an error of ours."""

    def __init__(self) -> None:
        super().__init__(readbuflen=MESSAGE_LIMIT_BYTES)
        self.logger = _SILENT
        self.log = EventLog()
        self.failure: MonitorError | None = None
        self._busy_s = 0.0
        self._got_line_at: float | None = None
        self._sent = Message()
        self._received = b""

    @property
    def evidence(self) -> Evidence:
        """The last command that was sent, and the last line that came."""
        return _evidence(self._sent, self._received)

    @property
    def unsent_bytes(self) -> int:
        """How much the kernel has not taken yet of what was written."""
        return 0 if self._writer is None else self._writer.transport.get_write_buffer_size()

    # What the library calls, in the order of a connection's life.

    async def _negotiate(self) -> None:
        message = self.make_execute_msg("qmp_capabilities")
        message["id"] = self._get_exec_id()
        await self._send(message)
        while (reply := await self._recv()).get("id") != message["id"]:
            if "event" not in reply:
                raise self._garbled("sent something else in reply to qmp_capabilities")
            self._keep_event(reply)
        self._check_reply(reply)
        if "error" in reply:
            raise self.refusal(message, reply)

    async def _establish_session(self) -> None:
        await super()._establish_session()
        # Taken note of even if nobody ever closes this, lest asyncio logs the error at its end.
        if self._bh_tasks is not None:
            self._bh_tasks.add_done_callback(lambda tasks: tasks.cancelled() or tasks.exception())

    async def _bh_recv_message(self) -> None:
        try:
            await super()._bh_recv_message()
        except Exception as error:
            self.failure = self.explain(error)
            raise

    async def _do_recv(self) -> Message:
        await self._rest()
        try:
            line = await self._readline()
        except ValueError as error:
            raise self._garbled(f"sent a line of more than {MESSAGE_LIMIT_BYTES} bytes") from error
        self._got_line_at = time.perf_counter()
        self._received = line
        if not line.endswith(b"\n"):
            raise self._garbled("hung up in the middle of a message")
        try:
            return Message(line, eager=True)
        except (ProtocolError, ValueError, RecursionError) as error:
            raise self._garbled("sent something that is not a JSON object") from error

    async def _on_message(self, msg: Message) -> None:
        if "event" in msg:
            self._keep_event(msg)
            return
        self._check_reply(msg)
        waiting = self._pending.get(str(msg["id"]))
        if waiting is not None and waiting.empty():  # Else nobody waits for it any more.
            waiting.put_nowait(msg)

    async def _bh_flush_writer(self) -> None:
        """Flush nothing: whoever sent a command has waited for its reply, or given up on it."""

    async def _bh_close_stream(self, error_pathway: bool = False) -> None:
        if self._writer is not None:
            # A plain close would first wait until the other side has read everything.
            self._writer.transport.abort()
        await super()._bh_close_stream(error_pathway)

    def _cb_outbound(self, msg: Message) -> Message:
        self._sent = msg
        return msg

    def _cb_inbound(self, msg: Message) -> Message:
        return msg

    # What these are made of.

    async def _rest(self) -> None:
        """Leave everything else in the process as much time as this monitor took."""
        if self._got_line_at is not None:
            self._busy_s += time.perf_counter() - self._got_line_at
        if self._busy_s > _REST_AFTER_S:
            pause_s, self._busy_s = min(self._busy_s, _REST_AT_MOST_S), 0.0
            await asyncio.sleep(pause_s)

    def _keep_event(self, msg: Message) -> None:
        name = msg["event"]
        if not isinstance(name, str) or len(name) > _EVENT_NAME_LIMIT_CHARS:
            raise self._garbled("sent an event without a proper name")
        self.log.add(name, self._received)

    def _check_reply(self, msg: Message) -> None:
        """Hold a message against the shape of a reply to something that was sent."""
        if not self._was_issued(msg.get("id")):
            if "error" in msg and "id" not in msg:
                raise self._garbled("could not read what it was sent")
            raise self._garbled("answered a command that was never sent")
        if "error" in msg:
            try:
                ErrorResponse(msg)
            except (KeyError, TypeError) as error:
                raise self._garbled("sent a malformed error") from error
        elif "return" not in msg:
            raise self._garbled("sent a reply with neither a result nor an error")

    def _was_issued(self, message_id: object) -> bool:
        if not isinstance(message_id, str) or not message_id.startswith(_ID_PREFIX):
            return False
        number = message_id.removeprefix(_ID_PREFIX)
        is_number = number.isascii() and number.isdecimal() and len(number) <= 18
        return is_number and int(number) < self._execute_id

    def _garbled(self, finding: str) -> MonitorGarbled:
        return MonitorGarbled(finding, self.evidence)

    def refusal(self, message: Message, reply: Message) -> CommandRefused:
        """What QEMU's error in `reply` to `message` amounts to; `reply` has the shape of one."""
        error = ErrorResponse(reply).error
        return CommandRefused(
            str(message["execute"]), error.class_, error.desc, _evidence(message, bytes(reply))
        )

    def explain(self, error: BaseException) -> MonitorError:
        """The error of ours that an exception of the library's or the kernel's amounts to."""
        while not isinstance(error, MonitorError):
            wrapped = getattr(error, "exc", None)
            if not isinstance(wrapped, BaseException):
                break
            error = wrapped
        if isinstance(error, MonitorError):
            return error
        if isinstance(error, EOFError):
            return MonitorClosed("QEMU hung up on its monitor", self.evidence)
        if isinstance(error, OSError):
            words = error.strerror or type(error).__name__
            return MonitorClosed(f"the connection to QEMU's monitor broke: {words}", self.evidence)
        return self._garbled("did not greet as QMP does")


def _evidence(sent: Message, received: bytes) -> Evidence:
    arguments = sent.get("arguments")
    names = ", ".join(map(str, arguments)) if isinstance(arguments, Mapping) else ""
    command = f"{sent['execute']}({names})" if "execute" in sent else ""
    return Evidence(
        escaped(command, limit_chars=EVIDENCE_LIMIT_CHARS),
        escaped(received, limit_chars=EVIDENCE_LIMIT_CHARS),
    )
