"""A node that is nothing but memory: it has the users of every pool, and no instance."""

import asyncio
from collections.abc import AsyncIterator, Mapping, Sequence
from datetime import UTC, datetime
from typing import Any
from uuid import UUID

from attrs import define

from kvmsec.agent import Event, Finding
from kvmsec.pki import certificates
from kvmsec.rpc import messages as m
from uidpool.ranges import UidRanges


@define
class SimulatedNode:
    """What a change of the pool and a verification ask of a node."""

    name: str

    async def check_pool(self, uids: UidRanges) -> Sequence[m.Problem]:
        return ()

    async def held_uids(self) -> Mapping[int, str]:
        return {}

    async def running_instances(self) -> Sequence[str]:
        return ()

    async def sync_rules(self) -> None:
        pass

    async def forget_resting(self) -> None:
        pass

    async def events(self) -> AsyncIterator[Event]:
        await asyncio.Event().wait()
        yield  # type: ignore[misc]  # Nothing ever happens here.

    async def verify_rules(self) -> tuple[Finding, ...]:
        return ()


@define
class SimulatedHome:
    """Its copy of the state, its certificate, and what it says of both."""

    name: str
    uuid: UUID
    cluster_uuid: UUID
    anchor_pem: str
    certificate_pem: str
    candidates: tuple[tuple[UUID, str], ...]
    is_candidate: bool
    revision: int
    """Of its copy; the copy itself is let go: 500 that name 500 nodes each are 800 MB."""
    confirmed_at: datetime | None = None

    async def info(self) -> m.NodeInfo:
        return m.NodeInfo(
            name=self.name,
            uuid=self.uuid,
            cluster_uuid=self.cluster_uuid,
            version=_version(),
            protocols=(1, 1),
            time=datetime.now(UTC),
            revision=self.revision,
            confirmed_at=self.confirmed_at,
        )

    async def examine(self, pool: UidRanges) -> m.Examination:
        return m.Examination(
            info=await self.info(),
            anchors=(facts(self.anchor_pem),),
            certificate=facts(self.certificate_pem),
            holds_cluster_key=self.is_candidate,
            candidates=self.candidates,
            pool_problems=(),
            leases=(),
            running_without_lease=(),
            rules=(),
            unconfined=(),
            may_be_missing=(),
        )

    async def put_state(self, state: m.State) -> int:
        if state.revision >= self.revision:
            self.revision = state.revision
            self.confirmed_at = datetime.now(UTC)
        return self.revision

    def __getattr__(self, name: str) -> Any:
        """What the table of calls names and the benchmark never asks."""
        if name.startswith("__"):
            raise AttributeError(name)

        async def unasked(*_: object) -> Any:
            raise NotImplementedError(name)

        return unasked


def facts(pem: str) -> m.CertificateFacts:
    """What a certificate says, as a message has it."""
    said = certificates.facts_of(pem)
    return m.CertificateFacts(
        fingerprint=said.fingerprint,
        subject=said.subject,
        names=said.names,
        not_before=said.not_before,
        not_after=said.not_after,
    )


def _version() -> str:
    from importlib.metadata import version

    return version("kvmsec")
