"""Waiting for descriptors in an event loop: no thread, no polling."""

import asyncio
import os
from typing import Any

from kvmsec.linux.children import Child
from kvmsec.linux.errors import ChildTimedOut, LockBusy
from kvmsec.linux.locks import PAUSES_S, FileLock


async def readable(descriptor: int, timeout_s: float | None) -> bool:
    """Wait until a descriptor is readable (a pidfd: until its process has ended).

    False when `timeout_s` seconds pass first; None waits for ever.
    """
    # A copy, since the loop keeps one reader a descriptor and two tasks may wait for the same.
    watched = os.dup(descriptor)
    loop = asyncio.get_running_loop()
    is_ready = asyncio.Event()
    loop.add_reader(watched, is_ready.set)
    try:
        async with asyncio.timeout(timeout_s):
            await is_ready.wait()
    except TimeoutError:
        return False
    finally:
        loop.remove_reader(watched)
        os.close(watched)
    return True


async def collect(child: Child, timeout_s: float) -> Any:
    """The result of a child's work; raises ChildFailed and, after `timeout_s` s, ChildTimedOut."""
    loop = asyncio.get_running_loop()
    deadline = loop.time() + timeout_s
    with child:
        while True:
            remaining = deadline - loop.time()
            if remaining <= 0 or not await readable(child.fileno(), remaining):
                raise ChildTimedOut(child.what, timeout_s)
            if child.receive():
                return child.result()


async def acquire(lock: FileLock, timeout_s: float) -> None:
    """Take a lock without holding up the event loop; raises LockBusy after `timeout_s` seconds."""
    loop = asyncio.get_running_loop()
    deadline = loop.time() + timeout_s
    pauses = iter(PAUSES_S)
    while not lock.try_acquire():
        remaining_s = deadline - loop.time()
        if remaining_s <= 0:
            raise LockBusy(lock.path)
        if (pause_s := next(pauses, None)) is not None:
            await asyncio.sleep(min(pause_s, remaining_s))
            continue
        try:
            await collect(lock.waiter(), remaining_s)
        except ChildTimedOut:
            raise LockBusy(lock.path) from None
