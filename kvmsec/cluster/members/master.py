"""What every change of the members is made with, on the master."""

from collections.abc import Callable, Mapping, Sequence

from attrs import evolve, field, frozen

from kvmsec.cluster.handing import require_cluster
from kvmsec.cluster.nodes import Directory
from kvmsec.cluster.operations import OnStep, no_step
from kvmsec.cluster.team import Team, require_master
from kvmsec.cluster.trust import Authority, Invitations
from kvmsec.errors import UnknownMember
from kvmsec.model.cluster import Cluster, Member
from kvmsec.store import Store


def nothing_pending() -> None:
    """What stands for the renewals where there are none."""


@frozen(kw_only=True)
class Master:
    """The master's means. `on_step` is told the name of each step before it is taken.

    `require_none_pending` raises RenewalPending while certificates are renewed
    (`kvmsec.cluster.renewal.operations`): who joins or changes its role then would be given what
    is about to be dropped.
    """

    store: Store
    directory: Directory
    authority: Authority
    invitations: Invitations
    on_step: OnStep = no_step
    require_none_pending: Callable[[], None] = nothing_pending

    def cluster(self) -> Cluster:
        """The state. Raises NoCluster and NotMaster."""
        cluster, _ = require_cluster(self.store)
        require_master(self.store, cluster)
        return cluster

    def settled_cluster(self) -> Cluster:
        """As `cluster`, for what must not be done during a renewal. Raises RenewalPending."""
        cluster = self.cluster()
        self.require_none_pending()
        return cluster

    def team(self) -> Team:
        """The members as they are now. Raises NoCluster and NotMaster."""
        return Team.of(self.store, self.directory, self.cluster())


@frozen(kw_only=True)
class Changed:
    """A member after a change.

    `behind` are the nodes that don't know of it yet, and why; they will be told when they answer.
    `notes` are what a person has to know or to do besides.
    """

    member: Member
    behind: Mapping[str, str] = field(factory=dict)
    notes: Sequence[str] = ()


def require_member(cluster: Cluster, name: str) -> Member:
    """The member of this name. Raises UnknownMember."""
    member = cluster.named(name)
    if member is None:
        raise UnknownMember(name)
    return member


def with_member(cluster: Cluster, member: Member) -> Cluster:
    """The cluster in which `member` stands in place of who had its uuid, or joins."""
    if cluster.member(member.uuid) is None:
        return evolve(cluster, nodes=(*cluster.nodes, member))
    return _each(cluster, lambda node: member if node.uuid == member.uuid else node)


def without_member(cluster: Cluster, member: Member) -> Cluster:
    nodes = tuple(node for node in cluster.nodes if node.uuid != member.uuid)
    return evolve(cluster, nodes=nodes)


def _each(cluster: Cluster, change: Callable[[Member], Member]) -> Cluster:
    return evolve(cluster, nodes=tuple(map(change, cluster.nodes)))
