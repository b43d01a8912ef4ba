"""An instance's record: written before each thing that it names is made.

Whoever finds a record can take back all that a start had made, whatever line its launcher died
at; so the record is the undo log of a start as well as the memory of a running instance. It means
nothing on another boot, and is not synced to disk.
"""

import contextlib
import os
import time
from datetime import datetime
from functools import cache
from pathlib import Path
from typing import Annotated, Any, Final

import msgspec
from attrs import evolve, frozen

from hypervisor.machine import Machine
from kvmsec.agent import InstanceState
from kvmsec.errors import KvmsecError
from kvmsec.linux.files import read_bounded, remove_file, replace_atomically
from kvmsec.linux.processes import ProcessId
from kvmsec.model.names import require_name
from kvmsec.model.security import SecurityModel
from kvmsec.node.tap_records import TapRecord
from kvmsec.paths import Paths

FORMAT: Final = 1
_LIMIT_BYTES: Final = 1 << 20
_SETTLED_NS: Final = 1_000_000_000

Time = Annotated[datetime, msgspec.Meta(tz=True)]


@frozen
class ImageUse:
    """An image that an instance has open, by device and inode, and whether it writes to it."""

    identity: str
    path: str
    is_written: bool


@frozen(kw_only=True)
class InstanceRecord:
    """One start of an instance; `generation` tells it from every other start."""

    name: str
    generation: str
    state: InstanceState
    model: SecurityModel
    machine: Machine
    launcher: ProcessId
    created_at: Time
    format: int = FORMAT
    domain: str | None = None
    uid: int | None = None
    user: str | None = None
    accelerator: str | None = None
    qemu: str | None = None
    qemu_version: str | None = None
    process: ProcessId | None = None
    started_at: Time | None = None
    images: tuple[ImageUse, ...] = ()
    taps: tuple[TapRecord, ...] = ()
    cgroups: tuple[str, ...] = ()
    argv: tuple[str, ...] = ()
    autostart: bool = False

    @property
    def is_of_this_boot(self) -> bool:
        from kvmsec.linux.processes import boot_id

        return self.launcher.boot_id == boot_id()


@frozen
class _Read:
    """A record as it was read last, and what shows that its file is still that one.

    Each start looks at every record several times, and most of them stay as they are.
    """

    path: str
    version: tuple[int, int, int, int]
    record: InstanceRecord


_read: Final[dict[Paths, dict[str, _Read]]] = {}


class RecordUnreadable(KvmsecError):
    """A record can't be read; what it stands for is left alone rather than guessed at."""

    def __init__(self, path: Path, reason: str) -> None:
        super().__init__(
            f"{path} can't be used: {reason}",
            hint="if no QEMU of that instance runs any more, remove the file's directory",
        )
        self.path = path


@frozen(kw_only=True)
class LastState:
    """How an instance ended that nobody stopped: kept until it is started or stopped again."""

    name: str
    state: InstanceState
    reason: str
    at: Time
    last_words: str = ""


def save(paths: Paths, record: InstanceRecord) -> InstanceRecord:
    """Write a record in place of the one before. Raises OSError."""
    replace_atomically(paths.instance(record.name).record, _encode(record))
    return record


def advance(paths: Paths, record: InstanceRecord, **changes: Any) -> InstanceRecord:
    """Save a record with some fields changed, and return it."""
    return save(paths, evolve(record, **changes))


def load(paths: Paths, name: str) -> InstanceRecord | None:
    """The record of an instance; None when it has none. Raises RecordUnreadable."""
    known = _read.setdefault(paths, {})
    last = known.get(name)
    path = str(paths.instance(name).record) if last is None else last.path
    try:
        status = os.stat(path)
        version = status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns
        if last is not None and last.version == version:
            return last.record
        record = _decode(read_bounded(Path(path), _LIMIT_BYTES))
    except FileNotFoundError:
        known.pop(name, None)
        return None
    except (OSError, ValueError) as error:
        raise RecordUnreadable(Path(path), str(error)) from error
    # The clock of a filesystem ticks some times a second: what changed just now may change again
    # without another time, and in an inode that is free again.
    if time.time_ns() - status.st_ctime_ns > _SETTLED_NS:
        known[name] = _Read(path, version, record)
    return record


def names(paths: Paths) -> list[str]:
    """The instances that have a directory here, a record in it or not; sorted."""
    return names_in(paths.instances)


def names_in(directory: Path) -> list[str]:
    """The entries of a directory that have the name of an instance; sorted."""
    with contextlib.suppress(FileNotFoundError):
        return sorted(filter(_is_name, os.listdir(directory)))
    return []


@cache
def _is_name(entry: str) -> bool:
    """Remembered: the entries of root's own directories are looked through by every start."""
    with contextlib.suppress(KvmsecError):
        require_name("an instance", entry)
        return True
    return False


def read_all(paths: Paths) -> tuple[list[InstanceRecord], list[RecordUnreadable]]:
    """Every record, and an error for each that can't be read."""
    found: list[InstanceRecord] = []
    problems: list[RecordUnreadable] = []
    here = names(paths)
    known = _read.get(paths, {})
    for gone in known.keys() - here:
        del known[gone]
    for name in here:
        try:
            record = load(paths, name)
        except RecordUnreadable as error:
            problems.append(error)
        else:
            found += [record] if record is not None else []
    return found, problems


def every(paths: Paths) -> list[InstanceRecord]:
    """Every record, for who would do harm by overlooking one. Raises RecordUnreadable."""
    found, problems = read_all(paths)
    if problems:
        raise problems[0]
    return found


def remember(paths: Paths, last: LastState) -> None:
    """Keep how an instance ended. Raises OSError."""
    replace_atomically(paths.last_state(last.name), _encode(last))


def recall(paths: Paths, name: str) -> LastState | None:
    """How an instance ended, if nobody asked for it; None too when that can't be read."""
    try:
        data = read_bounded(paths.last_state(name), _LIMIT_BYTES)
        return msgspec.json.decode(data, type=LastState, dec_hook=_decode_value)
    except (OSError, ValueError):
        return None


def forget(paths: Paths, name: str) -> bool:
    """Drop how an instance ended; whether there was something to drop."""
    return remove_file(paths.last_state(name))


def _encode(value: object) -> bytes:
    return msgspec.json.encode(value, enc_hook=str)


def _decode(data: bytes) -> InstanceRecord:
    record = msgspec.json.decode(data, type=InstanceRecord, dec_hook=_decode_value)
    if record.format > FORMAT:
        raise ValueError(f"it has format {record.format}, this kvmsec reads up to {FORMAT}")
    return record


def _decode_value(kind: type, value: object) -> object:
    if kind is Path and isinstance(value, str):
        return Path(value)
    raise ValueError(f"expected text for {kind.__name__}, not {value!a}")
