"""Whether a file is still the one that was looked at, and answers that hold for as long."""

import contextlib
import hashlib
import os
import stat
import time
from collections.abc import Iterable
from itertools import chain
from pathlib import Path
from typing import Any, Final, TypeVar

import msgspec
from attrs import field, frozen

from kvmsec.linux.files import make_private_directory, write_atomically

_LIMIT_BYTES: Final = 1 << 20
_SETTLED_NS: Final = 1_000_000_000
T = TypeVar("T")


@frozen
class FileIdentity:
    """What changes when a file is replaced, edited, or given to somebody (links are followed)."""

    path: str
    device: int
    inode: int
    size_bytes: int
    modified_ns: int
    changed_ns: int

    @classmethod
    def of(cls, path: Path | str) -> "FileIdentity":
        """Look at a file; raises OSError."""
        status = os.stat(path)
        return cls(
            str(path),
            status.st_dev,
            status.st_ino,
            status.st_size,
            status.st_mtime_ns,
            status.st_ctime_ns,
        )


def still_hold(files: Iterable[FileIdentity]) -> bool:
    """Whether each path leads to the same file, unchanged. Raises OSError."""
    stat_of = os.stat  # A start looks at some sixty: in one loop, with nothing called but this.
    for file in files:
        status = stat_of(file.path)
        if (
            status.st_ctime_ns != file.changed_ns
            or status.st_ino != file.inode
            or status.st_mtime_ns != file.modified_ns
            or status.st_size != file.size_bytes
            or status.st_dev != file.device
        ):
            return False
    return True


def _is_settled(file: FileIdentity) -> bool:
    """Within one tick of the file system's clock a file could change and look the same."""
    return time.time_ns() - file.changed_ns > _SETTLED_NS


@frozen
class _Entry:
    key: str
    files: tuple[FileIdentity, ...]
    answer: msgspec.Raw


_read: Final[dict[str, tuple[FileIdentity, _Entry, Any]]] = {}


@frozen
class Memory:
    """Answers on disk, in a directory that only root may write; each stands on files.

    An answer is forgotten when one of its files is no longer what it was, and when what is on
    disk can't be read: the question is then asked again.
    """

    directory: Path
    _recalled: dict[str, tuple[FileIdentity, ...]] = field(factory=dict, init=False, eq=False)
    """What each answer stands on that was recalled; for one that was not, nothing."""

    def recall(self, key: str, kind: type[T]) -> T | None:
        """The answer that was kept for `key`, if it still holds."""
        self._recalled[key] = ()
        try:
            file, entry, answer = self._kept(key, kind)
            if entry.key == key and still_hold(entry.files):
                self._recalled[key] = (file, *entry.files)
                return answer
        except (OSError, msgspec.MsgspecError):
            pass
        return None

    def basis(self) -> tuple[FileIdentity, ...]:
        """What everything stands on that this object was asked for, its own files among it.

        For who keeps all the answers together: as long as these hold, each would be recalled as
        it was. Nothing when one was not recalled, or when a file changed so late that it could
        change again and look the same.
        """
        files = tuple(dict.fromkeys(chain.from_iterable(self._recalled.values())))
        if all(self._recalled.values()) and all(map(_is_settled, files)):
            return files
        return ()

    def _kept(self, key: str, kind: type[T]) -> tuple[FileIdentity, _Entry, T]:
        """What is on disk; what this process has read of that very file is not read again."""
        path = self._path(key)
        file = FileIdentity.of(path)
        known = _read.get(file.path)
        if known is not None and known[0] == file and isinstance(known[2], kind):
            return known
        entry = msgspec.json.decode(self._read(key), type=_Entry)
        answer = msgspec.json.decode(entry.answer, type=kind)
        if _is_settled(file):
            _read[file.path] = file, entry, answer
        return file, entry, answer

    def keep(self, key: str, files: tuple[FileIdentity, ...], answer: Any) -> None:
        """Write an answer down; a full disk costs the next caller a question, no more."""
        entry = _Entry(key, files, msgspec.Raw(msgspec.json.encode(answer)))
        with contextlib.suppress(OSError):
            make_private_directory(self.directory)
            write_atomically(self._path(key), msgspec.json.encode(entry))

    def _path(self, key: str) -> Path:
        return self.directory / f"{hashlib.sha256(key.encode()).hexdigest()[:32]}.json"

    def _read(self, key: str) -> bytes:
        descriptor = os.open(self._path(key), os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
        with open(descriptor, "rb") as file:
            status = os.fstat(descriptor)
            if status.st_uid != os.geteuid() or stat.S_IMODE(status.st_mode) & 0o022:
                raise PermissionError(f"{self._path(key)} could have been written by others")
            return file.read(_LIMIT_BYTES)
