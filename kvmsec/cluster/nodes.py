"""What a cluster asks of each of its nodes, and who can reach them."""

from collections.abc import Mapping, Sequence
from typing import Protocol
from uuid import UUID

from attrs import frozen

from kvmsec.model.cluster import Member
from kvmsec.rpc.messages import Examination, FileRequest, NodeInfo, State
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


class Household(Protocol):
    """A node as a member of a cluster. Every call may raise a Fault."""

    async def info(self) -> NodeInfo:
        """Who the node is, and how far its copy of the state is."""

    async def examine(self, pool: UidRanges) -> Examination:
        """What there is to know of the node's part in the cluster."""

    async def get_state(self) -> State:
        """The node's copy."""

    async def put_state(self, state: State) -> int:
        """Hand the node the state, or confirm what it has; returns its revision afterwards."""

    async def put_file(self, request: FileRequest) -> None:
        """Put one of the cluster's files in place, or take it away."""

    async def leave(self) -> None:
        """Let the node forget the cluster: its state, rules, certificates and keys.

        Raises InstancesRun and UidsInUse; it stays a member then.
        """


class MemberNode(ClusterNode, Protocol):
    """Another member, as the master reaches it.

    A call that gets no answer raises an error whose `kind` is one of
    `kvmsec.cluster.asking.SILENCE`.
    """

    @property
    def household(self) -> Household: ...


class JoiningNode(Protocol):
    """A node that is to become a member, reached with what an invitation gives.

    Both calls show and demand the proof that the other side knows the token.
    """

    async def hello(self, name: str, uuid: UUID) -> str:
        """Tell the node who it is to be; returns its request (PEM) for a certificate."""

    async def admit(self, anchors: str, certificate: str, state: State) -> NodeInfo:
        """Make it a member."""


class Directory(Protocol):
    """Who can reach the members of a cluster."""

    @property
    def here(self) -> ClusterNode:
        """This node."""

    def node(self, member: Member) -> MemberNode:
        """A member other than this node; nothing is asked of it yet."""

    def joining(self, member: Member) -> JoiningNode:
        """An invited node that is to become this member."""


@frozen
class Alone:
    """The directory of a cluster whose only node is this one."""

    here: ClusterNode

    def node(self, member: Member) -> MemberNode:
        raise LookupError(f"nobody here can reach {member.name}")

    def joining(self, member: Member) -> JoiningNode:
        raise LookupError(f"nobody here can reach {member.name}")
