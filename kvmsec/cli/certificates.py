"""What the commands about certificates work with: this node's files, and the ways to the others."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Sequence
    from contextlib import AbstractAsyncContextManager
    from uuid import UUID

    from kvmsec.cli.session import Node, Session
    from kvmsec.cluster.renewal.reached import OwnNode, RemoteNode
    from kvmsec.cluster.renewal.sequence import Renewing
    from kvmsec.daemon.renewing import Means
    from kvmsec.pki.files import KeyFiles


def now() -> datetime:
    return datetime.now(UTC)


def key_files(session: Session) -> KeyFiles:
    from kvmsec.pki.files import KeyFiles

    return KeyFiles(session.paths.key_files)


def own_uuid(session: Session) -> UUID:
    """Raises NoCluster, and what the store raises."""
    from kvmsec.daemon.renewing import own_uuid

    return own_uuid(session.store)


def certificate_nodes(
    session: Session, here: Node
) -> AbstractAsyncContextManager[Sequence[OwnNode | RemoteNode]]:
    """Every member, this node by its files. Raises NoCluster, and what the store raises."""
    return means(session, here).nodes()


def renewing(session: Session, here: Node) -> AbstractAsyncContextManager[Renewing]:
    """What a renewal works with. Raises NoCluster, and what the store raises."""
    return means(session, here).renewing()


def require_none_pending(session: Session) -> None:
    """Raises RenewalPending, and what the store and the key files raise."""
    from kvmsec.cluster.renewal import operations

    operations.require_none_pending(means(session, None).work())


def means(session: Session, here: Node | None) -> Means:
    from kvmsec.daemon.renewing import Means

    async def take_up() -> None:
        from kvmsec.daemon.reaching import have_taken_up

        await have_taken_up(here)

    return Means(
        paths=session.paths,
        config=lambda: session.config,
        store=session.store,
        after_change=take_up,
        on_step=session.on_step,
    )
