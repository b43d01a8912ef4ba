"""Commands about instances of other members, and of all of them at once."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import TYPE_CHECKING, TypeVar

from kvmsec.cluster.asking import ask_all, kind_of
from kvmsec.cluster.handing import catch_up, require_cluster
from kvmsec.cluster.members.master import require_member
from kvmsec.linux.errors import Fault
from kvmsec.store.freshness import is_truth

if TYPE_CHECKING:
    from kvmsec.agent import Agent, InstanceInfo
    from kvmsec.cli.session import Reach
    from kvmsec.cluster.asking import Answers
    from kvmsec.model.cluster import Cluster, Member
    from kvmsec.store import Store

_T = TypeVar("_T")


async def on_member(
    store: Store, reach: Reach, name: str, action: Callable[[Agent], Awaitable[_T]]
) -> _T:
    """Run something on a member, once more after the master has handed it the state that it lacks.

    Raises NoCluster, UnknownMember, and what the node raises.
    """
    cluster, _ = require_cluster(store)
    member = require_member(cluster, name)
    agent = _agent(store, reach, member)
    try:
        return await action(agent)
    except Fault as error:
        if kind_of(error) != "StaleCopy" or not _may_hand_out(store, cluster, member):
            raise
    await catch_up(store, reach, member)
    return await action(agent)


def _agent(store: Store, reach: Reach, member: Member) -> Agent:
    identity = store.identity()
    is_here = identity is not None and identity.uuid == member.uuid
    return reach.here if is_here else reach.node(member)


def _may_hand_out(store: Store, cluster: Cluster, member: Member) -> bool:
    return member.uuid != cluster.master and is_truth(cluster, store.identity())


class _One:
    """A member to be asked by its own name, whatever the node calls itself."""

    def __init__(self, name: str, agent: Agent) -> None:
        self.name = name
        self.agent = agent


async def list_all(store: Store, reach: Reach) -> Answers[tuple[InstanceInfo, ...]]:
    """The instances of every member, all asked at once. Raises NoCluster."""
    cluster, _ = require_cluster(store)
    nodes = [_One(member.name, _agent(store, reach, member)) for member in cluster.nodes]
    # This node last: what it does in place would keep the loop from asking the others.
    nodes.sort(key=lambda one: one.agent is reach.here)
    return await ask_all(nodes, lambda one: one.agent.list())
