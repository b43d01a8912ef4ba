"""What a command works on: the root that was chosen, this node, and the cluster's state."""

from __future__ import annotations

import os
import signal
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import TYPE_CHECKING, Protocol, TypeVar

import click

from kvmsec.cli.failures import Terminated, notes_of

if TYPE_CHECKING:
    import asyncio

    from kvmsec.agent import Agent
    from kvmsec.cluster.nodes import ClusterNode
    from kvmsec.paths import Paths
    from kvmsec.store import Store

    class Node(Agent, ClusterNode, Protocol):
        """This node, as its agent and as a member of the cluster."""

        async def close(self) -> None: ...


_T = TypeVar("_T")


class Session:
    """One run of the command: everything that its subcommands share."""

    def __init__(self, root: Path, *, is_debug: bool) -> None:
        self.root = root
        self.is_debug = is_debug

    @property
    def paths(self) -> Paths:
        from kvmsec.paths import Paths

        return Paths(self.root)

    @property
    def store(self) -> Store:
        from kvmsec.store.file import FileStore

        return FileStore(self.paths.cluster)

    def require_root(self) -> None:
        """Raises NotRoot, before anything was looked at or touched."""
        if is_root():
            return
        from kvmsec.errors import NotRoot

        raise NotRoot(f"`{click.get_current_context().command_path}`")

    def run(self, action: Callable[[Node], Awaitable[_T]], *, is_local: bool = False) -> _T:
        """Run what needs this node, as root: the one place that starts an event loop.

        Through the node's daemon where one answers, unless `is_local`: that is for what works on
        an instance's own files and sockets, from here.

        An interrupt, SIGTERM and SIGHUP cancel the action, and its undoing is waited for, however
        often one presses; a signal that comes when all is done changes nothing. Raises Terminated.
        """
        self.require_root()
        import asyncio

        return asyncio.run(_act(self.root, action, is_local=is_local))


def is_root() -> bool:
    return os.geteuid() == 0


def open_node(root: Path) -> Node:
    from kvmsec.node.local import LocalNode

    return LocalNode(root)


async def _find_node(root: Path, *, is_local: bool) -> Node:
    """The daemon where one listens, else the node itself. Raises DaemonSilent, ForeignSocket."""
    from kvmsec.paths import Paths

    path = Paths(root).node_socket
    if not is_local and path.exists():
        from kvmsec.daemon.reaching import reach  # the calls' codec, where somebody answers them

        if (daemon := await reach(path)) is not None:
            return daemon
    return open_node(root)


async def _act(
    root: Path, action: Callable[[Node], Awaitable[_T]], *, is_local: bool = False
) -> _T:
    import asyncio

    node = await _find_node(root, is_local=is_local)
    notes: list[str] = []

    async def act() -> _T:
        try:
            return await action(node)
        except asyncio.CancelledError as error:
            notes.extend(notes_of(error))
            raise

    work = asyncio.create_task(act())
    told = _cancelled_by_signals(work)
    try:
        # Not awaited itself: what is cancelled is the work, and never the wait for its undoing.
        await asyncio.wait((work,))
        if work.cancelled() and told:
            raise Terminated(told[0], notes)
        return work.result()
    finally:
        await node.close()


def _cancelled_by_signals(work: asyncio.Task[_T]) -> list[int]:
    """Have the first of the signals cancel the work; the list holds those that came.

    By way of the loop: so a signal never falls into the middle of what is done without a pause.
    """
    import asyncio

    told: list[int] = []

    def end(number: int) -> None:
        if not told:
            work.cancel()
        told.append(number)

    loop = asyncio.get_running_loop()
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        if signal.getsignal(number) is not signal.SIG_IGN:  # nohup(1) has a hangup ignored
            loop.add_signal_handler(number, end, number)
    return told


pass_session = click.make_pass_decorator(Session)
