"""What the cluster's decisions need of its certificates; `kvmsec.pki` has it."""

from collections.abc import Sequence
from typing import Protocol

from attrs import frozen

from kvmsec.model.cluster import Cluster, Member


class Founding(Protocol):
    """Makes the certificates of a new cluster and of its first node."""

    def found(self, cluster: Cluster) -> str:
        """Put server.pem, server.key, client.pem and the list of candidates in place.

        Returns the fingerprint of the node's certificate. Files that an interrupted `init` left
        are replaced.
        """

    def undo(self) -> None:
        """Remove what `found` has made."""


@frozen
class Signed:
    """A node's certificate (PEM) and its fingerprint."""

    certificate: str
    fingerprint: str


class Authority(Protocol):
    """The cluster's key, which only candidates have. Every call may raise a Fault."""

    def anchors(self) -> str:
        """The certificates (PEM) that every member trusts."""

    def cluster_key(self) -> str:
        """The key (PEM) that signs the members' certificates."""

    def sign(self, request: str, member: Member) -> Signed:
        """A certificate of the request's key for a member; nothing of the request but its key."""


class Invitations(Protocol):
    """The invitations of nodes that have not joined yet."""

    def is_current(self, name: str) -> bool:
        """Whether the node of this name is invited, and the invitation neither spent nor over."""

    def current(self) -> Sequence[str]:
        """The names of the nodes that are invited."""

    def spend(self, name: str) -> None:
        """Use an invitation up; one that is spent already is fine."""
