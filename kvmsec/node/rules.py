"""The packet rules of this node: which uids they must hold, and the proof before a start."""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Final

from firewall.guard import Firewall
from firewall.policy import LogSettings, Policy, format_uids
from kvmsec.agent import Finding
from kvmsec.config import FirewallSettings
from kvmsec.linux.files import read_bounded, remove_file, replace_atomically
from kvmsec.linux.locks import FileLock
from kvmsec.node import records
from kvmsec.node.waiting import acquire
from kvmsec.paths import Paths
from kvmsec.store import Store
from uidpool.ranges import EMPTY, UidRanges

_LIMIT_BYTES: Final = 1 << 22
_LOCK_TIMEOUT_S: Final = 60.0


class Rules:
    """What keeps instances off the node's network: the pool's uids and each `user` model's.

    What was applied last is noted, so that a start finds out without reading the kernel's rules
    whether they have to change; whether they *hold* is for the canary alone. The note has the uid
    of everyone who runs: each was in it when it was proved, and none leaves it but after a look at
    every record. So who needs no change of it needs no look at the others' records either.

    While another process proves or changes them the event loop runs on; what is done then is done
    in place. Who waits for longer than a minute is told LockBusy.
    """

    def __init__(self, paths: Paths, settings: FirewallSettings, store: Store) -> None:
        self._paths = paths
        self._store = store
        self._log = LogSettings(prefix=settings.log_prefix, group=settings.log_group)
        self.firewall = Firewall(settings.backend, paths.tag)

    def policy(self) -> Policy:
        """The rules that this node must have now, from the cluster's pool and its records."""
        known, unreadable = records.read_all(self._paths)
        wanted = self._pool() | UidRanges.of_uids(one.uid for one in known if one.uid)
        if unreadable:  # Whose uids those are can't be told: none that was guarded is let go.
            wanted |= self._noted_uids()
        return self._policy_for(wanted)

    def _pool(self) -> UidRanges:
        cluster, _ = self._store.load()
        return cluster.guarded_uids if cluster else EMPTY

    def _in_force(self) -> Policy | None:
        """What was applied last; None where that is not known, or was under other settings."""
        noted = self._noted()
        policy = self._policy_for(_uids_of(noted))
        return policy if noted == _note_of(policy) else None

    def _policy_for(self, uids: UidRanges) -> Policy:
        return Policy(uids.ranges, self._log, self._paths.tag)

    async def prove(self, uid: int, gid: int) -> None:
        """Return once a packet has proved that this uid can't send; else raise NotProved."""
        async with self._turn():
            policy = self._in_force()
            if policy is None or not policy.covers(uid) or self._pool() - UidRanges(policy.uids):
                policy = self.policy()
                self._apply(policy)
            self.firewall.prove(uid, gid, policy)

    async def apply(self) -> None:
        """Put the rules in place, whatever is there now. Raises FirewallError."""
        async with self._turn():
            self._apply(self.policy())

    async def sync(self) -> None:
        """Make the rules hold what they must, and no more: without a uid no rule is left."""
        async with self._turn():
            self._sync()

    async def settle(self) -> None:
        """After an instance's end: change the rules if that changed what they must hold."""
        async with self._turn():
            noted = self._noted()
            if noted in (None, _note_of(self._policy_for(self._pool()))):
                return  # There is nothing in it to let go.
            if noted != _note_of(self.policy()):
                self._sync()

    def verify(self) -> tuple[Finding, ...]:
        """Hold the rules against what they must be, by structure and by packet; reads only."""
        policy = self.policy()
        if not policy.uids and self._noted() is None:
            message = "no uid needs rules, and none are in place"
            return (Finding("rules", "ok", "firewall", message),)
        found = self.firewall.verify(policy)
        if not found:
            uids = format_uids(policy.uids) or "nobody"
            return (Finding("rules", "ok", "firewall", f"{uids} can send nothing"),)
        return tuple(Finding(one.code, "error", "firewall", one.message, one.hint) for one in found)

    def _sync(self) -> None:
        policy = self.policy()
        if policy.uids:
            self._apply(policy)
        else:
            self._remove()

    async def remove(self) -> None:
        """Take this root's rules away, all of them. Raises FirewallError."""
        async with self._turn():
            self._remove()

    def _apply(self, policy: Policy) -> None:
        # Killed in between, this leaves a note that no policy has: the next one applies again.
        pending = UidRanges.of(*policy.uids) | self._noted_uids()
        replace_atomically(self._note, f"{pending}\nbeing applied".encode())
        self.firewall.apply(policy)
        replace_atomically(self._note, _note_of(policy).encode())

    def _remove(self) -> None:
        self.firewall.remove()
        remove_file(self._note)

    @property
    def _note(self) -> Path:
        return self._paths.run / "rules"

    def _noted(self) -> str | None:
        try:
            return read_bounded(self._note, _LIMIT_BYTES).decode()
        except (FileNotFoundError, ValueError):
            return None

    def _noted_uids(self) -> UidRanges:
        return _uids_of(self._noted())

    @asynccontextmanager
    async def _turn(self) -> AsyncIterator[None]:
        """The right to prove and change the rules: nothing is awaited within."""
        lock = FileLock(self._paths.run / "rules.lock")
        await acquire(lock, _LOCK_TIMEOUT_S)
        try:
            yield
        finally:
            lock.release()


def _uids_of(note: str | None) -> UidRanges:
    return UidRanges.parse((note or "").partition("\n")[0])


def _note_of(policy: Policy) -> str:
    """The uids on a line of their own, and all that makes up the policy."""
    return f"{format_uids(policy.uids)}\n{policy!r}"
