"""Handing the state to the members: what the master decided becomes true on all nodes."""

from collections.abc import Mapping

from kvmsec.cluster.asking import ORDER_S, ask_all, kind_of
from kvmsec.cluster.nodes import ClusterNode, Directory, MemberNode
from kvmsec.cluster.team import Team, require_master
from kvmsec.errors import CopyRefused, NoCluster
from kvmsec.linux.errors import Fault
from kvmsec.model.cluster import FORMAT, Cluster, Member, document_of
from kvmsec.rpc.messages import State
from kvmsec.store import Store


def require_cluster(store: Store) -> tuple[Cluster, int]:
    """The cluster and its revision. Raises NoCluster, and what the store raises."""
    cluster, revision = store.load()
    if cluster is None:
        raise NoCluster
    return cluster, revision


def state_of(cluster: Cluster, revision: int) -> State:
    """The state as it travels."""
    return State(revision=revision, format=FORMAT, document=document_of(cluster))


class _Newest:
    """The newest state of a store as it travels, made once for all nodes that it is handed to.

    Making it anew for each would take time by the square of their number: it names them all.
    """

    def __init__(self, store: Store) -> None:
        self._store = store
        self._made: State | None = None

    def state(self) -> State:
        """Raises NoCluster, and what the store raises."""
        cluster, revision = require_cluster(self._store)
        if self._made is None or self._made.revision != revision:
            self._made = state_of(cluster, revision)
        return self._made

    def is_newer_than(self, state: State) -> bool:
        return self._store.load()[1] != state.revision


async def hand_out_copies(store: Store, team: Team) -> int:
    """Hand the state, as it stands now, to every member that listens.

    Returns the revision that all of them have at least. Who already has the state has it
    confirmed. Raises a node's refusal, and what the store raises.
    """
    newest = _Newest(store)
    revision = newest.state().revision

    async def take(node: MemberNode) -> int:
        return await _hand(newest, node)

    had = await team.tell(take, deadline_s=ORDER_S)
    return min(had.values(), default=revision)


async def sync_all_rules(team: Team) -> None:
    """Have every node that listens, and this one, put the rules of its state in force."""

    async def sync(node: ClusterNode) -> None:
        await node.sync_rules()

    await team.ask(sync, deadline_s=ORDER_S)


async def spread(store: Store, team: Team) -> Mapping[str, str]:
    """Hand out a state that stands whoever refuses it; returns who doesn't have it, and why.

    This node comes first: its own list of candidates and its rules follow the state. Raises what
    this node raises.
    """
    await team.here.sync_rules()
    newest = _Newest(store)

    async def take(node: MemberNode) -> None:
        await _hand(newest, node)
        await node.sync_rules()

    answers = await ask_all(team.listening, take, deadline_s=ORDER_S)
    team.silent.update(answers.silent)
    return team.silent | {name: _told(error) for name, error in answers.refused.items()}


def _told(error: Fault | OSError) -> str:
    """A refusal with what mends it: nothing else is said of that node."""
    hint = getattr(error, "hint", None)
    return f"{error} ({hint})" if hint else str(error)


async def catch_up(store: Store, directory: Directory, member: Member) -> int:
    """Bring one member up to date, now that it answers (again); returns the revision.

    Raises NoCluster, NotMaster, and the node's error.
    """
    cluster, _ = require_cluster(store)
    require_master(store, cluster)
    node = directory.node(member)
    revision = await _hand(_Newest(store), node)
    await node.sync_rules()
    return revision


async def _hand(newest: _Newest, node: MemberNode) -> int:
    """Hand the newest state to one node; a rival may have handed it a newer one meanwhile."""
    while True:
        state = newest.state()
        try:
            return await node.household.put_state(state)
        except Fault as error:
            if kind_of(error) != CopyRefused.__name__ or not newest.is_newer_than(state):
                raise
