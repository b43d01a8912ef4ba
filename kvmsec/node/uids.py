"""Who holds which uid of this node, and what is kept back."""

from collections.abc import Iterator, Mapping
from typing import Final

from attrs import evolve

from kvmsec.agent import UidState
from kvmsec.errors import KvmsecError
from kvmsec.node import leasing
from kvmsec.node.host import Host
from uidpool import claims
from uidpool.accounts import Problem
from uidpool.claims import Quarantined, State
from uidpool.processes import uids_that_run
from uidpool.ranges import EMPTY, UidRanges
from uidpool.snapshot import find_account

_MAX_FREE_SHOWN: Final = 10_000
_MAX_USED_SHOWN: Final = 20


class UidNotClean(KvmsecError):
    """A quarantined uid still has something that could not be taken from it."""

    def __init__(self, uid: int, reason: str) -> None:
        super().__init__(
            f"uid {uid} stays quarantined: {reason}",
            hint="end or remove what is named, then run `kvmsec uids release` again",
        )
        self.uid = uid
        self.reason = reason


def held_uids(host: Host) -> Mapping[int, str]:
    """Each uid that an instance of this root holds, or that one of its own left quarantined."""
    root = str(host.paths.root)
    held = {one.uid: f"instance {one.instance}" for one in host.claims.leases() if one.root == root}
    for kept in host.claims.quarantined():
        if kept.root == root:
            held[kept.uid] = f"quarantined: {kept.reason}"
    return held


def used_by_others(host: Host, uids: UidRanges) -> Iterator[Problem]:
    """Those of `uids` that something runs under which is no instance's, of any root of the host.

    One look at /proc, before the claims: what an instance has meanwhile let go of rests there.
    """
    running = {uid: one for uid, one in uids_that_run().items() if uid in uids}
    claimed = {one.uid for one in host.claims.states()} if running else set()
    for uid in sorted(running.keys() - claimed)[:_MAX_USED_SHOWN]:
        yield Problem(
            UidRanges.of_uids([uid]),
            "in-use",
            f"uid {uid}: process {running[uid]} runs under it",
            "end what runs under it, or choose other uids",
        )


def uid_states(host: Host, *, with_free: bool) -> tuple[UidState, ...]:
    """The uids of the pool and of this root's instances that are not free; all with `with_free`.

    At most ten thousand free ones are listed.
    """
    cluster, _ = host.store.load()
    pool, draining = (cluster.uid_pool, cluster.draining) if cluster else (EMPTY, EMPTY)
    root = str(host.paths.root)
    seen = [
        _state(one)
        for one in host.claims.states(draining=draining)
        if one.uid in (pool | draining) or one.root == root
    ]
    taken = UidRanges.of_uids(one.uid for one in seen)
    idle = [UidState(uid, None, "draining") for uid in _first(draining - taken)]
    free = [UidState(uid, None, "free") for uid in _first(pool - taken)] if with_free else []
    return tuple(_named(one) for one in sorted([*seen, *idle, *free], key=lambda one: one.uid))


async def release_uid(host: Host, uid: int) -> UidState:
    """Clean a quarantined uid and give it back. Raises UidNotClean, UidHeld and ClaimsError."""
    outcome = await leasing.retry(host.claims, uid)
    if isinstance(outcome, Quarantined):
        raise UidNotClean(uid, outcome.reason)
    return _named(UidState(uid, None, "free"))


def _state(one: claims.UidState) -> UidState:
    reason = one.reason
    if one.state is State.RESTING and one.until is not None:
        reason = f"until {one.until.isoformat(timespec='seconds')}"
    return UidState(one.uid, None, one.state.value, one.instance, reason, one.root)


def _named(one: UidState) -> UidState:
    account = find_account(one.uid)
    return evolve(one, user=account.name if account else None)


def _first(uids: UidRanges) -> Iterator[int]:
    return (uids.nth(index) for index in range(min(uids.size(), _MAX_FREE_SHOWN)))
