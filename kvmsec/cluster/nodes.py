"""What a cluster asks of each of its nodes."""

from collections.abc import Mapping, Sequence
from typing import Protocol

from uidpool.ranges import UidRanges


class PoolProblem(Protocol):
    """Why some uids may not be in the pool: words that name the uids, and what to do."""

    @property
    def message(self) -> str: ...

    @property
    def hint(self) -> str | None: ...


class ClusterNode(Protocol):
    """The part of a node that the cluster's decisions need. Every call may raise a Fault."""

    @property
    def name(self) -> str:
        """The node's host name."""

    async def check_pool(self, uids: UidRanges) -> Sequence[PoolProblem]:
        """What keeps these uids from being in the pool on this node."""

    async def held_uids(self) -> Mapping[int, str]:
        """Each uid that an instance of this root holds, or that is quarantined: by whom, or why."""

    async def running_instances(self) -> Sequence[str]:
        """The names of the instances of this root that run, start or stop."""

    async def sync_rules(self) -> None:
        """Make the packet rules hold what the cluster's state, as it is now, says, and no more.

        The state is read under the lock that orders changes of the rules, so that of two rivals
        the later never puts an older state in force. Without a cluster no rule is left.
        """

    async def forget_resting(self) -> None:
        """Forget which uids of this root rest; what is leased or quarantined is kept."""
