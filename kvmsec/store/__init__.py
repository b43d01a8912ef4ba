"""Where the cluster's state lives, behind one Protocol; `file` is the embedded default."""

from collections.abc import Mapping
from datetime import datetime
from typing import Protocol
from uuid import UUID

from kvmsec.model.cluster import Cluster
from kvmsec.store.identity import Identity


class Store(Protocol):
    """One cluster's state, changed by compare-and-swap.

    A revision is a number that every change raises; 0 means that there is no cluster. Whoever
    changes the state says which revision the change was made from, and is refused when that is no
    longer the one that stands.

    The master's store holds the truth, every other member's a copy of it: only the master may
    `save` and `delete`, and a copy changes by `put_copy`.
    """

    def load(self) -> tuple[Cluster | None, int]:
        """The cluster and its revision; `(None, 0)` before the first `save`.

        Raises StoreUnreadable and StoreTooNew, and leaves the store as it is.
        """

    def save(self, cluster: Cluster, expected_revision: int) -> int:
        """Put `cluster` in place of revision `expected_revision` (0: where there is none).

        Returns the new revision, once it would survive a power cut. The first one makes this node
        the master that `cluster` names. Raises Conflict when another revision stands, or another
        cluster; NotMaster; StoreNotWritten when there is no room; whatever `load` raises; LockBusy
        when another process keeps the store for too long. The old state stands after each of them.
        """

    def delete(self, cluster: Cluster, expected_revision: int) -> None:
        """Forget `cluster`, loaded at `expected_revision`. Raises what `save` raises."""

    def identity(self) -> Identity | None:
        """Who this node is; None before it has a uuid. Raises StoreUnreadable, StoreTooNew."""

    def introduce(self, uuid: UUID) -> None:
        """Give a node that belongs to no cluster its uuid, before it is handed a copy.

        Raises ClusterExists, StoreNotWritten, LockBusy.
        """

    def put_copy(
        self, document: Mapping[str, object], version: int, revision: int, *, at: datetime
    ) -> int:
        """Take the master's state, or hear once more that the copy is the newest.

        `version` is the document's format, `at` this node's time. Returns the revision that
        stands. Raises CopyRefused for an older revision, for another state under the same one, for
        another cluster than this node's, and for one that it is no member of; StoreTooNew for a
        format that is not known; and what `save` raises. The old copy stands then.
        """

    def take_over(self, cluster: Cluster, expected_revision: int) -> int:
        """Make this node the master: `cluster` names it, and stands in place of its copy.

        Starts a new term (`kvmsec.model.cluster.next_term`); returns its first revision. Raises
        what `save` raises, but for NotMaster.
        """

    def leave(self) -> None:
        """Forget the cluster and who this node is in it. Raises StoreNotWritten, LockBusy."""
