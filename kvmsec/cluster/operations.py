"""`cluster init`, `modify`, `info` and `destroy`: decided once, done on every node.

The store is changed first and the packet rules follow it. That is safe because no instance starts
before the rules of its uid were proved to hold; and a uid that leaves the pool is at first only
kept from being drawn (draining), so its rules stand until nobody holds it. A start draws its uid
first and reads the cluster afterwards, and gives back a uid that has left the pool: whichever of
start and change comes later sees the other.
"""

import contextlib
from collections.abc import Awaitable, Callable, Iterator, Mapping, Sequence
from datetime import UTC, datetime
from typing import Final, TypeVar
from uuid import uuid4

from kvmsec.cluster.changes import (
    Change,
    plan_init,
    plan_modify,
    taken_back,
    without_drained,
)
from kvmsec.cluster.nodes import ClusterNode
from kvmsec.errors import (
    ClusterExists,
    Conflict,
    InstancesRun,
    NoCluster,
    PoolRefused,
    UidsInUse,
)
from kvmsec.linux.errors import Fault
from kvmsec.model.cluster import Cluster, Member, Role
from kvmsec.model.security import SecurityModel
from kvmsec.store import Store
from uidpool.ranges import EMPTY, UidRanges

_T = TypeVar("_T")

Nodes = Sequence[ClusterNode]

_ATTEMPTS: Final = 20
"""A lost attempt is a rival's success, so this bounds a livelock only, not a busy cluster."""


async def init(
    store: Store,
    node: ClusterNode,
    name: str,
    *,
    uid_pool: UidRanges = EMPTY,
    security_model: SecurityModel | None = None,
) -> Cluster:
    """Make a cluster of this one node.

    Raises ClusterExists, BadName, ChangeRefused, PoolRefused, and what the store and the node
    raise; there is no cluster then, or still the one that was there.
    """
    if (standing := store.load()[0]) is not None:
        raise ClusterExists(standing.name)
    cluster = plan_init(
        name,
        node=Member(node.name, uuid=uuid4(), address=node.name, role=Role.CANDIDATE),
        uid_pool=uid_pool,
        security_model=security_model,
        uuid=uuid4(),
        created_at=datetime.now(UTC).replace(microsecond=0),
    )
    await _require_fit([node], uid_pool)
    try:
        revision = store.save(cluster, 0)
    except Conflict:
        raise ClusterExists(name) from None
    try:
        await node.sync_rules()
    except BaseException as error:
        with _taking_back(error), contextlib.suppress(Conflict):
            store.delete(cluster, revision)  # if somebody changed it since, it is theirs now
        await _sync_rules_again([node], error)
        raise
    return cluster


async def modify(store: Store, nodes: Nodes, change: Change) -> Cluster:
    """Change the pool or the security model; returns the cluster as it is afterwards.

    Rivals are waited for: the change is made anew from the state that they left. Raises
    NoCluster, ChangeRefused, PoolRefused, UidsInUse, Conflict (after many lost attempts), and
    what the store and the nodes raise; nothing has changed then.
    """

    async def attempt() -> Cluster:
        return await _modify_once(store, nodes, change)

    return await _until_unrivalled(attempt)


async def _modify_once(store: Store, nodes: Nodes, change: Change) -> Cluster:
    before, revision = _require_cluster(store)
    plan = plan_modify(before, change)
    undrained = EMPTY if change.drain else plan.leaving
    await _require_free(nodes, undrained)
    await _require_fit(nodes, plan.entering)
    if plan.cluster != before:
        store.save(plan.cluster, revision)
    try:
        # A start may have drawn one of them just before they were kept from being drawn.
        await _require_free(nodes, undrained)
        return await settle(store, nodes)
    except BaseException as error:
        with _taking_back(error):
            await _update(store, lambda current: taken_back(current, before, plan))
        await _sync_rules_again(nodes, error)
        raise


async def settle(store: Store, nodes: Nodes) -> Cluster:
    """Let draining uids go that nobody holds any more, and put the rules of what is left in force.

    Raises NoCluster, and what the store and the nodes raise.
    """

    async def attempt() -> Cluster:
        cluster, revision = _require_cluster(store)
        if cluster.draining:
            held = UidRanges.of_uids(await _held_uids(nodes))
            settled = without_drained(cluster, held)
            if settled != cluster:
                # Only from the very state that was asked about: a uid may have come back since.
                store.save(settled, revision)
                return settled
        return cluster

    cluster = await _until_unrivalled(attempt)
    for node in nodes:
        await node.sync_rules()
    return cluster


