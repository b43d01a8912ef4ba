"""Whether a node's copy of the cluster's state is good enough to draw a uid from: pure."""

from datetime import datetime
from typing import Final

from kvmsec.errors import StaleCopy
from kvmsec.model.cluster import Cluster
from kvmsec.store.identity import Identity

COPY_VALID_S: Final = 3600.0
"""How long a copy counts after it was confirmed, unless `cluster.copy_valid_s` says otherwise."""

SKEW_S: Final = 150.0
"""How far clocks may differ: the reference's `NODE_MAX_CLOCK_SKEW`."""


def is_truth(cluster: Cluster, identity: Identity | None) -> bool:
    """Whether a node's state is the truth rather than a copy: the master's, and a lone node's."""
    if len(cluster.nodes) == 1:
        return True
    return identity is not None and identity.uuid == cluster.master


def require_revision(found: int, wanted: int) -> None:
    """Refuse an order that was made from a newer state than the node has. Raises StaleCopy."""
    if found < wanted:
        raise StaleCopy(
            f"this node has revision {found} of the cluster's state, and the order was made from "
            f"revision {wanted}",
            found=found,
            wanted=wanted,
        )


def require_confirmed(
    cluster: Cluster,
    revision: int,
    identity: Identity | None,
    *,
    now: datetime,
    copy_valid_s: float = COPY_VALID_S,
) -> None:
    """Refuse to draw from a copy that the master has not confirmed for too long.

    `revision` is the copy's. A confirmation from the future, by more than clocks may differ, counts
    for none: the clock was set back, and how old the copy is can't be told. Raises StaleCopy.
    """
    if is_truth(cluster, identity):
        return
    master = cluster.master_member.name
    confirmed_at = identity.confirmed_at if identity is not None else None
    if confirmed_at is None:
        problem = f"the master, {master}, has never confirmed this node's copy of the state"
    else:
        age_s = (now - confirmed_at).total_seconds()
        if -SKEW_S <= age_s <= copy_valid_s:
            return
        problem = f"the master, {master}, " + (
            f"has not confirmed this node's copy of the state for {age_s:.0f} s; it counts for "
            f"{copy_valid_s:.0f} s"
            if age_s > 0
            else f"confirmed this node's copy of the state {-age_s:.0f} s in the future"
        )
    raise StaleCopy(problem, found=revision, wanted=revision)
