"""What a renewal and the last resort work with: this node's files, couriers to the other nodes."""

from __future__ import annotations

import asyncio
from contextlib import asynccontextmanager
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any, Final

from attrs import frozen

from kvmsec.cluster.renewal.calling import Calling, Line
from kvmsec.cluster.renewal.journal import Journal
from kvmsec.cluster.renewal.reached import OwnNode, RemoteNode
from kvmsec.cluster.renewal.sequence import Renewing
from kvmsec.daemon.front_messages import TrustMessage
from kvmsec.daemon.ways import Ways
from kvmsec.errors import NoCluster
from kvmsec.pki.errors import PkiError
from kvmsec.pki.files import KeyFiles

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
    from uuid import UUID

    from kvmsec.config import Config
    from kvmsec.daemon.courier import Courier
    from kvmsec.paths import Paths
    from kvmsec.pki.pems import Pair
    from kvmsec.pki.standing import Trust
    from kvmsec.store import Store


PATIENCE_S: Final = 20.0
"""A command waits for the daemon, which may just let a node catch up."""


def now() -> datetime:
    return datetime.now(UTC)


def own_uuid(store: Store) -> UUID:
    """Raises NoCluster, and what the store raises."""
    identity = store.identity()
    if identity is None:
        raise NoCluster
    return identity.uuid


class _Lines:
    """A courier for each pair that is called with: no process of root's parses TLS."""

    def __init__(self, ways: Ways[Any]) -> None:
        self._ways = ways
        self._opened: dict[str, tuple[Courier, TrustMessage]] = {}
        self._turn = asyncio.Lock()

    async def __call__(self, pair: Pair, anchors: str, trust: Trust) -> Line:
        message = TrustMessage(
            pair=pair.pem,
            anchors=anchors,
            members=dict(trust.members),
            candidates=_listed(trust.candidates),
            certificates=_listed(trust.certificates),
            certless=trust.certless,
        )
        # The anchors belong to the key: one that proves must trust the new alone, at all times.
        key = pair.certificate_pem + anchors
        async with self._turn:  # One for all members, who are asked at once.
            if key not in self._opened or self._opened[key][0].is_gone:
                self._opened[key] = await self._ways.start_courier(message), message
            courier, told = self._opened[key]
            if told != message:
                self._opened[key] = courier, message
                await courier.tell(message)
            return courier


def _listed(known: Mapping[UUID, frozenset[str]]) -> dict[UUID, tuple[str, ...]]:
    return {uuid: tuple(sorted(fingerprints)) for uuid, fingerprints in known.items()}


@frozen
class _KeysAtHand:
    """The master's key files; the common certificate stands in for a `client.pem` that is lost.

    So that `renew-crypto` can mend the master itself while the cluster runs without client
    certificates: who holds the common one takes its orders.
    """

    files: KeyFiles

    def anchors(self) -> str:
        return self.files.anchors()

    def cluster(self) -> Pair:
        return self.files.cluster()

    def own(self) -> Pair:
        try:
            return self.files.own()
        except PkiError:
            common = self.files.usable_certless(now())
            if common is None:
                raise
            return common


@frozen(kw_only=True)
class Means:
    """This node, as whoever renews certificates works on it.

    `after_change` lets this node's daemon take up what the files hold, and returns once it has.
    """

    paths: Paths
    config: Callable[[], Config]
    store: Store
    after_change: Callable[[], Awaitable[None]]
    on_step: Callable[[str], None]

    @property
    def keys(self) -> KeyFiles:
        return KeyFiles(self.paths.key_files)

    @asynccontextmanager
    async def nodes(self) -> AsyncIterator[Sequence[OwnNode | RemoteNode]]:
        """Every member, this node by its files. Raises NoCluster, and what the store raises."""
        cluster, _ = self.store.load()
        if cluster is None:
            raise NoCluster
        own = own_uuid(self.store)
        async with Ways(self.paths, self.config, self.store, None) as ways:
            calling = Calling(keys=self.keys, store=self.store, now=now, open_line=_Lines(ways))
            yield [
                OwnNode(member, self.keys, self.after_change)
                if member.uuid == own
                else RemoteNode(member, calling)
                for member in cluster.nodes
            ]

    @asynccontextmanager
    async def renewing(self) -> AsyncIterator[Renewing]:
        """What a renewal works with. Raises NoCluster, and what the store raises."""
        async with self.nodes() as nodes:
            yield self.work(nodes)

    def work(self, nodes: Sequence[OwnNode | RemoteNode] = ()) -> Renewing:
        """The same; without nodes for a look alone, which calls nobody."""
        return Renewing(
            own_uuid=own_uuid(self.store),
            store=self.store,
            nodes=nodes,
            keys=_KeysAtHand(self.keys),
            journal=Journal(self.paths.renewal),
            now=now,
            on_step=self.on_step,
            patience_s=PATIENCE_S,
        )
