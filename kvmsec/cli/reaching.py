"""How a command reaches the other members: over TLS, each judged before it hears a word."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from datetime import UTC, datetime
from functools import cached_property
from typing import TYPE_CHECKING, cast

if TYPE_CHECKING:
    import ssl

    from kvmsec.cli.session import Node, Reach
    from kvmsec.cluster.nodes import Household, JoiningNode
    from kvmsec.model.cluster import Member
    from kvmsec.paths import Paths
    from kvmsec.pki.files import KeyFiles
    from kvmsec.pki.standing import Trust
    from kvmsec.rpc.client import HttpsTransport
    from kvmsec.rpc.remote import RemoteAgent
    from kvmsec.store import Store


class Courses:
    """`kvmsec.cli.session.Reach`: the ways to the members, each opened when it is first taken.

    Nothing is imported before that: a cluster of one node needs none of it.
    """

    def __init__(self, paths: Paths, store: Store, here: Node) -> None:
        self._paths = paths
        self._store = store
        self._here = here
        self._opened: list[HttpsTransport] = []

    @property
    def here(self) -> Node:
        return self._here

    @property
    def household(self) -> Household:
        from kvmsec.daemon.household import (  # type: ignore[import-not-found, unused-ignore]
            Household as OwnHousehold,
        )

        return cast("Household", OwnHousehold(self._here))

    @cached_property
    def _files(self) -> KeyFiles:
        from kvmsec.pki.files import KeyFiles

        return KeyFiles(self._paths.key_files)

    @cached_property
    def _context(self) -> ssl.SSLContext:
        from kvmsec.pki.contexts import client_context

        pair, anchors = self._files.serving(datetime.now(UTC))
        return client_context(pair, anchors)

    def _trust(self) -> Trust:
        from kvmsec.pki.standing import Trust

        cluster, _ = self._store.load()
        common = self._files.certless(datetime.now(UTC))
        return Trust(
            anchors=self._files.anchors_der(),
            members={node.uuid: node.name for node in cluster.nodes} if cluster else {},
            candidates=cluster.orderers if cluster else {},
            certless=None if common is None else _fingerprint(common.certificate_pem),
        )

    def node(self, member: Member) -> RemoteAgent:
        from kvmsec.rpc.client import HttpsTransport
        from kvmsec.rpc.remote import RemoteAgent

        transport = HttpsTransport(
            member.address,
            member.port,
            member.name,
            member.uuid,
            lambda: self._context,
            self._trust,
        )
        self._opened.append(transport)
        return RemoteAgent(transport, member.name, revision=self._store.load()[1])

    def joining(self, member: Member) -> JoiningNode:
        from kvmsec.cli.doorway import TlsDoorway
        from kvmsec.cluster.members.greeting import Greeter
        from kvmsec.pki.invitations import Invitations

        invitation = Invitations(self._paths.invitations).find(member.name, datetime.now(UTC))
        doorway = TlsDoorway(member, invitation.secret)
        self._opened.append(doorway.transport)
        return Greeter(doorway, invitation)

    async def close(self) -> None:
        for transport in self._opened:
            await transport.close()


def _fingerprint(certificate_pem: str) -> str:
    from kvmsec.pki.certificates import fingerprint_of

    return fingerprint_of(certificate_pem)


@asynccontextmanager
async def opened(paths: Paths, store: Store, here: Node) -> AsyncIterator[Reach]:
    """The ways to the members, for as long as a command runs."""
    courses = Courses(paths, store, here)
    try:
        yield courses
    finally:
        await courses.close()
