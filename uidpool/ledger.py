"""The records on disk, and the one lock under which they change.

`leases` holds a file for each lease; `state` the directories `resting` and `quarantine`, which
outlive a reboot. All of them are root's alone.
"""

import contextlib
import os
import re
import time
from array import array
from bisect import bisect_left, bisect_right, insort
from collections.abc import Collection, Iterable, Iterator
from contextlib import AbstractContextManager
from datetime import UTC, datetime
from itertools import filterfalse
from pathlib import Path
from typing import Final

from attrs import evolve

from kvmsec.linux.files import (
    create_exclusively,
    make_private_directory,
    remove_file,
    write_atomically,
)
from kvmsec.linux.locks import FileLock
from uidpool.errors import RecordNotWritten, RecordUnreadable
from uidpool.index import LeaseIndex
from uidpool.occupation import Occupation
from uidpool.ranges import LAST_UID
from uidpool.records import (
    Lease,
    Quarantine,
    Rest,
    encode,
    read_lease,
    read_quarantine,
    uids_of_names,
)
from uidpool.steps import Work

_PURGED_AT_ONCE: Final = 256
# What a writer that was killed leaves; all writers hold the lock, so whoever has it may remove it.
_UNFINISHED: Final = re.compile(rb"\.[0-9.]+\.[0-9a-f]{16}")


