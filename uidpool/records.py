"""The records of who holds a uid, which one rests and which one is quarantined: one file each.

A lease and a quarantine are JSON in a file named after the uid. A rest says all that a draw needs
in its name (`UID.SINCE.DELAY`, in milliseconds of wall clock), so that a draw opens no file.
"""

from collections.abc import Iterable
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Final, Self, TypeVar

import msgspec
from attrs import frozen

from kvmsec.linux.files import read_bounded
from kvmsec.linux.processes import ProcessId
from uidpool.errors import RecordUnreadable

VERSION: Final = 1
_LIMIT_BYTES: Final = 64 * 1024
_Record = TypeVar("_Record", "Lease", "Quarantine")


@frozen
class LeaseKey:
    """One lease for good: a uid, and the very start of the instance that it was drawn for."""

    uid: int
    instance: str
    generation: str


@frozen
class Lease:
    """That an instance holds a uid: written before its process is made, deleted when it is clean.

    `root` is the kvmsec root that the instance belongs to, `launcher` the process that drew the
    uid, and `reuse_delay_s` how long (seconds) the uid rests afterwards.
    """

    uid: int
    instance: str
    generation: str
    root: str
    boot_id: str
    launcher: ProcessId
    created_at: datetime
    reuse_delay_s: float
    version: int = VERSION

    @property
    def key(self) -> LeaseKey:
        return LeaseKey(self.uid, self.instance, self.generation)


@frozen
class Quarantine:
    """That a uid could not be cleaned, why, and whose it was; it is not drawn until it is clean."""

    uid: int
    reason: str
    instance: str
    generation: str
    root: str
    since: datetime
    version: int = VERSION


@frozen
class Rest:
    """That a uid was released at `since_ms` and rests for `delay_ms`, both in milliseconds."""

    uid: int
    since_ms: int
    delay_ms: int

    @property
    def name(self) -> str:
        return f"{self.uid}.{self.since_ms}.{self.delay_ms}"

    @property
    def ends_at(self) -> datetime:
        start = datetime.fromtimestamp(self.since_ms / 1000, UTC)
        return start + timedelta(milliseconds=self.delay_ms)

    def is_over(self, now_ms: int) -> bool:
        return now_ms - self.since_ms >= self.delay_ms

    @classmethod
    def from_name(cls, name: str) -> Self | None:
        """The rest that a file name stands for; None for a name of anything else."""
        parts = name.split(".")
        if len(parts) != 3 or not all(part.isascii() and part.isdigit() for part in parts):
            return None
        uid, since_ms, delay_ms = (int(part[:18]) for part in parts)
        return cls(uid, since_ms, delay_ms)


def encode(record: Lease | Quarantine) -> bytes:
    return msgspec.json.encode(record) + b"\n"


def read_lease(path: Path) -> Lease | None:
    """The lease in a file; None when there is none. Raises RecordUnreadable, OSError."""
    return _read(path, Lease)


def read_quarantine(path: Path) -> Quarantine | None:
    """The quarantine in a file; None when there is none. Raises RecordUnreadable, OSError."""
    return _read(path, Quarantine)


def _read(path: Path, kind: type[_Record]) -> _Record | None:
    try:
        record = msgspec.json.decode(read_bounded(path, _LIMIT_BYTES), type=kind)
    except FileNotFoundError:
        return None
    except (ValueError, IsADirectoryError) as error:  # msgspec's errors are ValueErrors
        raise RecordUnreadable(path, str(error)[:200]) from error
    if record.version > VERSION:
        raise RecordUnreadable(path, "it was written by a newer kvmsec")
    if str(record.uid) != path.name:
        raise RecordUnreadable(path, f"it is the record of uid {record.uid}")
    return record


def uids_of_names(names: Iterable[bytes]) -> list[int]:
    """The uids that record files are named after; other names are passed over.

    On the way of every draw, so nothing but C code touches each of what may be thousands of names.
    """
    return list(map(int, filter(bytes.isdigit, names)))
