"""A look at a node that costs it something, for all who ask for one at the same time."""

import asyncio
from collections.abc import Awaitable, Callable
from typing import Generic, TypeVar

_Found = TypeVar("_Found")


class SharedLook(Generic[_Found]):
    """Looks once at a time: who asks while a look is under way shares the next one.

    So nobody is told what was found before they asked, and many who ask cost no more than two.
    """

    def __init__(self, look: Callable[[], Awaitable[_Found]]) -> None:
        self._look = look
        self._turn = asyncio.Lock()
        self._next: asyncio.Task[_Found] | None = None

    async def found(self) -> _Found:
        """What a look finds that begins from now on; raises what it raises."""
        if self._next is None:
            self._next = asyncio.create_task(self._after_the_last())
            self._next.add_done_callback(_take_error)
        return await asyncio.shield(self._next)  # Who asks may go; the others still wait.

    async def _after_the_last(self) -> _Found:
        async with self._turn:
            self._next = None
            return await self._look()


def _take_error(done: "asyncio.Task[_Found]") -> None:
    if not done.cancelled():
        done.exception()  # Whoever asked may be gone.
