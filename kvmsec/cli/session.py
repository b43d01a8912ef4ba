"""What a command works on: the root that was chosen, this node, and the cluster's state."""

from __future__ import annotations

import os
import signal
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import TYPE_CHECKING, Protocol, TypeVar

import click

from kvmsec.cli.failures import Terminated

if TYPE_CHECKING:
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

    def run(self, action: Callable[[Node], Awaitable[_T]]) -> _T:
        """Run what needs this node, as root: the one place that starts an event loop.

        An interrupt, SIGTERM and SIGHUP cancel the action, and its undoing is waited for; only a
        second interrupt cuts that short. Raises KeyboardInterrupt and Terminated then.
        """
        self.require_root()
        import asyncio

        return asyncio.run(_act(self.root, action))


def is_root() -> bool:
    return os.geteuid() == 0


def open_node(root: Path) -> Node:
    from kvmsec.node.local import LocalNode

    return LocalNode(root)


async def _act(root: Path, action: Callable[[Node], Awaitable[_T]]) -> _T:
    import asyncio

    task = asyncio.current_task()
    loop = asyncio.get_running_loop()
    told: list[int] = []

    def end(number: int) -> None:
        told.append(number)
        if task is not None:
            task.cancel()

    for number in (signal.SIGTERM, signal.SIGHUP):
        if signal.getsignal(number) is signal.SIG_DFL:  # nohup(1) has a hangup ignored
            loop.add_signal_handler(number, end, number)
    node = open_node(root)
    try:
        return await action(node)
    except asyncio.CancelledError:
        if told:
            raise Terminated(told[0]) from None
        raise
    finally:
        await node.close()


pass_session = click.make_pass_decorator(Session)
