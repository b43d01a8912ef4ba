"""`cluster init`, `modify`, `info` and `destroy`: decided once, done on every node.

The store is changed first; copies and packet rules follow it. That is safe because no instance
starts before the rules of its uid were proved to hold; and a uid that leaves the pool is at first
only kept from being drawn (draining), so its rules stand until every member has said that nobody
holds it. A start draws its uid first and reads the cluster afterwards, and gives back a uid that
has left the pool: whichever of start and change comes later sees the other.

A node that does not answer holds no change up: it is named, gets the state when it answers again,
and draws nothing from a copy that is too old. One that says no has the change taken back on all.
"""

import contextlib
from collections.abc import Awaitable, Callable, Iterator, Mapping
from datetime import UTC, datetime
from typing import TypeVar
from uuid import uuid4

from attrs import field, frozen

from kvmsec.cluster.changes import (
    Change,
    Plan,
    certified,
    plan_init,
    plan_modify,
    taken_back,
    without_drained,
)
from kvmsec.cluster.handing import hand_out_copies, require_cluster, sync_all_rules
from kvmsec.cluster.nodes import ClusterNode, Directory, PoolProblem
from kvmsec.cluster.team import ATTEMPTS, Team, require_master
from kvmsec.cluster.trust import Founding
from kvmsec.errors import (
    ClusterExists,
    Conflict,
    InstancesRun,
    MembersLeft,
    PoolRefused,
    UidsInUse,
)
from kvmsec.linux.errors import Fault
from kvmsec.model.addresses import PORT
from kvmsec.model.cluster import Cluster, Member, Role
from kvmsec.model.security import SecurityModel
from kvmsec.store import Store
from uidpool.ranges import EMPTY, UidRanges

_T = TypeVar("_T")

OnStep = Callable[[str], None]


@frozen
class Done:
    """The cluster after a change; `silent` are the nodes that did not answer, and why."""

    cluster: Cluster
    silent: Mapping[str, str] = field(factory=dict)


def no_step(step: str) -> None:
    """What a caller does at a step that doesn't watch them."""


async def init(
    store: Store,
    node: ClusterNode,
    name: str,
    *,
    uid_pool: UidRanges = EMPTY,
    security_model: SecurityModel | None = None,
    address: str | None = None,
    port: int = PORT,
    founding: Founding | None = None,
) -> Cluster:
    """Make a cluster of this one node, its master.

    `address` is where other nodes will reach it (its name, unless told); `founding` makes the
    certificates. Raises ClusterExists, BadName, ChangeRefused, PoolRefused, and what the store, the
    node and `founding` raise; there is no cluster then, or still the one that was there.
    """
    if (standing := store.load()[0]) is not None:
        raise ClusterExists(standing.name)
    cluster = plan_init(
        name,
        node=Member(
            node.name, uuid=uuid4(), address=address or node.name, port=port, role=Role.CANDIDATE
        ),
        uid_pool=uid_pool,
        security_model=security_model,
        uuid=uuid4(),
        created_at=datetime.now(UTC).replace(microsecond=0),
    )
    await _require_fit_and_free(Team(node, ()), uid_pool, EMPTY)
    with contextlib.ExitStack() as undo:
        if founding is not None:
            undo.callback(founding.undo)
            cluster = certified(cluster, cluster.master, founding.found(cluster))
        await _begin(store, node, cluster)
        undo.pop_all()
    return cluster


async def _begin(store: Store, node: ClusterNode, cluster: Cluster) -> None:
    try:
        revision = store.save(cluster, 0)
    except Conflict:
        raise ClusterExists(cluster.name) from None
    try:
        await node.sync_rules()
    except BaseException as error:
        with _taking_back(error), contextlib.suppress(Conflict):
            store.delete(cluster, revision)  # if somebody changed it since, it is theirs now
        with _taking_back(error):
            await node.sync_rules()
        raise


