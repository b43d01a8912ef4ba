"""What the commands about certificates work with: this node's files, and the ways to the others."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Sequence
    from uuid import UUID

    from kvmsec.cli.session import Session
    from kvmsec.cluster.renewal.reached import OwnNode, RemoteNode
    from kvmsec.cluster.renewal.sequence import Renewing
    from kvmsec.pki.files import KeyFiles


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


def certificate_nodes(session: Session) -> Sequence[OwnNode | RemoteNode]:
    """Every member, this node by its files. Raises NoCluster, and what the store raises."""
    from kvmsec.cluster.renewal.directly import Direct
    from kvmsec.cluster.renewal.reached import OwnNode, RemoteNode
    from kvmsec.errors import NoCluster

    cluster, _ = session.store.load()
    if cluster is None:
        raise NoCluster
    keys, here = key_files(session), own_uuid(session)
    direct = Direct(keys=keys, store=session.store, now=now)
    return [
        OwnNode(member, keys) if member.uuid == here else RemoteNode(member, direct)
        for member in cluster.nodes
    ]


def renewing(session: Session) -> Renewing:
    """What a renewal works with. Raises NoCluster, and what the store raises."""
    from kvmsec.cluster.renewal.journal import Journal
    from kvmsec.cluster.renewal.sequence import Renewing

    return Renewing(
        own_uuid=own_uuid(session),
        store=session.store,
        nodes=certificate_nodes(session),
        keys=key_files(session),
        journal=Journal(session.paths.renewal),
        now=now,
    )
