"""Whether a file is still the one that was looked at, and answers that hold for as long."""

import contextlib
import hashlib
import os
import stat
from collections.abc import Iterable
from pathlib import Path
from typing import Final, Protocol, TypeVar

import msgspec
from attrs import frozen

from kvmsec.linux.files import make_private_directory, write_atomically

_LIMIT_BYTES: Final = 1 << 20
_SETTLED_NS: Final = 1_000_000_000


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


def is_settled(files: Iterable[FileIdentity], at_ns: int) -> bool:
    """Whether none had changed shortly before `at_ns` (time.time_ns()).

    Within one tick of the file system's clock a file could change again and look the same.
    """
    return all(at_ns - file.changed_ns > _SETTLED_NS for file in files)


class Answer(Protocol):
    """What holds as long as these files are what they were."""

    @property
    def files(self) -> tuple[FileIdentity, ...]: ...


A = TypeVar("A", bound=Answer)


@frozen
class _Entry:
    key: str
    answer: msgspec.Raw


@frozen
class Memory:
    """Answers on disk, in a directory that only root may write.

    An answer is forgotten when one of its files is no longer what it was, and when what is on
    disk can't be read: the question is then asked again.
    """

    directory: Path

    def recall(self, key: str, kind: type[A]) -> A | None:
        """The answer that was kept for `key`, if it still holds."""
        with contextlib.suppress(OSError, msgspec.MsgspecError):
            entry = msgspec.json.decode(self._read(key), type=_Entry)
            answer = msgspec.json.decode(entry.answer, type=kind)
            if entry.key == key and answer.files and still_hold(answer.files):
                return answer
        return None

    def keep(self, key: str, answer: Answer) -> None:
        """Write an answer down; a full disk costs the next caller a question, no more.

        One without a file to stand on isn't kept: nothing would tell that it no longer holds.
        """
        if not answer.files:
            return
        entry = _Entry(key, msgspec.Raw(msgspec.json.encode(answer)))
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
