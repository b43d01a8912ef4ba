"""The nodes of a renewal: this one by its files, each other one by its calls."""

from collections.abc import Awaitable, Callable
from typing import Final, Literal, Protocol, Self, TypeVar, cast
from uuid import UUID

from attrs import evolve, frozen

from kvmsec.cluster.asking import is_silence, kind_of
from kvmsec.cluster.handing import state_of
from kvmsec.cluster.renewal.nodes import Credentials, NotReached, NotTrusted
from kvmsec.errors import KvmsecError
from kvmsec.linux.errors import Fault
from kvmsec.model.cluster import Cluster, Member
from kvmsec.pki.certificates import fingerprint_of
from kvmsec.pki.files import HandedOut, KeyFiles
from kvmsec.pki.keys import KeyKind
from kvmsec.rpc import messages as m

_T = TypeVar("_T")

_DISTRUST: Final = frozenset({"Refused", "PeerRefused"})


class Reached(Protocol):
    """A node's calls over one pair (`kvmsec.rpc.household.Household`), and what it shows."""

    async def prepare(self, request: m.PrepareRequest) -> m.Prepared: ...

    async def commit(self, request: m.CommitRequest) -> None: ...

    async def rollback(self) -> None: ...

    async def finish(self, request: m.FinishRequest) -> None: ...

    async def put_file(self, request: m.FileRequest) -> None: ...

    async def put_state(self, state: m.State) -> int: ...

    async def shown(self) -> str:
        """Connect anew, have a call answered, and return the fingerprint of what was shown."""


Reach = Callable[[Member, Credentials | None], Reached]
"""How to call a member over a pair; None for what this node's files hold, and for the common
certificate of the last resort where they don't work."""


class NoRequest(KvmsecError):
    """A node that was asked for a new key and sent no request for its certificate."""

    def __init__(self, node: str) -> None:
        super().__init__(
            f"{node} sent no request for its new certificate",
            hint=f"compare the versions of kvmsec: `kvmsec node info {node}`",
        )
        self.node = node


@frozen
class RemoteNode:
    """A `CertificateNode` that is somewhere else."""

    member: Member
    reach: Reach
    way: Credentials | None = None

    @property
    def name(self) -> str:
        return self.member.name

    @property
    def uuid(self) -> UUID:
        return self.member.uuid

    def through(self, credentials: Credentials) -> Self:
        return evolve(self, way=credentials)

    async def prepare(self, anchors: str, *, kind: KeyKind) -> str:
        request = m.PrepareRequest(anchors=anchors, key_kind=kind.value)
        prepared = await self._ask(lambda node: node.prepare(request))
        if prepared.signing_request is None:
            raise NoRequest(self.name)
        return prepared.signing_request

    async def commit(self, certificate: str) -> None:
        request = m.CommitRequest(certificate=certificate)
        await self._ask(lambda node: node.commit(request))

    async def rollback(self) -> None:
        await self._ask(lambda node: node.rollback())

    async def finish(self, anchors: str) -> None:
        request = m.FinishRequest(anchors=anchors)
        await self._ask(lambda node: node.finish(request))

    async def put_file(self, name: str, content: str | None) -> None:
        request = m.FileRequest(name=cast(HandedOut, name), content=content)
        await self._ask(lambda node: node.put_file(request))

    async def put_state(self, cluster: Cluster, revision: int) -> None:
        await self._ask(lambda node: node.put_state(state_of(cluster, revision)))

    async def presented_certificate(self) -> str:
        return await self._ask(lambda node: node.shown())

    async def _ask(self, call: Callable[[Reached], Awaitable[_T]]) -> _T:
        try:
            return await call(self.reach(self.member, self.way))
        except (Fault, OSError) as error:
            if is_silence(error):
                raise NotReached(self.name, str(error)) from error
            if kind_of(error) in _DISTRUST:
                raise NotTrusted(self.name, str(error)) from error
            raise


async def _nothing() -> None:
    """What follows a change where no daemon runs."""


@frozen
class OwnNode:
    """A `CertificateNode` that is this very node: no call, no judgement, its files.

    `after_change` lets its daemon take up what the files hold now.
    """

    member: Member
    keys: KeyFiles
    after_change: Callable[[], Awaitable[None]] = _nothing

    @property
    def name(self) -> str:
        return self.member.name

    @property
    def uuid(self) -> UUID:
        return self.member.uuid

    def through(self, credentials: Credentials) -> Self:
        return self

    async def prepare(self, anchors: str, *, kind: KeyKind) -> str:
        request = self.keys.prepare(anchors, node_name=self.name, node_uuid=self.uuid, kind=kind)
        if request is None:
            raise NoRequest(self.name)
        await self.after_change()
        return request

    async def commit(self, certificate: str) -> None:
        self.keys.commit(certificate)
        await self.after_change()

    async def rollback(self) -> None:
        self.keys.rollback()
        await self.after_change()

    async def finish(self, anchors: str) -> None:
        self.keys.finish(anchors)
        await self.after_change()

    async def put_file(self, name: str, content: str | None) -> None:
        self.keys.put(cast(Literal["server.key", "certless.pem"], name), content)
        await self.after_change()

    async def put_state(self, cluster: Cluster, revision: int) -> None:
        self.keys.write_candidates(cluster.orderers)
        await self.after_change()

    async def presented_certificate(self) -> str:
        return fingerprint_of(self.keys.own().certificate_pem)
