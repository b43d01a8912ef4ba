"""Draw a uid, hold it, release it: at most one holder on a node, whatever crashes when.

To look at a uid, to clean it and to wait for who has a lock can take long; the rest takes
milliseconds. So each of these is in steps (`uidpool.steps`), for who runs an event loop;
`uidpool.waiting` does them in one go.

A draw is uniform over the free uids, from the operating system's CSPRNG. Every change of the
records is made under one lock, and written so that a crash at any line leaves a uid held rather
than free: a rest or a quarantine is there before its lease goes.
"""

import contextlib
import secrets
from collections.abc import Callable, Collection
from datetime import UTC, datetime
from enum import StrEnum
from functools import partial
from pathlib import Path
from typing import Final

from attrs import evolve, frozen

from kvmsec.linux.locks import FileLock
from kvmsec.linux.processes import boot_id, myself
from uidpool import provision, usage
from uidpool.errors import (
    ClaimsError,
    NoCleanUid,
    NotSweepable,
    PoolExhausted,
    RecordNotWritten,
    RecordUnreadable,
    UidHeld,
)
from uidpool.ledger import Ledger, writing
from uidpool.occupation import Occupation
from uidpool.processes import Settled, nobody_settled
from uidpool.ranges import EMPTY, UidRanges
from uidpool.records import Lease, LeaseKey, Quarantine, Rest
from uidpool.steps import Clean, Look, Step, Verdict, Work

__all__ = [
    "Claims",
    "Lease",
    "LeaseKey",
    "Quarantine",
    "Quarantined",
    "Released",
    "Rest",
    "State",
    "UidState",
]

LOCK_TIMEOUT_S: Final = 60.0
"""How long is waited for another release of the same uid, and for another change of the records."""
_ATTEMPTS: Final = 8


class State(StrEnum):
    """What a uid is at that isn't free."""

    LEASED = "leased"
    RESTING = "resting"
    DRAINING = "draining"
    QUARANTINED = "quarantined"


@frozen
class UidState:
    """A uid that is not simply free: whose it is or was, why, and until when it rests."""

    uid: int
    state: State
    instance: str | None = None
    root: str | None = None
    reason: str | None = None
    until: datetime | None = None


@frozen
class Released:
    """The uid was clean and is given back."""

    def __str__(self) -> str:
        return "released"


@frozen
class Quarantined:
    """The uid could not be cleaned, and is kept back until it is."""

    reason: str

    def __str__(self) -> str:
        return f"quarantined: {self.reason}"


