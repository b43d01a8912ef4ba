"""Becoming the master: on a candidate, when the old one is gone.

The embedded store is one file on each node, no quorum. So this is what it can and can't do: the
newest copy among the candidates that answer becomes the state, and a change that reached none of
them is lost. Two candidates that take over at once, each without hearing the other, make two
masters; nodes stay with the first that reaches them, and refuse the other's state by name.
"""

from collections.abc import Mapping
from datetime import UTC, datetime

from attrs import evolve, field, frozen

from kvmsec.cluster.asking import ask_all
from kvmsec.cluster.handing import require_cluster, spread
from kvmsec.cluster.nodes import Directory, MemberNode
from kvmsec.cluster.operations import OnStep, no_step
from kvmsec.cluster.team import Team
from kvmsec.errors import MemberRefused
from kvmsec.model.cluster import Cluster, Member
from kvmsec.rpc.messages import State
from kvmsec.store import Store


@frozen(kw_only=True)
class Taken:
    """The cluster under its new master.

    `copied` is the revision that it goes on from, `source` whose copy that was. `unheard` are the
    candidates that did not say what they have, `behind` the nodes that don't know yet.
    """

    cluster: Cluster
    copied: int
    source: str
    unheard: Mapping[str, str] = field(factory=dict)
    behind: Mapping[str, str] = field(factory=dict)


async def take_over(
    store: Store, directory: Directory, *, force: bool = False, on_step: OnStep = no_step
) -> Taken:
    """Make this candidate the master, in a new term.

    Without `force` only when the old master does not answer. Steps: ask, copy, save, spread.
    Killed before it is saved, run it again; after that, any change or `sync` spreads it. Raises
    NoCluster, MemberRefused, and what the store raises.
    """
    cluster, _ = require_cluster(store)
    me = _require_candidate(store, cluster)
    if cluster.master == me.uuid and not force:
        raise MemberRefused(
            f"{me.name} is the master already",
            hint="run `kvmsec cluster sync` if others don't know; where another master has made "
            "another state meanwhile, --force puts this node's in its place",
        )
    on_step("ask")
    copies, unheard = await _copies(directory, cluster, me)
    if cluster.master_member.name in copies and not force:
        raise MemberRefused(
            f"the master, {cluster.master_member.name}, answers",
            hint="let it go on, or stop its daemon first; --force takes over all the same",
        )
    on_step("copy")
    source = _take_newest(store, copies, me)
    on_step("save")
    cluster, copied = require_cluster(store)
    me = _require_candidate(store, cluster)
    taken = evolve(cluster, master=me.uuid)
    store.take_over(taken, copied)
    on_step("spread")
    behind = await spread(store, Team.of(store, directory, taken))
    return Taken(cluster=taken, copied=copied, source=source, unheard=unheard, behind=behind)


def _require_candidate(store: Store, cluster: Cluster) -> Member:
    identity = store.identity()
    me = cluster.member(identity.uuid) if identity is not None else None
    if me is None or not me.is_candidate or me.is_leaving:
        who = ", ".join(node.name for node in cluster.candidates)
        raise MemberRefused("this node is no master candidate", hint=f"run it on one of: {who}")
    return me


async def _copies(
    directory: Directory, cluster: Cluster, me: Member
) -> tuple[Mapping[str, State], Mapping[str, str]]:
    """What the other candidates have; and who did not say so, and why."""
    others = [directory.node(node) for node in cluster.candidates if node.uuid != me.uuid]

    async def get(node: MemberNode) -> State:
        return await node.household.get_state()

    answers = await ask_all(others, get)
    refused = {name: str(error) for name, error in answers.refused.items()}
    return answers.answered, {**answers.silent, **refused}


def _take_newest(store: Store, copies: Mapping[str, State], me: Member) -> str:
    """Have the newest copy here; returns whose it was."""
    _, found = require_cluster(store)
    source = me.name
    for name, state in sorted(copies.items(), key=lambda item: item[1].revision):
        if state.revision > found and state.document is not None:
            found = store.put_copy(
                state.document, state.format, state.revision, at=datetime.now(UTC)
            )
            source = name
    return source
