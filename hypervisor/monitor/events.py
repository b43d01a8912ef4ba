"""The events of a monitor, kept in bounded memory however many arrive."""

import asyncio
import json
from collections import deque
from collections.abc import AsyncIterator, Collection, Iterable, Iterator, Mapping
from typing import Any, Final

from attrs import define, field, frozen

KEPT_EVENTS: Final = 256
KEPT_BYTES: Final = 1 << 20


@frozen
class Event:
    """One event as QEMU sent it; nothing in it may be trusted more than QEMU is.

    The text is kept and parsed when asked for, since parsed JSON can take 25 times its memory.
    """

    sequence: int
    name: str
    line: bytes = field(repr=False)

    @property
    def data(self) -> Mapping[str, Any]:
        """The event's own members; empty where it has none."""
        data = json.loads(self.line).get("data")
        return data if isinstance(data, dict) else {}

    @property
    def timestamp_s(self) -> float | None:
        """When it happened, in seconds since 1970 by QEMU's clock; None where it doesn't say."""
        stamp = json.loads(self.line).get("timestamp")
        try:
            return float(stamp["seconds"]) + float(stamp["microseconds"]) / 1e6
        except (TypeError, KeyError, ValueError, OverflowError):
            return None


@define(eq=False)
class _Waiter:
    names: Collection[str] | None
    arrived: asyncio.Future[Event | None]

    def takes(self, event: Event) -> bool:
        return self.names is None or event.name in self.names


class EventLog:
    """The last KEPT_EVENTS events in at most KEPT_BYTES (the newest is kept in any case)."""

    def __init__(self) -> None:
        self.position = 0
        """The number of the next event: those seen so far."""
        self.dropped = 0
        """How many have been dropped to make room."""
        self._kept: deque[Event] = deque()
        self._kept_bytes = 0
        self._waiters: list[_Waiter] = []
        self._is_ended = False

    def add(self, name: str, line: bytes) -> None:
        """Keep an event, dropping the oldest, and hand it to everyone who waits for it."""
        event = Event(self.position, name, line)
        self.position += 1
        self._kept.append(event)
        self._kept_bytes += len(line)
        while len(self._kept) > KEPT_EVENTS or (
            self._kept_bytes > KEPT_BYTES and len(self._kept) > 1
        ):
            self._kept_bytes -= len(self._kept.popleft().line)
            self.dropped += 1
        self._hand_over(event)

    def end(self) -> None:
        """Let everyone who waits know that no event will follow."""
        self._is_ended = True
        self._hand_over(None)

    def since(self, position: int) -> Iterator[Event]:
        """The kept events from `position` on, oldest first."""
        return (event for event in list(self._kept) if event.sequence >= position)

    async def next(self, names: Iterable[str] | None, position: int) -> Event | None:
        """Wait for the first event from `position` on with one of `names` (None: any).

        None when the log has ended without one. An event can't be missed while this waits, even
        when so many follow that it is no longer kept.
        """
        wanted = None if names is None else frozenset(names)
        for event in self.since(position):
            if wanted is None or event.name in wanted:
                return event
        if self._is_ended:
            return None
        waiter = _Waiter(wanted, asyncio.get_running_loop().create_future())
        self._waiters.append(waiter)
        try:
            return await waiter.arrived
        finally:
            if waiter in self._waiters:
                self._waiters.remove(waiter)

    async def follow(self, position: int) -> AsyncIterator[Event]:
        """Yield every event from `position` on, as far as it is still kept, until the log ends."""
        while (event := await self.next(None, position)) is not None:
            yield event
            position = event.sequence + 1

    def _hand_over(self, event: Event | None) -> None:
        remaining = []
        for waiter in self._waiters:
            if waiter.arrived.done():
                continue
            if event is None or waiter.takes(event):
                waiter.arrived.set_result(event)
            else:
                remaining.append(waiter)
        self._waiters = remaining
