"""The embedded store: one JSON file, written whole under a lock."""

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Final

from kvmsec.errors import Conflict, NotRoot, StoreNotWritten, StoreTooNew, StoreUnreadable
from kvmsec.linux.files import read_bounded, remove_file, write_atomically
from kvmsec.linux.locks import FileLock
from kvmsec.model.cluster import FORMAT, Cluster, cluster_from, document_of, migrate

LIMIT_BYTES: Final = 16 << 20
_LOCK_TIMEOUT_S: Final = 10.0


_Version = tuple[int, int, int, int]


class FileStore:
    """A `Store` in the file `path`; its directory must be there and root's alone.

    Reading takes no lock: the file is replaced by rename(2), so it is one state or the next.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        # Beside the file, which is another one after each change.
        self._lock = path.with_suffix(".lock")
        self._read: tuple[_Version, tuple[Cluster, int]] | None = None

    def load(self) -> tuple[Cluster | None, int]:
        try:
            return self._load()
        except FileNotFoundError:
            return None, 0
        except PermissionError as error:
            raise NotRoot(f"reading {self._path}") from error
        except OSError as error:
            raise StoreUnreadable(self._path, error.strerror or str(error)) from error
        except ValueError as error:
            raise StoreUnreadable(self._path, str(error)) from error

    def _load(self) -> tuple[Cluster, int]:
        descriptor = os.open(self._path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
        try:
            # Every change is another file: what was read of the one that stands is still so.
            version = _version_of(os.fstat(descriptor))
            if self._read is None or self._read[0] != version:
                content = read_bounded(descriptor, LIMIT_BYTES)
                self._read = version, self._decode(content)
        finally:
            os.close(descriptor)
        return self._read[1]

    def save(self, cluster: Cluster, expected_revision: int) -> int:
        with self._locked():
            self._require_unchanged(cluster, expected_revision)
            self._write(cluster, expected_revision + 1)
            return expected_revision + 1

    def delete(self, cluster: Cluster, expected_revision: int) -> None:
        with self._locked():
            self._require_unchanged(cluster, expected_revision)
            remove_file(self._path)

    def _require_unchanged(self, cluster: Cluster, expected_revision: int) -> None:
        standing, revision = self.load()
        # A cluster that was destroyed and made anew counts its revisions from one again.
        is_another = standing is not None and standing.uuid != cluster.uuid
        if revision != expected_revision or is_another:
            raise Conflict(expected_revision, revision)

    @contextmanager
    def _locked(self) -> Iterator[None]:
        """Hold the lock, and turn what the file system refuses into a store's error."""
        lock = FileLock(self._lock)
        try:
            lock.acquire(_LOCK_TIMEOUT_S)
            with lock:
                self._remove_unfinished()
                yield
        except PermissionError as error:
            raise NotRoot(f"changing {self._path}") from error
        except OSError as error:
            raise StoreNotWritten(self._path, error.strerror or str(error)) from error

    def _remove_unfinished(self) -> None:
        """Under the lock nobody else writes: a temporary file is one that a killed writer left."""
        for leftover in self._path.parent.glob(f".{self._path.name}.*"):
            remove_file(leftover)

    def _write(self, cluster: Cluster, revision: int) -> None:
        document = document_of(cluster)
        try:
            cluster_from(document)
        except ValueError as error:  # a pool whose text outgrew what is read back, for one
            raise StoreNotWritten(self._path, f"it could not be read again: {error}") from error
        envelope = {"format": FORMAT, "revision": revision, "cluster": document}
        write_atomically(self._path, json.dumps(envelope, indent=2).encode() + b"\n")

    def _decode(self, content: bytes) -> tuple[Cluster, int]:
        try:
            envelope = json.loads(content)
        except RecursionError:
            raise StoreUnreadable(self._path, "it is nested too deeply") from None
        except ValueError as error:
            raise StoreUnreadable(self._path, f"it is not whole JSON ({error})") from error
        found = self._number(envelope, "format")
        if found > FORMAT:
            raise StoreTooNew(self._path, found, FORMAT)
        revision = self._number(envelope, "revision")
        try:
            return cluster_from(migrate(envelope.get("cluster"), found)), revision
        except ValueError as error:
            raise StoreUnreadable(self._path, str(error)) from error

    def _number(self, envelope: object, key: str) -> int:
        value = envelope.get(key) if isinstance(envelope, dict) else None
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise StoreUnreadable(self._path, f"it has no {key}")
        return value


def _version_of(status: os.stat_result) -> _Version:
    """What tells a file from the one before and the one after it in the same place."""
    return status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns
