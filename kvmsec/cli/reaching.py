"""How a command reaches the other members, and this node as they do."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING

from kvmsec.daemon.ways import Ways

if TYPE_CHECKING:
    from kvmsec.cli.session import Node, Reach, Session
    from kvmsec.cluster.nodes import Household


class _Reach(Ways["Node"]):
    """`kvmsec.cli.session.Reach`."""

    @property
    def household(self) -> Household:
        from kvmsec.node.local import LocalNode
        from kvmsec.rpc.remote import RemoteAgent

        if isinstance(self.here, RemoteAgent):
            return self.here.household  # the daemon's
        from kvmsec.daemon.household import Household as OwnHousehold

        assert isinstance(self.here, LocalNode)
        return OwnHousehold(self.here)


@asynccontextmanager
async def opened(session: Session, here: Node) -> AsyncIterator[Reach]:
    """The ways to the members, for as long as a command runs."""
    async with _Reach(session.paths, lambda: session.config, session.store, here) as reach:
        yield reach