class Ledger:
    """Reads and writes the records; what is to be written is decided elsewhere.

    Every method that writes raises RecordNotWritten where it can't, and leaves nothing half done.
    """

    def __init__(self, leases: Path, state: Path) -> None:
        self._leases = leases
        self._locks = leases / ".locks"  # apart, so that taking one doesn't change `leases`
        self._index = LeaseIndex(self._locks / "index", leases)
        self._state = state
        self._resting = state / "resting"
        self._quarantine = state / "quarantine"
        self._leased: array[int] | None = None  # sorted, while `changing` is held
        self._is_summed = False  # whether the summary says the same

    @property
    def sweep_lock(self) -> Path:
        """The lock that all sweeps of this node share."""
        return self._locks / "sweep"

    # --- locks

    def changing(self) -> Work[AbstractContextManager[Occupation]]:
        """Take the lock under which records change: the context that comes of it holds it.

        It gives what there is once it is tidied. Which uids are leased may come from a summary
        (see `index`); `listed` asks the directory. No step may be yielded within. Raises LockBusy,
        RecordNotWritten, UntrustedPath.
        """
        lock = yield from self._taking()
        return self._holding(lock)

    @contextlib.contextmanager
    def _holding(self, lock: FileLock) -> Iterator[Occupation]:
        try:
            self._leased = self._index.load()
            self._is_summed = self._leased is not None
            yield self._occupation()
            if self._leased is not None and not self._is_summed:
                self._index.store(self._leased)
        finally:
            self._leased = None
            lock.release()

    def listed(self) -> Occupation:
        """What there is by the directories themselves; hold `changing`."""
        self._leased, self._is_summed = None, False
        return self._occupation()

    @contextlib.contextmanager
    def release_lock(self, uid: int) -> Iterator[FileLock]:
        """The lock of whoever releases a uid, to be taken within; it goes with the block.

        Without it a second release could still be cleaning, which kills, when the first has given
        the uid to its next holder. Raises RecordNotWritten.
        """
        lock = FileLock(self._locks / str(uid))
        with writing(lock.path):
            make_private_directory(self._leases)
            make_private_directory(self._locks)
        try:
            yield lock
        finally:
            lock.discard()

    def _taking(self) -> Work[FileLock]:
        lock = FileLock(self._locks / "records")
        places = (self._leases, self._locks, self._state, self._resting, self._quarantine)
        while True:
            with writing(lock.path), contextlib.suppress(FileNotFoundError):
                for place in places:
                    make_private_directory(place)
                yield lock
                if self._resting.is_dir() and self._quarantine.is_dir():
                    return lock
            # `removing_if_unused` was at work in between: make the directories again.
            lock.release()

    def _occupation(self) -> Occupation:
        if self._leased is None:
            self._leased = _sorted_uids(self._tidied_names(self._leases))
        now_ms = _now_ms()
        return Occupation(
            leased=self._leased,
            quarantined=uids_of_names(self._tidied_names(self._quarantine)),
            rests=self._tidied_rests(now_ms),
            now_ms=now_ms,
        )

    def _tidied_names(self, directory: Path) -> list[bytes]:
        """The names in a directory, after unfinished files were removed from it."""
        names = _names_in(directory)
        for name in filterfalse(bytes.isdigit, names):
            if _UNFINISHED.fullmatch(name):
                self._remove(directory / os.fsdecode(name))
        return names

    def _tidied_rests(self, now_ms: int) -> list[Rest]:
        """The rests, after some that are over were removed.

        One that begins in the future was written before the clock was set back: it begins now.
        """
        kept = []
        purged = 0
        for name in map(os.fsdecode, self._tidied_names(self._resting)):
            rest = Rest.from_name(name)
            if rest is None:
                continue
            if rest.is_over(now_ms) and purged < _PURGED_AT_ONCE:
                purged += 1
                self._remove(self._resting / name)
                continue
            if rest.since_ms > now_ms:
                rest = evolve(rest, since_ms=now_ms)
                with writing(self._resting / name):
                    (self._resting / name).rename(self._resting / rest.name)
            kept.append(rest)
        return kept

    # --- leases

    def lease(self, uid: int) -> Lease | None:
        """The lease of a uid, None when there is none. Raises RecordUnreadable."""
        return read_lease(self._leases / str(uid))

    def leases(self, besides: Collection[int] = ()) -> Iterator[Lease | RecordUnreadable]:
        """Every lease but those of some uids, by uid; in place of one that can't be read, why."""
        for uid in sorted(set(uids_of_names(_names_in(self._leases))).difference(besides)):
            try:
                lease = self.lease(uid)
            except RecordUnreadable as error:
                yield error
            else:
                if lease is not None:
                    yield lease

    def create_lease(self, lease: Lease) -> bool:
        """Write a lease; False when there is one already. Hold `changing`."""
        path = self._leases / str(lease.uid)
        with writing(path):
            try:
                create_exclusively(path, encode(lease))
            except FileExistsError:
                return False
            except OSError:
                remove_file(path)  # It may be there, and only its directory not synced.
                raise
        if self._leased is not None:
            insort(self._leased, lease.uid)
            self._is_summed = False
        return True

    def remove_lease(self, uid: int) -> None:
        """Remove a lease; hold `changing`."""
        self._remove(self._leases / str(uid))
        if self._leased is not None:
            del self._leased[bisect_left(self._leased, uid) : bisect_right(self._leased, uid)]
            self._is_summed = False

    # --- quarantine

    def quarantine_of(self, uid: int) -> Quarantine | None:
        """The quarantine of a uid; a record that can't be read is one with that as its reason."""
        path = self._quarantine / str(uid)
        try:
            return read_quarantine(path)
        except RecordUnreadable as error:
            changed = datetime.fromtimestamp(path.lstat().st_mtime, UTC)
            return Quarantine(uid, error.message, "", "", "", changed)

    def quarantines(self) -> Iterator[Quarantine]:
        """Every quarantine, by uid."""
        for uid in sorted(uids_of_names(_names_in(self._quarantine))):
            record = self.quarantine_of(uid)
            if record is not None:
                yield record

    def write_quarantine(self, record: Quarantine) -> None:
        path = self._quarantine / str(record.uid)
        with writing(path):
            write_atomically(path, encode(record))

    def remove_quarantine(self, uid: int) -> None:
        self._remove(self._quarantine / str(uid))

    # --- rests

    def rests(self) -> list[Rest]:
        """The rests that are not over, in no order."""
        now_ms = _now_ms()
        found = (Rest.from_name(os.fsdecode(name)) for name in _names_in(self._resting))
        return [rest for rest in found if rest is not None and not rest.is_over(now_ms)]

    def create_rest(self, uid: int, delay_s: float, root: str) -> None:
        """Let a uid rest from now on; hold `changing`."""
        path = self._resting / Rest(uid, _now_ms(), round(delay_s * 1000)).name
        with writing(path):
            write_atomically(path, os.fsencode(root))

    def remove_rest(self, rest: Rest) -> None:
        self._remove(self._resting / rest.name)

    def is_rest_of(self, rest: Rest, root: str) -> bool:
        """Whether the uid was released by an instance of this kvmsec root."""
        try:
            return (self._resting / rest.name).read_bytes() == os.fsencode(root)
        except FileNotFoundError:
            return False

    # --- the end

    def removing_if_unused(self) -> Work[bool]:
        """Remove the directories when they hold no record."""
        lock = yield from self._taking()
        try:
            places = (self._leases, self._resting, self._quarantine)
            if any(name[0] != "." for place in places for name in os.listdir(place)):
                return False
            # Whoever waits for a lock makes again what is gone, and what isn't empty stays.
            self._index.drop()
            self._remove(self.sweep_lock)
            lock.discard()
            for place in (self._locks, self._resting, self._quarantine, self._state, self._leases):
                with contextlib.suppress(OSError):
                    place.rmdir()
            return True
        finally:
            lock.release()

    def _remove(self, path: Path) -> None:
        with writing(path):
            remove_file(path)


@contextlib.contextmanager
def writing(path: Path) -> Iterator[None]:
    """Make an OSError within RecordNotWritten."""
    try:
        yield
    except OSError as error:
        raise RecordNotWritten(path, error) from error


def _sorted_uids(names: Iterable[bytes]) -> "array[int]":
    uids = sorted(uids_of_names(names))
    return array("I", uids[: bisect_right(uids, LAST_UID)])


def _now_ms() -> int:
    return int(time.time() * 1000)


def _names_in(directory: Path) -> list[bytes]:
    try:
        return os.listdir(os.fsencode(directory))
    except FileNotFoundError:
        return []