class Claims:
    """Who holds which uid on this node, for every kvmsec root of it.

    `leases` (below /run) and `state` (below /var/lib) are directories that only root may enter;
    they are made when they are needed. `root` names the kvmsec root that draws. `inspect` and
    `clean` are `uidpool.usage`'s unless a test brings its own. `settled` is for the quick looks of
    who runs an event loop.
    """

    def __init__(
        self,
        leases: Path,
        state: Path,
        *,
        root: str,
        inspect: Callable[[int], usage.Usage] = usage.inspect,
        clean: Callable[[int], usage.Usage] | None = None,
        settled: Settled = nobody_settled,
    ) -> None:
        self.root = root
        self.settled = settled
        self._ledger = Ledger(leases, state)
        self._inspect = inspect
        self._clean = clean or self._clean_with_reaper

    # --- draw

    def drawing(
        self, pool: UidRanges, instance: str, generation: str, reuse_delay_s: float
    ) -> Work[Lease]:
        """Lease one uid of the pool, at random among the free ones, and prove that it is clean.

        Resting uids are drawn only when no other is free, the one that has rested longest first. A
        uid that is found dirty is quarantined and another is drawn, at most eight. Where somebody's
        files are too many to look at the uid stays as free as it was, and none is drawn. Raises
        PoolExhausted, NoCleanUid, RecordNotWritten, LockBusy and UntrustedPath.
        """
        reasons: dict[int, str] = {}
        for _ in range(_ATTEMPTS):
            try:
                lease = yield from self._lease_one(pool, instance, generation, reuse_delay_s)
            except PoolExhausted as exhausted:
                if reasons:
                    raise NoCleanUid(reasons) from exhausted
                raise
            try:
                found: Verdict = yield Look(lease.uid)
            except BaseException:
                yield from self._give_back(lease)
                raise
            if found.is_clean:
                return lease
            reasons[lease.uid] = found.reason
            if found.is_obscured:
                # What stopped this look would stop the next. Whoever fills a shared directory must
                # not use the pool up as well, a uid with each start that he keeps from happening.
                yield from self._give_back(lease)
                break
            yield from self._quarantine(lease, found.reason)
            if found.is_incomplete:
                break
        raise NoCleanUid(reasons)

    def _lease_one(
        self, uids: UidRanges, instance: str, generation: str, reuse_delay_s: float
    ) -> Work[Lease]:
        with (yield from self._ledger.changing()) as occupation:
            key = partial(LeaseKey, instance=instance, generation=generation)
            with contextlib.suppress(PoolExhausted, ValueError):
                if lease := self._try_lease(occupation, uids, key, reuse_delay_s):
                    return lease
            # The summary was out of date or nonsense, or else the pool is exhausted indeed.
            lease = self._try_lease(self._ledger.listed(), uids, key, reuse_delay_s)
            if lease is None:
                raise ClaimsError("leases appear without their lock", hint="see who writes there")
            return lease

    def _try_lease(
        self,
        occupation: Occupation,
        uids: UidRanges,
        key: Callable[[int], LeaseKey],
        reuse_delay_s: float,
    ) -> Lease | None:
        """Choose and write; None when the chosen uid has a lease after all."""
        lease = self._new_lease(key(occupation.choose(uids, secrets.randbelow)), reuse_delay_s)
        if not self._ledger.create_lease(lease):
            return None
        # A rest that stays beside a lease means nothing: the lease counts.
        with contextlib.suppress(RecordNotWritten):
            self._remove_rests(occupation, lease.uid)
        return lease

    def _new_lease(self, key: LeaseKey, reuse_delay_s: float) -> Lease:
        return Lease(
            uid=key.uid,
            instance=key.instance,
            generation=key.generation,
            root=self.root,
            boot_id=boot_id(),
            launcher=myself(),
            created_at=datetime.now(UTC),
            reuse_delay_s=max(reuse_delay_s, 0.0),
        )

    def _give_back(self, lease: Lease) -> Work[None]:
        """Nobody has used the uid yet: it is as free as before."""
        with (yield from self._ledger.changing()):
            self._ledger.remove_lease(lease.uid)

    # --- release

    def releasing(self, key: LeaseKey) -> Work[Released | Quarantined]:
        """Clean the uid of a lease and give it back, or quarantine it.

        A lease that is not there any more, or is another start's by now, is left alone: nothing
        of its holder is touched, however often this is done. Raises RecordUnreadable,
        RecordNotWritten (the uid stays leased), LockBusy.
        """
        with self._ledger.release_lock(key.uid) as lock:
            yield from _taking(lock)
            lease = self._ledger.lease(key.uid)
            if lease is None or lease.key != key:
                return self._earlier_outcome(key)
            left: Verdict = yield Clean(key.uid)
            if not left.is_clean:
                return (yield from self._quarantine(lease, left.reason))
            with (yield from self._ledger.changing()) as occupation:
                self._remove_rests(occupation, key.uid)
                if lease.reuse_delay_s > 0:
                    self._ledger.create_rest(key.uid, lease.reuse_delay_s, lease.root)
                self._ledger.remove_quarantine(key.uid)
                self._ledger.remove_lease(key.uid)
            return Released()

    def ending(self, key: LeaseKey) -> Work[None]:
        """End everything that the uid of a lease has; the lease stays.

        A lease that is not there any more, or is another start's by now, is left alone. Raises
        RecordUnreadable, RecordNotWritten, LockBusy.
        """
        with self._ledger.release_lock(key.uid) as lock:
            yield from _taking(lock)
            lease = self._ledger.lease(key.uid)
            if lease is not None and lease.key == key:
                yield Clean(key.uid)

    def retrying(self, uid: int) -> Work[Released | Quarantined]:
        """Try again to clean a quarantined uid, or one whose lease can't be read.

        In the latter case nothing is ended or removed, since an instance may be running: the uid
        is freed when it is found clean. Raises UidHeld when an instance holds it, and ClaimsError
        when the uid is neither.
        """
        with self._ledger.release_lock(uid) as lock:
            yield from _taking(lock)
            try:
                lease = self._ledger.lease(uid)
            except RecordUnreadable as unreadable:
                found: Verdict = yield Look(uid)
                return (yield from self._retry_unreadable(uid, unreadable, found))
            if lease is not None:
                raise UidHeld(uid, f"instance {lease.instance!a} (root {lease.root!a})")
            if self._ledger.quarantine_of(uid) is None:
                raise ClaimsError(
                    f"uid {uid} is not quarantined", hint="see what is: kvmsec uids list"
                )
            left: Verdict = yield Clean(uid)
            if not left.is_clean:
                return Quarantined(left.reason)
            with (yield from self._ledger.changing()):
                self._ledger.remove_quarantine(uid)
            return Released()

    def _retry_unreadable(
        self, uid: int, unreadable: RecordUnreadable, found: Verdict
    ) -> Work[Released | Quarantined]:
        if not found.is_clean:
            return Quarantined(f"{unreadable.message}; it still has: {found.reason}")
        with (yield from self._ledger.changing()):
            self._ledger.remove_quarantine(uid)
            self._ledger.remove_lease(uid)
        return Released()

    def _earlier_outcome(self, key: LeaseKey) -> Released | Quarantined:
        found = self._ledger.quarantine_of(key.uid)
        if found and (found.instance, found.generation) == (key.instance, key.generation):
            return Quarantined(found.reason)
        return Released()

    def _quarantine(self, lease: Lease, reason: str) -> Work[Quarantined]:
        record = Quarantine(
            uid=lease.uid,
            reason=reason,
            instance=lease.instance,
            generation=lease.generation,
            root=lease.root,
            since=datetime.now(UTC),
        )
        with (yield from self._ledger.changing()):
            self._ledger.write_quarantine(record)
            self._ledger.remove_lease(lease.uid)
        return Quarantined(reason)

    def _remove_rests(self, occupation: Occupation, uid: int) -> None:
        for rest in occupation.rests_of(uid):
            self._ledger.remove_rest(rest)

    def _clean_with_reaper(self, uid: int) -> usage.Usage:
        """Clean a uid that a record says was drawn; a damaged record sweeps nobody else's."""
        found = self._inspect(uid)
        if found.is_clean and not found.zombies:
            return found
        reaper = provision.look_up_reaper()
        if reaper is None:
            problem = f"there is no user {provision.REAPER}; `kvmsec uids provision POOL` makes it"
        else:
            try:
                return usage.clean(uid, reaper_uid=reaper.uid, sweep_lock=self._ledger.sweep_lock)
            except NotSweepable as error:
                problem = error.message
        return found if found.is_clean else evolve(found, incomplete=problem)

    def take(self, step: Step) -> Verdict | None:
        """Take one step of the work above, however long that is. Raises LockBusy and OSError."""
        match step:
            case Look(uid):
                return Verdict.of(self._inspect(uid))
            case Clean(uid):
                return Verdict.of(self._clean(uid))
            case lock:
                lock.acquire(LOCK_TIMEOUT_S)
                return None

    # --- what is known

    def leases(self, *, besides: Collection[int] = ()) -> tuple[Lease, ...]:
        """The leases of every root, by uid; those that can't be read are in `unreadable`.

        Those of the uids `besides` are left out.
        """
        return tuple(one for one in self._ledger.leases(besides) if isinstance(one, Lease))

    def unreadable(self) -> tuple[RecordUnreadable, ...]:
        """The leases that can't be read. Their uids count as leased until `retry` frees them."""
        return tuple(one for one in self._ledger.leases() if isinstance(one, RecordUnreadable))

    def quarantined(self) -> tuple[Quarantine, ...]:
        """The quarantined uids and why, by uid."""
        return tuple(self._ledger.quarantines())

    def states(self, *, draining: UidRanges = EMPTY) -> tuple[UidState, ...]:
        """Every uid of this node that is leased, quarantined or resting, one entry each, by uid.

        A leased uid of `draining` is told as draining.
        """
        found: dict[int, UidState] = {}
        for rest in self._ledger.rests():
            found[rest.uid] = UidState(rest.uid, State.RESTING, until=rest.ends_at)
        for one in self._ledger.quarantines():
            found[one.uid] = UidState(
                one.uid, State.QUARANTINED, one.instance or None, one.root or None, one.reason
            )
        for lease in self._ledger.leases():
            if isinstance(lease, RecordUnreadable):
                uid = int(lease.path.name)
                found[uid] = UidState(uid, State.LEASED, reason=lease.message)
            else:
                state = State.DRAINING if lease.uid in draining else State.LEASED
                found[lease.uid] = UidState(lease.uid, state, lease.instance, lease.root)
        return tuple(found[uid] for uid in sorted(found))

    # --- the end of a cluster

    def forgetting_resting(self) -> Work[None]:
        """Drop the rests of this root's uids: for when its cluster is destroyed."""
        with (yield from self._ledger.changing()) as occupation:
            for rest in occupation.rests():
                if self._ledger.is_rest_of(rest, self.root):
                    self._ledger.remove_rest(rest)

    def removing_if_unused(self) -> Work[bool]:
        """Remove the directories if no root of this node has a record there; whether it did."""
        return self._ledger.removing_if_unused()


def _taking(lock: FileLock) -> Work[None]:
    with writing(lock.path):
        yield lock
