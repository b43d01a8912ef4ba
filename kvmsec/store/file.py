"""The embedded store: one JSON file, written whole under a lock."""

import json
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from datetime import datetime
from pathlib import Path
from typing import Final
from uuid import UUID

from attrs import evolve

from kvmsec.errors import (
    ClusterExists,
    Conflict,
    CopyRefused,
    NotMaster,
    NotRoot,
    StoreNotWritten,
    StoreTooNew,
    StoreUnreadable,
)
from kvmsec.linux.files import read_bounded, remove_file, write_atomically
from kvmsec.linux.locks import FileLock
from kvmsec.model.cluster import FORMAT, Cluster, cluster_from, document_of, migrate, next_term
from kvmsec.store.freshness import is_truth
from kvmsec.store.identity import Identity, IdentityFile

LIMIT_BYTES: Final = 16 << 20
_LOCK_TIMEOUT_S: Final = 10.0


_Version = tuple[int, int, int, int]


class FileStore:
    """A `Store` in the file `path`, and `node.json` beside it; the directory must be there.

    It must be root's alone.

    Reading takes no lock: the file is replaced by rename(2), so it is one state or the next.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        # Beside the file, which is another one after each change.
        self._lock = path.with_suffix(".lock")
        self._identity = IdentityFile(path.with_name("node.json"))
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
            standing = self._require_unchanged(cluster, expected_revision)
            if standing is not None:
                self._require_master(standing)
            self._know_oneself(standing or cluster)
            self._write(cluster, expected_revision + 1)
            return expected_revision + 1

    def delete(self, cluster: Cluster, expected_revision: int) -> None:
        with self._locked():
            standing = self._require_unchanged(cluster, expected_revision)
            if standing is not None:
                self._require_master(standing)
            self._forget()

    def _know_oneself(self, cluster: Cluster) -> None:
        """Before the state that names it is there, the master has its identity.

        A cluster that an earlier release made has none until it is changed.
        """
        kept = self._identity.load()
        if kept is None or kept.cluster_uuid != cluster.uuid:
            self._identity.save(Identity(uuid=cluster.master, cluster_uuid=cluster.uuid))

    def _require_master(self, standing: Cluster) -> None:
        if not is_truth(standing, self.identity()):
            raise NotMaster(standing.master_member.name)

    # Copies ----------------------------------------------------------------------------------

    def identity(self) -> Identity | None:
        if (kept := self._identity.load()) is not None:
            return kept
        cluster, _ = self.load()
        if cluster is None or len(cluster.nodes) > 1:
            return None
        # As an earlier release left it: the only node is this one.
        return Identity(uuid=cluster.master, cluster_uuid=cluster.uuid)

    def introduce(self, uuid: UUID) -> None:
        with self._locked():
            cluster, _ = self.load()
            if cluster is not None:
                raise ClusterExists(cluster.name)
            self._identity.save(Identity(uuid=uuid))

    def put_copy(
        self, document: Mapping[str, object], version: int, revision: int, *, at: datetime
    ) -> int:
        if version > FORMAT:
            raise StoreTooNew("the copy", version, FORMAT)
        try:
            cluster = cluster_from(migrate(dict(document), version))
        except ValueError as error:
            raise CopyRefused(str(error)) from error
        with self._locked():
            standing, found = self.load()
            identity = self._require_takes(cluster, revision, standing, found)
            if revision > found:
                self._write(cluster, revision)
            known = evolve(identity, cluster_uuid=cluster.uuid, confirmed_at=at)
            self._identity.save(known)
            return revision

    def _require_takes(
        self, cluster: Cluster, revision: int, standing: Cluster | None, found: int
    ) -> Identity:
        identity = self.identity()
        if identity is None or cluster.member(identity.uuid) is None:
            raise CopyRefused(
                f"this node is no member of the cluster {cluster.name}",
                hint="let it join: `kvmsec node invite` on the master",
            )
        own = standing.uuid if standing is not None else identity.cluster_uuid
        if own not in (None, cluster.uuid):
            raise CopyRefused(f"it is the cluster {cluster.name}'s, and this node is another's")
        if standing is None:
            return identity
        if revision < found:
            raise CopyRefused(
                f"it is revision {revision}, and this node has revision {found}",
                hint="the newest copy wins: run `kvmsec cluster master-failover` where it is",
            )
        if revision == found and cluster != standing:
            raise CopyRefused(
                f"another state has the same revision, {revision}: two masters made one each",
                hint="run `kvmsec cluster master-failover` on the node that shall be the master",
            )
        return identity

    def take_over(self, cluster: Cluster, expected_revision: int) -> int:
        with self._locked():
            self._require_unchanged(cluster, expected_revision)
            identity = self.identity()
            if identity is None or identity.uuid != cluster.master:
                raise NotMaster(cluster.master_member.name)
            revision = next_term(expected_revision)
            self._write(cluster, revision)
            return revision

    def leave(self) -> None:
        with self._locked():
            self._forget()

    def _forget(self) -> None:
        # The state first: a node that knows its uuid but no cluster belongs to none.
        remove_file(self._path)
        self._identity.remove()

    # Under the lock --------------------------------------------------------------------------

    def _require_unchanged(self, cluster: Cluster, expected_revision: int) -> Cluster | None:
        standing, revision = self.load()
        # A cluster that was destroyed and made anew counts its revisions from one again.
        is_another = standing is not None and standing.uuid != cluster.uuid
        if revision != expected_revision or is_another:
            raise Conflict(expected_revision, revision)
        return standing

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
        for name in (self._path.name, self._identity.path.name):
            for leftover in self._path.parent.glob(f".{name}.*"):
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
