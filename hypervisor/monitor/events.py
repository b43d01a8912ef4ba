"""The events of a monitor, kept in bounded memory however many arrive."""

from collections import deque
from typing import Final

from attrs import field, frozen

KEPT_EVENTS: Final = 256
KEPT_BYTES: Final = 1 << 20


@frozen
class Event:
    """One event as QEMU sent it; nothing in it may be trusted more than QEMU is.

    `sequence` counts from 0: a gap before the first that is kept shows how many were dropped. The
    text is kept unparsed, since parsed JSON can take 25 times its memory.
    """

    sequence: int
    name: str
    line: bytes = field(repr=False)


class EventLog:
    """The last KEPT_EVENTS events in at most KEPT_BYTES (the newest is kept in any case)."""

    def __init__(self) -> None:
        self.kept: deque[Event] = deque()
        self._seen = 0
        self._kept_bytes = 0

    def add(self, name: str, line: bytes) -> None:
        """Keep an event, dropping the oldest."""
        self.kept.append(Event(self._seen, name, line))
        self._seen += 1
        self._kept_bytes += len(line)
        while len(self.kept) > KEPT_EVENTS or (
            self._kept_bytes > KEPT_BYTES and len(self.kept) > 1
        ):
            self._kept_bytes -= len(self.kept.popleft().line)
