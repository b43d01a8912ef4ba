"""The journal of orders: who ordered what of this node, and what came of it.

A line of JSON each, appended to one file, and the same to the host's own journal where there is
one (systemd's, else syslog's). A name of an order's target and an error's words are all that a
peer decides of a line, and JSON escapes whatever could break it. No definition, key or certificate
is ever in it.
"""

import contextlib
import json
import os
import socket
import time
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Final, Literal

from attrs import field, frozen

from hypervisor.foreign_text import escaped
from kvmsec.rpc import messages as m

Outcome = Literal["begun", "done", "refused", "failed"]

FILE_LIMIT_BYTES: Final = 8 << 20
"""Then the file becomes `orders.jsonl.1`, in place of the one before."""
_WORDS_LIMIT_CHARS: Final = 500
_JOURNAL: Final = "/run/systemd/journal/socket"
_SYSLOG: Final = "/dev/log"
_IDENTIFIER: Final = "kvmsec"
_LOCAL: Final = "local"
_INFO, _WARNING = 6, 4  # syslog(3)
_DAEMON: Final = 3 << 3  # syslog(3), LOG_DAEMON
_REFUSALS_AT_ONCE: Final = 50
_REFUSALS_PER_S: Final = 5.0


@frozen(kw_only=True)
class Order:
    """One line: `peer` is None for root of this host, `error` the class of what went wrong."""

    peer: str | None
    fingerprint: str | None
    call: str
    target: str | None
    outcome: Outcome
    error: str | None = None
    message: str | None = None
    at: datetime = field(factory=lambda: datetime.now(UTC))

    @property
    def who(self) -> str:
        """`local` for root of this host alone: one that is refused may call itself so."""
        if self.peer is None:
            return _LOCAL
        return f"node {self.peer}" if self.peer in ("", _LOCAL) else self.peer

    def document(self) -> dict[str, Any]:
        return {
            "at": self.at.isoformat(timespec="milliseconds"),
            "peer": self.who,
            "fingerprint": self.fingerprint,
            "call": self.call,
            "target": self.target,
            "outcome": self.outcome,
            "error": self.error,
            "message": None
            if self.message is None
            else escaped(self.message, limit_chars=_WORDS_LIMIT_CHARS),
        }

    def line(self) -> str:
        """ASCII, without a line feed: JSON escapes every other character."""
        return json.dumps(self.document())


def target_of(request: m.Message) -> str | None:
    """What an order is about, in few words: never what it brings along."""
    match request:
        case m.StartRequest() | m.StopRequest() | m.InstanceRequest():
            found = request.name
        case m.UidRequest():
            found = f"uid {request.uid}"
        case m.PoolRequest():
            found = f"uids {request.uids}"
        case m.State():
            found = f"revision {request.revision}"
        case m.FileRequest():
            found = request.name if request.content is not None else f"{request.name} (removed)"
        case m.JoinRequest():
            found = request.node_name
        case _:
            return None
    return escaped(found, limit_chars=200)


class OrderJournal:
    """Appends orders to `path` and to the host's journal; raises nothing.

    A full disk must not keep anybody from stopping an instance: a line that can't be written is
    said on stderr by way of `complain`, and the order goes on.
    """

    def __init__(
        self,
        path: Path,
        *,
        complain: Callable[[str], None],
        limit_bytes: int = FILE_LIMIT_BYTES,
        sockets: tuple[str, str] = (_JOURNAL, _SYSLOG),
        now: Callable[[], float] = time.monotonic,
    ) -> None:
        self._path = path
        self._complain = complain
        self._limit_bytes = limit_bytes
        self._journal, self._syslog = sockets
        self._now = now
        self._tokens = float(_REFUSALS_AT_ONCE)
        self._filled_at = now()
        self._left_out = 0

    def note(self, order: Order) -> None:
        """Write an order down; refusals beyond 5 a second are counted and summed up instead."""
        if order.outcome == "refused" and not self._may_note_refusal():
            self._left_out += 1
            return
        if self._left_out:
            count, self._left_out = self._left_out, 0
            self._write(
                Order(
                    peer="-",
                    fingerprint=None,
                    call="-",
                    target=None,
                    outcome="refused",
                    message=f"{count} more orders were refused and not written down",
                )
            )
        self._write(order)

    def _may_note_refusal(self) -> bool:
        now = self._now()
        filled = self._tokens + (now - self._filled_at) * _REFUSALS_PER_S
        self._tokens, self._filled_at = min(filled, float(_REFUSALS_AT_ONCE)), now
        if self._tokens < 1:
            return False
        self._tokens -= 1
        return True

    def _write(self, order: Order) -> None:
        line = order.line()
        try:
            self._append(line.encode() + b"\n")
        except OSError as error:
            self._complain(f"{self._path}: {error.strerror}: {line}")
        with contextlib.suppress(OSError):
            self._tell_host(order, line)

    def _append(self, line: bytes) -> None:
        create = os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_NOFOLLOW | os.O_CLOEXEC
        descriptor = os.open(self._path, create, 0o600)
        try:
            is_full = os.fstat(descriptor).st_size + len(line) > self._limit_bytes
            if not is_full:
                _write_whole(descriptor, line)
                return
        finally:
            os.close(descriptor)
        self._path.rename(self._path.with_name(self._path.name + ".1"))
        descriptor = os.open(self._path, create, 0o600)
        try:
            _write_whole(descriptor, line)
        finally:
            os.close(descriptor)

    def _tell_host(self, order: Order, line: str) -> None:
        priority = _WARNING if order.outcome in ("refused", "failed") else _INFO
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as host:
            host.setblocking(False)  # Who reads it may hang; an order must not.
            if os.path.exists(self._journal):
                host.sendto(_fields(order, line, priority), self._journal)
            elif os.path.exists(self._syslog):
                words = f"<{_DAEMON | priority}>{_IDENTIFIER}: order {line}"
                host.sendto(words.encode(), self._syslog)


def _fields(order: Order, line: str, priority: int) -> bytes:
    """Systemd's native protocol (systemd.io/JOURNAL_NATIVE_PROTOCOL); no value has a line feed."""
    fields = {
        "MESSAGE": f"order {line}",
        "PRIORITY": str(priority),
        "SYSLOG_IDENTIFIER": _IDENTIFIER,
        "KVMSEC_CALL": order.call,
        "KVMSEC_OUTCOME": order.outcome,
        "KVMSEC_PEER": order.who,
        "KVMSEC_TARGET": order.target or "",
    }
    return "".join(
        f"{name}={escaped(text, limit_chars=20_000)}\n" for name, text in fields.items()
    ).encode()


def _write_whole(descriptor: int, line: bytes) -> None:
    """One write(2) in the common case, so that lines of two daemons don't mix."""
    while line:
        line = line[os.write(descriptor, line) :]