def info(store: Store) -> dict[str, object]:
    """What `cluster info` shows, as JSON has it. Raises NoCluster, and what the store raises."""
    cluster, _ = _require_cluster(store)
    return {
        "name": cluster.name,
        "uuid": str(cluster.uuid),
        "uid_pool": str(cluster.uid_pool),
        "uid_pool_size": cluster.uid_pool.size(),
        "draining_uids": str(cluster.draining),
        "security_model": cluster.default_model.value,
        "nodes": [{"name": node.name} for node in cluster.nodes],
        "created_at": cluster.created_at.isoformat(),
    }


async def destroy(store: Store, nodes: Nodes) -> None:
    """Forget the cluster, its rules and what rests.

    Raises NoCluster, InstancesRun, UidsInUse (of quarantined uids: without rules, what is left of
    them could send), and what the store and the nodes raise; the cluster stands then.
    """

    async def attempt() -> None:
        cluster, revision = _require_cluster(store)
        await _require_idle(nodes)
        store.delete(cluster, revision)
        try:
            # A start may have begun before the cluster was gone.
            await _require_idle(nodes)
            for node in nodes:
                await node.sync_rules()
                await node.forget_resting()
        except BaseException as error:
            with _taking_back(error), contextlib.suppress(Conflict):
                store.save(cluster, 0)  # unless there is a new cluster already
            await _sync_rules_again(nodes, error)
            raise

    await _until_unrivalled(attempt)


# Asking the store ----------------------------------------------------------------------------


def _require_cluster(store: Store) -> tuple[Cluster, int]:
    cluster, revision = store.load()
    if cluster is None:
        raise NoCluster
    return cluster, revision


async def _update(store: Store, change: Callable[[Cluster], Cluster]) -> None:
    """Put a change that holds for any state into the store; no cluster, nothing to change."""

    async def attempt() -> None:
        cluster, revision = store.load()
        if cluster is not None and (changed := change(cluster)) != cluster:
            store.save(changed, revision)

    await _until_unrivalled(attempt)


async def _until_unrivalled(attempt: Callable[[], Awaitable[_T]]) -> _T:
    for _ in range(_ATTEMPTS - 1):
        with contextlib.suppress(Conflict):
            return await attempt()
    return await attempt()


# Asking the nodes ----------------------------------------------------------------------------


async def _require_fit(nodes: Nodes, uids: UidRanges) -> None:
    if not uids:
        return
    problems: list[str] = []
    hints: dict[str, None] = {}
    for node in nodes:
        for problem in await node.check_pool(uids):
            problems.append(_on(node, problem.message, nodes))
            if problem.hint:
                hints[problem.hint] = None
    if problems:
        raise PoolRefused(problems, hint="; ".join(hints) or None)


async def _held_uids(nodes: Nodes) -> Mapping[int, str]:
    """Who holds which uid; several nodes may each have a holder of the same one."""
    held: dict[int, str] = {}
    for node in nodes:
        for uid, holder in (await node.held_uids()).items():
            here = _on(node, holder, nodes)
            held[uid] = f"{held[uid]}, {here}" if uid in held else here
    return held


async def _require_free(nodes: Nodes, uids: UidRanges) -> None:
    if not uids:
        return
    holders = {uid: who for uid, who in (await _held_uids(nodes)).items() if uid in uids}
    if holders:
        raise UidsInUse(
            "these uids can't leave the pool",
            holders,
            hint="stop the instances first, or let the uids leave once they are free: --drain",
        )


async def _require_idle(nodes: Nodes) -> None:
    running = [
        _on(node, name, nodes) for node in nodes for name in sorted(await node.running_instances())
    ]
    if running:
        raise InstancesRun(running)
    if held := await _held_uids(nodes):
        raise UidsInUse(
            "the cluster can't end while these uids are held",
            held,
            hint="clean them with `kvmsec uids release UID`",
        )


async def _sync_rules_again(nodes: Nodes, error: BaseException) -> None:
    """After a change was taken back."""
    for node in nodes:
        with _taking_back(error):
            await node.sync_rules()


@contextlib.contextmanager
def _taking_back(error: BaseException) -> Iterator[None]:
    """Within it a change is taken back for `error`; what fails does not hide why, but is noted."""
    try:
        yield
    except (Fault, OSError) as another:
        error.add_note(f"the change could not be taken back wholly either: {another}")


def _on(node: ClusterNode, text: str, nodes: Nodes) -> str:
    return text if len(nodes) == 1 else f"{node.name}: {text}"
