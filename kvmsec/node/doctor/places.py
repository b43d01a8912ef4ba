"""What lies on disk: directories, configuration, definitions, room; and the clock."""

import os
import stat
import time
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Final

from kvmsec.config import load_config
from kvmsec.errors import KvmsecError
from kvmsec.linux.files import require_trusted
from kvmsec.model.instance import InstanceDefinition, definition_from, read_kept_definition
from kvmsec.node.doctor.subject import Answer, Subject, error, ok, warning
from kvmsec.paths import Paths

_MIB: Final = 1 << 20
_SCARCE_MIB, _NO_MIB = 64, 4
_SCARCE_INODES, _NO_INODES = 1000, 50
_EARLIEST: Final = datetime(2025, 1, 1, tzinfo=UTC)
_LATEST: Final = datetime(2100, 1, 1, tzinfo=UTC)
_TIMESYNCD: Final = Path("/run/systemd/timesync/synchronized")  # systemd-timesyncd.service(8)


def check_directories(subject: Subject) -> Iterator[Answer]:
    """Nobody but root may see, or move away, what kvmsec keeps."""
    require_trusted(_nearest(subject.paths.root))
    problems = 0
    for path in _directories(subject.paths):
        for answer in _check_directory(path):
            problems += 1
            yield answer
    if not problems:
        yield ok(f"root's alone, below {subject.paths.root}")


def _directories(paths: Paths) -> tuple[Path, ...]:
    return (
        *(paths.etc, paths.definitions),
        *(paths.var, paths.features, paths.last_states),
        *(paths.run, paths.instances, paths.locks),
        *(paths.log, paths.instance_logs),
        *(paths.uid_leases.parent, paths.uid_leases, paths.image_holdings),
        *(paths.uid_state.parent, paths.uid_state),
    )


def _check_directory(path: Path) -> Iterator[Answer]:
    try:
        status = path.lstat()
    except FileNotFoundError:
        return  # It is made when it is needed.
    if not stat.S_ISDIR(status.st_mode):
        yield error(f"{path} is not a directory", f"move it away: mv {path} {path}.old")
    elif status.st_uid != 0:
        yield error(f"{path} belongs to uid {status.st_uid}", f"chown -h root:root {path}")
    elif stat.S_IMODE(status.st_mode) & 0o077:
        mode = stat.S_IMODE(status.st_mode)
        yield warning(f"{path} is open to others (mode {mode:04o})", f"chmod 0700 {path}")


def _nearest(path: Path) -> Path:
    """The path itself, or the first directory above it that is there."""
    return next(step for step in (path, *path.parents) if step.exists())


def check_configuration(subject: Subject) -> Iterator[Answer]:
    path = subject.paths.config
    config = load_config(path)
    for piece in config.confinement.may_be_missing:
        hint = "take it out of confinement.may_be_missing where the host has it"
        yield warning(f"it lets instances start without {piece}", hint)
    if path.exists():
        yield ok(f"{path} is right")
    else:
        yield ok(f"{path} is not there: every setting has its default")


def check_definitions(subject: Subject) -> Iterator[Answer]:
    """Each file in instances/ defines an instance, or says why not."""
    names = []
    for path in sorted(subject.paths.definitions.glob("*.toml")):
        try:
            names.append(read(path).name)
        except (KvmsecError, OSError) as failure:
            yield error(str(failure), getattr(failure, "hint", None) or f"mend or remove {path}")
    yield ok(f"{len(names)} in {subject.paths.definitions}")


def read(path: Path) -> InstanceDefinition:
    """The definition in a file of instances/. Raises KvmsecError's children and OSError."""
    return definition_from(read_kept_definition(path), path.stem, source=str(path))


def check_space(subject: Subject) -> Iterator[Answer]:
    """Room for records, state and logs; each file system once."""
    paths = subject.paths
    seen: set[int] = set()
    for path in (paths.run, paths.var, paths.log, paths.uid_leases, paths.uid_state):
        place = _nearest(path)
        device = place.stat().st_dev
        if device not in seen:
            seen.add(device)
            yield _room_in(place)


def _room_in(place: Path) -> Answer:
    room = os.statvfs(place)
    if room.f_flag & os.ST_RDONLY:
        return error(f"{place} is mounted read-only", f"mount -o remount,rw {place}")
    free_mib = room.f_bavail * room.f_frsize // _MIB
    # A file system that makes inodes as they are needed says that it has none at all.
    free_inodes = room.f_favail if room.f_files else _SCARCE_INODES
    found = f"{place}: {free_mib} MiB free"
    if room.f_files:
        found += f", {free_inodes} inodes"
    hint = f"make room: see `df -h {place}` and `df -i {place}`"
    if free_mib < _NO_MIB or free_inodes < _NO_INODES:
        return error(found, hint)
    if free_mib < _SCARCE_MIB or free_inodes < _SCARCE_INODES:
        return warning(found, hint)
    return ok(found)


def check_clock(subject: Subject) -> Iterator[Answer]:
    """Uids rest, and certificates end, by this clock."""
    now = datetime.fromtimestamp(time.time(), UTC).replace(microsecond=0)
    hint = "set the clock, and have it kept: apt install systemd-timesyncd"
    if not _EARLIEST <= now <= _LATEST:
        yield error(f"it says {now.isoformat()}, which can't be", hint)
    elif subject.cluster and subject.cluster.created_at > now:
        made = subject.cluster.created_at.isoformat()
        yield warning(f"it says {now.isoformat()}, but the cluster was made at {made}", hint)
    elif _TIMESYNCD.exists():
        yield ok(f"{now.isoformat()}, synchronised by systemd-timesyncd")
    else:
        yield ok(f"{now.isoformat()}; who keeps it right can't be told from here")