async def modify(
    store: Store, directory: Directory, change: Change, *, on_step: OnStep = no_step
) -> Done:
    """Change the pool or the security model; returns the cluster as it is afterwards.

    Rivals are waited for: the change is made anew from the state that they left. Raises
    NoCluster, NotMaster, ChangeRefused, PoolRefused, UidsInUse, Conflict (after many lost
    attempts), and what the store and the nodes raise; nothing has changed then. `on_step` is told
    each step before it is taken: ask, save, hand out, settle.
    """

    async def attempt() -> Done:
        return await _modify_once(store, directory, change, on_step)

    return await until_unrivalled(attempt)


async def _modify_once(store: Store, directory: Directory, change: Change, on_step: OnStep) -> Done:
    before, revision = require_cluster(store)
    team = Team.of(store, directory, before)
    plan = plan_modify(before, change)
    undrained = EMPTY if change.drain else plan.leaving
    on_step("ask")
    await _require_fit_and_free(team, plan.entering, undrained)
    on_step("save")
    if plan.cluster != before:
        store.save(plan.cluster, revision)
    try:
        on_step("hand out")
        handed = await hand_out_copies(store, team)
        # A start may have drawn one of them just before they were kept from being drawn.
        await _require_fit_and_free(team, EMPTY, undrained)
        on_step("settle")
        return await _settle(store, team, handed)
    except BaseException as error:
        await _take_back(store, team, before, plan, error)
        raise


async def _take_back(
    store: Store, team: Team, before: Cluster, plan: Plan, error: BaseException
) -> None:
    with _taking_back(error):
        await update(store, lambda current: taken_back(current, before, plan))
    await _hand_out_again(store, team, error)


async def settle(store: Store, directory: Directory) -> Done:
    """Let draining uids go that no member holds any more, and hand out what is left.

    Every member must have said so: what a silent one holds is not known. Raises NoCluster,
    NotMaster, and what the store and the nodes raise.
    """
    cluster, _ = require_cluster(store)
    return await _settle(store, Team.of(store, directory, cluster))


async def _settle(store: Store, team: Team, handed: int | None = None) -> Done:
    """`handed` is the revision that all who listen have: the same state is not sent once more."""

    async def attempt() -> Cluster:
        cluster, revision = require_cluster(store)
        if cluster.draining and not team.silent:
            held = UidRanges.of_uids(await _held_uids(team))
            settled = cluster if team.silent else without_drained(cluster, held)
            if settled != cluster:
                # Only from the very state that was asked about: a uid may have come back since.
                store.save(settled, revision)
                return settled
        return cluster

    cluster = await until_unrivalled(attempt)
    if store.load()[1] != handed:
        await hand_out_copies(store, team)
    await sync_all_rules(team)
    return Done(cluster, dict(team.silent))


def info(store: Store) -> dict[str, object]:
    """What `cluster info` shows, as JSON has it. Raises NoCluster, and what the store raises."""
    cluster, revision = require_cluster(store)
    return {
        "name": cluster.name,
        "uuid": str(cluster.uuid),
        "uid_pool": str(cluster.uid_pool),
        "uid_pool_size": cluster.uid_pool.size(),
        "draining_uids": str(cluster.draining),
        "security_model": cluster.default_model.value,
        "nodes": [describe(node, cluster) for node in cluster.nodes],
        "master": cluster.master_member.name,
        "revision": revision,
        "created_at": cluster.created_at.isoformat(),
    }


def describe(node: Member, cluster: Cluster) -> dict[str, object]:
    """A member, as JSON has it."""
    return {
        "name": node.name,
        "uuid": str(node.uuid),
        "address": node.address,
        "port": node.port,
        "role": "master" if node.uuid == cluster.master else node.role.value,
        "certificates": list(node.certificates),
    }


async def destroy(store: Store, here: ClusterNode) -> None:
    """Forget the cluster, its rules and what rests, on its last node.

    Raises NoCluster, NotMaster, MembersLeft, InstancesRun, UidsInUse (of quarantined uids: without
    rules, what is left of them could send), and what the store and the node raise; the cluster
    stands then.
    """

    async def attempt() -> None:
        cluster, revision = require_cluster(store)
        if len(cluster.nodes) > 1:
            require_master(store, cluster)
            raise MembersLeft([node.name for node in cluster.nodes if node.uuid != cluster.master])
        await require_idle(here)
        store.delete(cluster, revision)
        try:
            # A start may have begun before the cluster was gone.
            await require_idle(here)
            await here.sync_rules()
            await here.forget_resting()
        except BaseException as error:
            with _taking_back(error), contextlib.suppress(Conflict):
                store.save(cluster, 0)  # unless there is a new cluster already
            with _taking_back(error):
                await here.sync_rules()
            raise

    await until_unrivalled(attempt)


