"""Seeing what happens to instances: their ends, as they come, and whoever listens."""

import asyncio
import os
import select
from collections.abc import AsyncGenerator, Callable, Iterator
from contextlib import AbstractAsyncContextManager
from datetime import UTC, datetime
from typing import Final, Self

from attrs import frozen

from kvmsec.agent import Event, InstanceState
from kvmsec.linux import processes
from kvmsec.linux.errors import Fault
from kvmsec.linux.processes import ProcessId
from kvmsec.model.security import SecurityModel
from kvmsec.node import records
from kvmsec.node.host import Host
from kvmsec.node.records import InstanceRecord
from kvmsec.node.waiting import readable

_QUEUE: Final = 256

Turn = Callable[[str], AbstractAsyncContextManager[None]]


@frozen
class _Watched:
    """A process, and the uid that it has for good, where that is proved and nobody else's."""

    process: ProcessId
    uid: int | None

    @classmethod
    def of(cls, process: ProcessId, record: InstanceRecord) -> Self:
        is_proved = record.state is InstanceState.RUNNING and record.model is SecurityModel.POOL
        return cls(process, record.uid if is_proved else None)


class Watches:
    """The listeners of one node, and a watch on each running instance that it knows of.

    `turn` gives the right to act on an instance. A watch cleans up after an instance that ends by
    itself, and tells of the end of one that somebody else took back.
    """

    def __init__(self, host: Host, turn: Turn) -> None:
        self._host = host
        self._turn = turn
        self._listeners: set[asyncio.Queue[Event]] = set()
        self._tasks: dict[str, asyncio.Task[None]] = {}
        self._pidfds: dict[int, _Watched] = {}
        self._poll = select.poll()

    def alive(self) -> frozenset[ProcessId]:
        """The processes that are watched and run now: one poll(2) asks after all of them.

        For who would else look each of them up in /proc. A descriptor never means another process.
        """
        return frozenset(one.process for one in self._running())

    def settled(self) -> dict[int, int]:
        """The uid of each watched process that runs now and has that for good, by pid.

        That is what a start proved of a QEMU before its guest ran: all four ids are the uid that
        was drawn for it, each set of capabilities is empty, and no program that it executes gives
        it any (no_new_privs). So it may take no other id (setuid(2)); a user namespace of its own
        would map no other either, but by somebody outside with that privilege or that uid.
        """
        return {one.process.pid: one.uid for one in self._running() if one.uid is not None}

    def _running(self) -> Iterator["_Watched"]:
        ended = dict(self._poll.poll(0))
        return (one for pidfd, one in self._pidfds.items() if pidfd not in ended)

    def publish(self, name: str, state: InstanceState, reason: str | None = None) -> None:
        """Tell every listener; one that is too far behind loses its oldest event."""
        event = Event(datetime.now(UTC), name, state, reason)
        for queue in self._listeners:
            if queue.full():
                queue.get_nowait()
            queue.put_nowait(event)

    async def listen(self) -> AsyncGenerator[Event, None]:
        """What happens from the first `anext` on."""
        queue: asyncio.Queue[Event] = asyncio.Queue(_QUEUE)
        self._listeners.add(queue)
        for record in records.read_all(self._host.paths)[0]:
            self.watch(record)
        try:
            while True:
                yield await queue.get()
        finally:
            self._listeners.discard(queue)

    def watch(self, record: InstanceRecord) -> None:
        """See to the end of a running instance; each is watched once."""
        from hypervisor import process

        name = record.name
        if record.process is None or name in self._tasks:
            return
        pidfd = processes.open_pidfd(record.process)
        if pidfd is not None:
            self._pidfds[pidfd] = _Watched.of(record.process, record)
            self._poll.register(pidfd, select.POLLIN)
        task = asyncio.create_task(self._see_end(name, record.generation, pidfd))
        self._tasks[name] = task

        def end(_: "asyncio.Task[None]") -> None:
            # Not the task's own to close: one that is cancelled at once never begins.
            if self._tasks.get(name) is task:
                del self._tasks[name]
            if pidfd is not None:
                self._poll.unregister(pidfd)
                del self._pidfds[pidfd]
                process.reap(pidfd)  # Whoever took the instance back may not be its parent.
                os.close(pidfd)

        task.add_done_callback(end)

    def unwatch(self, name: str) -> bool:
        """Leave an instance to the caller, who has its turn; whether it was watched."""
        task = self._tasks.pop(name, None)
        return task is not None and task.cancel()

    async def close(self) -> None:
        """Stop watching."""
        tasks = list(self._tasks.values())
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    def publish_end(self, name: str) -> None:
        """Tell of the end of an instance that was taken back: as it is known, or just that."""
        last = records.recall(self._host.paths, name)
        if last is None:
            self.publish(name, InstanceState.STOPPED)
        else:
            self.publish(name, last.state, last.reason)

    async def _see_end(self, name: str, generation: str, pidfd: int | None) -> None:
        if pidfd is not None:
            await readable(pidfd, None)
        try:
            async with self._turn(name):
                await self._after_end(name, generation)
        except (Fault, OSError) as error:
            self.publish(name, InstanceState.UNKNOWN, str(error))

    async def _after_end(self, name: str, generation: str) -> None:
        from kvmsec.node.reconcile import is_true, settle_record

        now = records.load(self._host.paths, name)
        if now is not None and (now.generation != generation or is_true(now)):
            return  # Somebody else took it back, and started it again.
        if now is not None:
            await settle_record(self._host, now)
        self.publish_end(name)
