"""What the commands about certificates work with: this node's files, and the ways to the others."""

from __future__ import annotations

from contextlib import asynccontextmanager
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Sequence
    from uuid import UUID

    from kvmsec.cli.session import Node, Session
    from kvmsec.cluster.renewal.calling import Line
    from kvmsec.cluster.renewal.reached import OwnNode, RemoteNode
    from kvmsec.cluster.renewal.sequence import Renewing
    from kvmsec.daemon.courier import Courier
    from kvmsec.daemon.front_messages import TrustMessage
    from kvmsec.daemon.ways import Ways
    from kvmsec.pki.files import KeyFiles
    from kvmsec.pki.pems import Pair
    from kvmsec.pki.standing import Trust


def now() -> datetime:
    return datetime.now(UTC)


def key_files(session: Session) -> KeyFiles:
    from kvmsec.pki.files import KeyFiles

    return KeyFiles(session.paths.key_files)


def own_uuid(session: Session) -> UUID:
    """Raises NoCluster, and what the store raises."""
    from kvmsec.errors import NoCluster

    identity = session.store.identity()
    if identity is None:
        raise NoCluster
    return identity.uuid


class _Lines:
    """A courier for each pair that is called with: no process of root's parses TLS."""

    def __init__(self, ways: Ways[Any]) -> None:
        self._ways = ways
        self._opened: dict[str, tuple[Courier, TrustMessage]] = {}

    async def __call__(self, pair: Pair, anchors: str, trust: Trust) -> Line:
        from kvmsec.daemon.front_messages import TrustMessage

        message = TrustMessage(
            pair=pair.pem,
            anchors=anchors,
            members=dict(trust.members),
            candidates={uuid: tuple(sorted(known)) for uuid, known in trust.candidates.items()},
            certless=trust.certless,
        )
        # The anchors belong to the key: one that proves must trust the new alone, at all times.
        key = pair.certificate_pem + anchors
        if key not in self._opened:
            self._opened[key] = await self._ways.start_courier(message), message
        courier, told = self._opened[key]
        if told != message:
            self._opened[key] = courier, message
            await courier.tell(message)
        return courier


@asynccontextmanager
async def certificate_nodes(
    session: Session, here: Node
) -> AsyncIterator[Sequence[OwnNode | RemoteNode]]:
    """Every member, this node by its files. Raises NoCluster, and what the store raises."""
    from kvmsec.cluster.renewal.calling import Calling
    from kvmsec.cluster.renewal.reached import OwnNode, RemoteNode
    from kvmsec.daemon.ways import Ways
    from kvmsec.errors import NoCluster

    cluster, _ = session.store.load()
    if cluster is None:
        raise NoCluster
    keys, own = key_files(session), own_uuid(session)
    async with Ways(session.paths, lambda: session.config, session.store, here) as ways:
        calling = Calling(keys=keys, store=session.store, now=now, open_line=_Lines(ways))
        yield [
            OwnNode(member, keys) if member.uuid == own else RemoteNode(member, calling)
            for member in cluster.nodes
        ]


@asynccontextmanager
async def renewing(session: Session, here: Node) -> AsyncIterator[Renewing]:
    """What a renewal works with. Raises NoCluster, and what the store raises."""
    from kvmsec.cluster.renewal.journal import Journal
    from kvmsec.cluster.renewal.sequence import Renewing

    async with certificate_nodes(session, here) as nodes:
        yield Renewing(
            own_uuid=own_uuid(session),
            store=session.store,
            nodes=nodes,
            keys=key_files(session),
            journal=Journal(session.paths.renewal),
            now=now,
        )