# Asking the store ----------------------------------------------------------------------------


async def update(store: Store, change: Callable[[Cluster], Cluster]) -> None:
    """Put a change that holds for any state into the store; no cluster, nothing to change."""

    async def attempt() -> None:
        cluster, revision = store.load()
        if cluster is not None and (changed := change(cluster)) != cluster:
            store.save(changed, revision)

    await until_unrivalled(attempt)


async def until_unrivalled(attempt: Callable[[], Awaitable[_T]]) -> _T:
    """Try until nobody else changed the state in between. Raises Conflict after many attempts."""
    for _ in range(ATTEMPTS - 1):
        with contextlib.suppress(Conflict):
            return await attempt()
    return await attempt()


# Asking the nodes ----------------------------------------------------------------------------


async def _require_fit_and_free(team: Team, fit: UidRanges, free: UidRanges) -> None:
    """Have all nodes say at once whether some uids are fit there, and others not held."""
    if not fit and not free:
        return

    async def look(node: ClusterNode) -> tuple[list[PoolProblem], Mapping[int, str]]:
        problems = list(await node.check_pool(fit)) if fit else []
        return problems, await node.held_uids() if free else {}

    found = await team.ask(look)
    held = {name: holders for name, (_, holders) in found.items()}
    holders = {uid: who for uid, who in _joined(held, team).items() if uid in free}
    if holders:
        raise UidsInUse(
            "these uids can't leave the pool",
            holders,
            hint="stop the instances first, or let the uids leave once they are free: --drain",
        )
    require_no_problems({name: problems for name, (problems, _) in found.items()})


def require_no_problems(found: Mapping[str, list[PoolProblem]]) -> None:
    """Raises PoolRefused with every node's problems."""
    by_node = {name: problems for name, problems in sorted(found.items()) if problems}
    if not by_node:
        return
    several = len(found) > 1
    hints = dict.fromkeys(one.hint for some in by_node.values() for one in some if one.hint)
    raise PoolRefused(
        [
            f"{name}: {one.message}" if several else one.message
            for name, some in by_node.items()
            for one in some
        ],
        hint="; ".join(hints) or None,
        by_node={name: [one.message for one in some] for name, some in by_node.items()},
    )


async def _held_uids(team: Team) -> Mapping[int, str]:
    async def look(node: ClusterNode) -> Mapping[int, str]:
        return await node.held_uids()

    return _joined(await team.ask(look), team)


def _joined(held: Mapping[str, Mapping[int, str]], team: Team) -> Mapping[int, str]:
    """Who holds which uid; several nodes may each have a holder of the same one."""
    joined: dict[int, str] = {}
    for name, holders in sorted(held.items()):
        for uid, holder in holders.items():
            there = holder if team.is_alone else f"{name}: {holder}"
            joined[uid] = f"{joined[uid]}, {there}" if uid in joined else there
    return joined


async def require_idle(node: ClusterNode) -> None:
    """Raises InstancesRun and UidsInUse while a node has something of the cluster."""
    if running := sorted(await node.running_instances()):
        raise InstancesRun(running)
    if held := await node.held_uids():
        raise UidsInUse(
            "the cluster can't end while these uids are held",
            held,
            hint="clean them with `kvmsec uids release UID`",
        )


async def _hand_out_again(store: Store, team: Team, error: BaseException) -> None:
    """After a change was taken back."""
    with _taking_back(error):
        await hand_out_copies(store, team)
    # Rules follow the store here, and the copy elsewhere, even where a member won't have its own.
    with _taking_back(error):
        await sync_all_rules(team)


@contextlib.contextmanager
def _taking_back(error: BaseException) -> Iterator[None]:
    """Within it a change is taken back for `error`; what fails does not hide why, but is noted."""
    try:
        yield
    except (Fault, OSError) as another:
        error.add_note(f"the change could not be taken back wholly either: {another}")
