"""The last events of a node, so that whoever asks for them again and again misses none."""

import asyncio
import time
from collections import deque
from typing import Final

from kvmsec.agent import Event
from kvmsec.rpc import messages as m
from kvmsec.rpc.values import event_message

KEPT: Final = 256
"""As many as a listener of the node itself may fall behind (`kvmsec.node.watches`)."""


class RecentEvents:
    """The last `KEPT` events, numbered; a cursor is the number that the next one will have.

    The first number is the clock's microseconds at the start of this process, so a cursor that an
    earlier process gave out is older than all that is kept, and is told so.
    """

    def __init__(self, first: int | None = None) -> None:
        self._next = time.time_ns() // 1000 if first is None else first
        self._kept: deque[m.Event] = deque(maxlen=KEPT)
        self._news = asyncio.Event()

    def add(self, event: Event) -> None:
        self._kept.append(event_message(event))
        self._next += 1
        self._news.set()
        self._news = asyncio.Event()

    async def after(self, cursor: int | None, timeout_s: float) -> m.Events:
        """What happened after `cursor` (None: after now); waits for it for `timeout_s` seconds."""
        start = self._next if cursor is None else cursor
        if start == self._next and timeout_s > 0:
            try:
                async with asyncio.timeout(timeout_s):
                    await self._news.wait()
            except TimeoutError:
                pass
        return self._since(start)

    def _since(self, cursor: int) -> m.Events:
        oldest = self._next - len(self._kept)
        if cursor > self._next:  # From a clock that was ahead: it can't be told what was missed.
            return m.Events(cursor=self._next, events=tuple(self._kept), lost=1)
        kept = tuple(self._kept)[max(0, cursor - oldest) :]
        return m.Events(cursor=self._next, events=kept, lost=max(0, oldest - cursor))
