"""What a command works on: the root that was chosen, this node, and the cluster's state."""

from __future__ import annotations

import os
import signal
from collections.abc import Awaitable, Callable
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Protocol, TypeVar

import click

from kvmsec.cli.failures import Terminated, notes_of

if TYPE_CHECKING:
    import asyncio
    from contextlib import AbstractAsyncContextManager

    from kvmsec.agent import Agent
    from kvmsec.cluster.nodes import ClusterNode, Household, JoiningNode
    from kvmsec.config import Config
    from kvmsec.model.cluster import Member
    from kvmsec.paths import Paths
    from kvmsec.store import Store

    class Node(Agent, ClusterNode, Protocol):
        """This node, as its agent and as a member of the cluster."""

        async def close(self) -> None: ...

    class Remote(Agent, ClusterNode, Protocol):
        """Another member: what anyone may ask of a node, and its household."""

        @property
        def household(self) -> Household: ...

    class Reach(Protocol):
        """The ways to the members of this node's cluster (`kvmsec.cluster.nodes.Directory`)."""

        @property
        def here(self) -> Node: ...

        @property
        def household(self) -> Household:
            """This node, as others ask it."""

        def node(self, member: Member) -> Remote: ...

        def joining(self, member: Member) -> JoiningNode: ...


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

    @cached_property
    def config(self) -> Config:
        """The node's settings. Raises BadConfig."""
        from kvmsec.config import load_config

        return load_config(self.paths.config)

    @property
    def copy_valid_s(self) -> float:
        """How long a copy of the state counts once it was confirmed, in seconds."""
        return self.config.cluster.copy_valid_s

    @property
    def members(self) -> tuple[Member, ...]:
        """The nodes of this node's cluster; none before there is one."""
        cluster, _ = self.store.load()
        return cluster.nodes if cluster is not None else ()

    def on_step(self, step: str) -> None:
        """What a command does at each step of what it changes: nothing."""

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

    def run_reaching(self, action: Callable[[Reach], Awaitable[_T]]) -> _T:
        """As `run`, for what may need the other members, too."""

        async def act(node: Node) -> _T:
            async with open_reach(self, node) as reach:
                return await action(reach)

        return self.run(act)

    def run_on(
        self,
        name: str | None,
        action: Callable[[Agent], Awaitable[_T]],
        *,
        is_local: bool = False,
    ) -> _T:
        """Run something on the member `name`, or on this node. Raises UnknownMember, NoCluster."""
        if name is None:
            return self.run(action, is_local=is_local)

        async def act(reach: Reach) -> _T:
            from kvmsec.cli.remote import on_member

            return await on_member(self.store, reach, name, action)

        return self.run_reaching(act)


def is_root() -> bool:
    return os.geteuid() == 0


def open_node(root: Path) -> Node:
    from kvmsec.node.local import LocalNode

    return LocalNode(root)


def open_reach(session: Session, node: Node) -> AbstractAsyncContextManager[Reach]:
    from kvmsec.cli.reaching import opened

    return opened(session, node)


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
