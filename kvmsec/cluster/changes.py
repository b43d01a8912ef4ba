"""What a change makes of a cluster: pure, from values to values."""

from datetime import datetime
from uuid import UUID

from attrs import evolve, frozen

from kvmsec.errors import ChangeRefused
from kvmsec.model.cluster import Cluster, Member
from kvmsec.model.security import SecurityModel
from uidpool.ranges import EMPTY, UidRanges


@frozen(kw_only=True)
class Change:
    """What `cluster modify` is asked for; None leaves a thing as it is.

    `uid_pool` sets the pool, `add` and `remove` change it. `drain` lets removed uids that are in
    use leave once they are free, instead of refusing the change.
    """

    uid_pool: UidRanges | None = None
    add: UidRanges = EMPTY
    remove: UidRanges = EMPTY
    drain: bool = False
    security_model: SecurityModel | None = None


@frozen
class Plan:
    """What a change comes to.

    `cluster` has every uid that leaves the pool in `draining`, so that none of them is drawn
    while its holders are asked for; `entering` has those that each node must find fit.
    """

    cluster: Cluster
    entering: UidRanges
    leaving: UidRanges


def plan_init(
    name: str,
    *,
    node: Member,
    uid_pool: UidRanges,
    security_model: SecurityModel | None,
    uuid: UUID,
    created_at: datetime,
) -> Cluster:
    """A new cluster of one node. Raises BadName and ChangeRefused."""
    cluster = Cluster(
        name=name,
        uuid=uuid,
        uid_pool=uid_pool,
        draining=EMPTY,
        security_model=security_model,
        nodes=(node,),
        master=node.uuid,
        created_at=created_at,
    )
    _require_pool_where_needed(cluster)
    return cluster


def plan_modify(cluster: Cluster, change: Change) -> Plan:
    """What `change` makes of `cluster`. Raises ChangeRefused.

    Adding or setting a uid that is draining keeps it in the pool.
    """
    _require_sense(cluster, change)
    pool = cluster.uid_pool if change.uid_pool is None else change.uid_pool
    pool = (pool | change.add) - change.remove
    leaving = cluster.uid_pool - pool
    changed = evolve(
        cluster,
        uid_pool=pool,
        draining=(cluster.draining - pool) | leaving,
        security_model=_model_after(cluster, change, pool),
    )
    _require_pool_where_needed(changed)
    return Plan(changed, entering=change.add if change.uid_pool is None else pool, leaving=leaving)


def certified(cluster: Cluster, uuid: UUID, fingerprint: str) -> Cluster:
    """The cluster in which this certificate, and no other, counts for a member."""
    nodes = (
        evolve(node, certificates=(fingerprint,)) if node.uuid == uuid else node
        for node in cluster.nodes
    )
    return evolve(cluster, nodes=tuple(nodes))


def without_drained(cluster: Cluster, held: UidRanges) -> Cluster:
    """The cluster once the draining uids that nobody holds any more have left."""
    return evolve(cluster, draining=cluster.draining & held)


def taken_back(current: Cluster, before: Cluster, plan: Plan) -> Cluster:
    """`current` without what `plan` had made of `before`; what others changed since stays."""
    entered = plan.cluster.uid_pool - before.uid_pool
    pool = (current.uid_pool | plan.leaving) - entered
    model_is_ours = current.security_model is plan.cluster.security_model
    return evolve(
        current,
        uid_pool=pool,
        draining=(current.draining | (before.draining & entered)) - pool,
        security_model=before.security_model if model_is_ours else current.security_model,
    )


def _model_after(cluster: Cluster, change: Change, pool: UidRanges) -> SecurityModel | None:
    """The chosen model; a pool's end never makes `none` of the default, unless that was asked."""
    chosen = change.security_model or cluster.security_model
    if chosen is None and cluster.uid_pool and not pool:
        return SecurityModel.POOL
    return chosen


def _require_sense(cluster: Cluster, change: Change) -> None:
    if change.uid_pool is not None and (change.add or change.remove):
        raise ChangeRefused(
            "the uid pool can't be set and added to or removed from at once",
            hint="either give the whole pool, or what to add and to remove",
        )
    if both := change.add & change.remove:
        raise ChangeRefused(
            f"the uids {both} can't be both added and removed",
            hint="take them out of either what is added or what is removed",
        )
    if unknown := change.remove - cluster.guarded_uids:
        raise ChangeRefused(
            f"the uids {unknown} are not in the pool", hint=f"the pool is {cluster.uid_pool}"
        )


def _require_pool_where_needed(cluster: Cluster) -> None:
    if cluster.default_model is SecurityModel.POOL and not cluster.uid_pool:
        raise ChangeRefused(
            "the cluster's security model is pool, so it can't be without a uid pool",
            hint="name a pool, or choose another model with --security-model",
        )
