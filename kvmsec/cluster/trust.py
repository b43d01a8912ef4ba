"""What the cluster's decisions need of its certificates; `kvmsec.pki` has it."""

from typing import Protocol

from kvmsec.model.cluster import Cluster


class Founding(Protocol):
    """Makes the certificates of a new cluster and of its first node."""

    def found(self, cluster: Cluster) -> str:
        """Put server.pem, server.key, client.pem and the list of candidates in place.

        Returns the fingerprint of the node's certificate. Files that an interrupted `init` left
        are replaced.
        """

    def undo(self) -> None:
        """Remove what `found` has made."""
