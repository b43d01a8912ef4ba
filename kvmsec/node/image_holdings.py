"""What instances have open, told to every root of this host: one file for each start, by it alone.

An image is the host's, as a uid is, whatever root an instance was started from. What a root knows
of its own instances is in their records; this is what the others can find. A holding is written
under the lock of all who open images, before QEMU can be there, and goes before the instance's own
record. It counts while that record is there (who has crashed is not yet taken back, and may have
left a process behind), and after that while its process lives, so that a root which was deleted
under a running instance does not give its images away, and one that is gone holds none for ever.
"""

import contextlib
import errno
import os
import re
import stat
from collections.abc import Collection, Iterable, Iterator
from pathlib import Path
from typing import Final, Self

import msgspec
from attrs import frozen

from kvmsec.linux import processes
from kvmsec.linux.files import (
    open_without_links,
    read_bounded,
    remove_file,
    replace_atomically,
)
from kvmsec.linux.processes import ProcessId
from kvmsec.node.records import ImageUse, InstanceRecord, RecordUnreadable
from kvmsec.paths import Paths

_FORMAT: Final = 1
_LIMIT_BYTES: Final = 1 << 20
_GENERATION: Final = re.compile("[0-9a-f]+")

_root_of: Final[dict[str, str]] = {}
"""The root of each start whose holding was read or written: no other has a start's generation."""


@frozen(kw_only=True)
class Holding:
    """The images that one start of an instance has open; the process is not known at first."""

    root: str
    tag: str
    instance: str
    generation: str
    launcher: ProcessId
    process: ProcessId | None
    images: tuple[ImageUse, ...]
    format: int = _FORMAT

    @classmethod
    def of(cls, paths: Paths, record: InstanceRecord) -> Self:
        return cls(
            root=str(paths.root),
            tag=paths.tag,
            instance=record.name,
            generation=record.generation,
            launcher=record.launcher,
            process=record.process,
            images=record.images,
        )

    @property
    def counts(self) -> bool:
        """Whether the images may be open: of another boot nothing is."""
        if self.launcher.boot_id != processes.boot_id():
            return False
        # Without a process, its child ends with the launcher, before it could become QEMU.
        return processes.is_alive(self.process or self.launcher) or self._has_record()

    def _has_record(self) -> bool:
        """Whether the instance's own record is there, or something that may be it.

        The root may be gone, and what is at its path now anybody's: that is no record of ours.
        """
        path = Paths(self.root).instance(self.instance).record
        try:
            descriptor = open_without_links(path, os.O_RDONLY | os.O_NONBLOCK)
        except OSError as error:
            return error.errno not in (errno.ENOENT, errno.ENOTDIR, errno.ELOOP)
        try:
            status = os.fstat(descriptor)
            if not stat.S_ISREG(status.st_mode) or status.st_uid != os.geteuid():
                return False
            data = read_bounded(descriptor, _LIMIT_BYTES)
            return msgspec.json.decode(data, type=_Start).generation == self.generation
        except (OSError, ValueError):
            return True
        finally:
            os.close(descriptor)


@frozen
class _Start:
    """As much of an instance's record as tells its starts apart."""

    generation: str


def publish(paths: Paths, record: InstanceRecord) -> None:
    """Tell every root what an instance has open, and, once it is known, as which process.

    Raises OSError.
    """
    if record.images:
        data = msgspec.json.encode(Holding.of(paths, record))
        replace_atomically(_file(paths, record.generation), data)
        _root_of[record.generation] = str(paths.root)


def withdraw(paths: Paths, record: InstanceRecord) -> None:
    """Take that back, once nothing of the instance can have an image open. Raises OSError."""
    remove_file(_file(paths, record.generation))


def known_here(paths: Paths) -> set[str]:
    """The generations of all starts, of any root, that say that they have an image open."""
    with contextlib.suppress(FileNotFoundError):
        return set(filter(_GENERATION.fullmatch, os.listdir(paths.image_holdings)))
    return set()


def elsewhere(paths: Paths) -> list[Holding]:
    """What instances of other roots have open; hold `images_lock`. What counts no more is removed.

    What is known to be this root's own is not even read: its records tell, and `remove_stale` sees
    to it. Raises RecordUnreadable, and OSError.
    """
    ours, here = str(paths.root), known_here(paths)
    for gone in _root_of.keys() - here:
        del _root_of[gone]
    found = []
    for path, holding in _every(paths, (one for one in here if _root_of.get(one) != ours)):
        if holding.counts:
            found.append(holding)
        else:
            remove_file(path)
    return [one for one in found if one.root != ours]


def remove_stale(paths: Paths, running: Collection[str] = ()) -> list[Path]:
    """Remove what this root's instances held and hold no more; hold `images_lock`.

    What starts hold that are `running` (their generations) counts, and is not read. Raises
    RecordUnreadable, and OSError.
    """
    suspects = _every(paths, known_here(paths).difference(running))
    ours = (path for path, one in suspects if one.root == str(paths.root) and not one.counts)
    return [path for path in ours if remove_file(path)]


def _every(paths: Paths, generations: Iterable[str]) -> Iterator[tuple[Path, Holding]]:
    for generation in sorted(generations):
        path = _file(paths, generation)
        with contextlib.suppress(FileNotFoundError):
            holding = _read(path)
            _root_of[generation] = holding.root
            yield path, holding


def _read(path: Path) -> Holding:
    try:
        holding = msgspec.json.decode(read_bounded(path, _LIMIT_BYTES), type=Holding)
    except FileNotFoundError:
        raise
    except (OSError, ValueError) as error:
        raise HoldingUnreadable(path, str(error)) from error
    if holding.format > _FORMAT:
        raise HoldingUnreadable(path, "it was written by a newer kvmsec")
    return holding


class HoldingUnreadable(RecordUnreadable):
    """What an instance has open can't be read, so that no image is known to be free."""

    def __init__(self, path: Path, reason: str) -> None:
        super().__init__(path, reason)
        self.hint = (
            "it is of an instance of some root on this host: where none runs that has disks, "
            "remove the file"
        )


def _file(paths: Paths, generation: str) -> Path:
    return paths.image_holdings / generation
