"""What a renewal asks of each node, and through which pair the master calls it."""

from typing import Protocol, Self
from uuid import UUID

from attrs import frozen

from kvmsec.errors import KvmsecError
from kvmsec.model.cluster import Cluster
from kvmsec.pki.keys import KeyKind
from kvmsec.pki.pems import Pair


class NotReached(KvmsecError):
    """A node did not answer in time, or at all: whether it did what it was asked is not known."""

    def __init__(self, node: str, reason: str) -> None:
        super().__init__(f"{node} was not reached: {reason}")
        self.node = node


class NotTrusted(KvmsecError):
    """Over this pair the node and the master don't accept each other; the node did nothing."""

    def __init__(self, node: str, reason: str) -> None:
        super().__init__(f"{node} and this node do not trust each other: {reason}")
        self.node = node


@frozen
class Credentials:
    """What the master shows to a node that it calls, and the anchors (PEM) that it holds it to."""

    pair: Pair
    anchors: str


class CertificateNode(Protocol):
    """The part of a node that its certificates need.

    Each call raises NotReached or NotTrusted for the two cases that have a way on, and another
    Fault for what the node itself refuses. Each may be made again when it is not known whether it
    was done.
    """

    @property
    def name(self) -> str: ...

    @property
    def uuid(self) -> UUID: ...

    def through(self, credentials: Credentials) -> Self:
        """The same node, called with these instead of what the master's files hold.

        This very node is not called over the network, and needs none.
        """

    async def prepare(self, anchors: str, *, kind: KeyKind) -> str:
        """Trust these anchors, and make a new key: the request (PEM) for its certificate."""

    async def commit(self, certificate: str) -> None:
        """Serve and call with this certificate (PEM) of the key that was prepared."""

    async def rollback(self) -> None:
        """Serve, call and trust as before `prepare`; nothing where nothing was prepared."""

    async def finish(self, anchors: str) -> None:
        """Trust these anchors alone, and forget what a rollback would need."""

    async def put_file(self, name: str, content: str | None) -> None:
        """Put `server.key` or `certless.pem` in place; None removes it."""

    async def put_state(self, cluster: Cluster, revision: int) -> None:
        """Take a copy of the cluster's state, and write the list of candidates from it."""

    async def presented_certificate(self) -> str:
        """Connect anew, have a call answered, and return the node's fingerprint as it shows it."""


class OwnKeys(Protocol):
    """The master's own key files (`kvmsec.pki.files.KeyFiles`). Each raises a Fault."""

    def anchors(self) -> str:
        """`server.pem`, PEM."""

    def cluster(self) -> Pair:
        """The cluster's key, and the one of the anchors that it belongs to."""

    def own(self) -> Pair:
        """`client.pem`, as it is now."""
