"""Where the cluster's state lives, behind one Protocol; `file` is the embedded default."""

from typing import Protocol

from kvmsec.model.cluster import Cluster


class Store(Protocol):
    """One cluster's state, changed by compare-and-swap.

    A revision is a number that every change raises; 0 means that there is no cluster. Whoever
    changes the state says which revision the change was made from, and is refused when that is no
    longer the one that stands.
    """

    def load(self) -> tuple[Cluster | None, int]:
        """The cluster and its revision; `(None, 0)` before the first `save`.

        Raises StoreUnreadable and StoreTooNew, and leaves the store as it is.
        """

    def save(self, cluster: Cluster, expected_revision: int) -> int:
        """Put `cluster` in place of revision `expected_revision` (0: where there is none).

        Returns the new revision, once it would survive a power cut. Raises Conflict when another
        revision stands, or another cluster; StoreNotWritten when there is no room; whatever
        `load` raises; LockBusy when another process keeps the store for too long. The old state
        stands after each of them.
        """

    def delete(self, cluster: Cluster, expected_revision: int) -> None:
        """Forget `cluster`, loaded at `expected_revision`. Raises what `save` raises."""
