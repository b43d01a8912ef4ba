"""The cluster: its name, its uid pool, its security model, its members; and how they are kept.

A store keeps a cluster as a document of plain values and the number of its format. What an earlier
release wrote is brought up to date, one format after the other. A key more or less than the format
has is a fault, so whoever adds one raises `FORMAT` and adds a migration.
"""

import re
from collections.abc import Callable, Iterable, Mapping
from datetime import datetime
from enum import StrEnum
from typing import Annotated, Any, Final, cast
from uuid import UUID, uuid5

import msgspec
from attrs import field, frozen

from kvmsec.linux.errors import Fault
from kvmsec.model.addresses import PORT
from kvmsec.model.names import require_name
from kvmsec.model.security import SecurityModel
from uidpool.ranges import UidRanges

FORMAT: Final = 2

Document = dict[str, object]
Migrations = Mapping[int, Callable[[Document], Document]]

_TERM: Final = 1 << 20

_FINGERPRINT: Final = re.compile(r"[0-9a-f]{64}")
_ADDRESS: Final = re.compile(r"[0-9A-Za-z:][0-9A-Za-z.:%_-]{0,252}")


class Role(StrEnum):
    """What a member may do: a candidate may order and become the master, a plain node may not."""

    CANDIDATE = "candidate"
    PLAIN = "plain"


@frozen
class Member:
    """A node of the cluster, and where its daemon is reached.

    `certificates` are the SHA-256 fingerprints (64 hex digits) that count for it: two during a
    renewal, none while a cluster of one node has no certificates. `is_leaving` says that its
    removal has begun: it orders nothing any more.
    """

    name: str = field()
    uuid: UUID = field(kw_only=True)
    address: str = field(kw_only=True)
    port: int = field(default=PORT, kw_only=True)
    role: Role = field(default=Role.PLAIN, kw_only=True)
    certificates: tuple[str, ...] = field(default=(), kw_only=True)
    is_leaving: bool = field(default=False, kw_only=True)

    @property
    def is_candidate(self) -> bool:
        return self.role is Role.CANDIDATE

    @name.validator
    def _check_name(self, _: object, name: str) -> None:
        require_name("a node", name)

    @address.validator
    def _check_address(self, _: object, address: str) -> None:
        if not _ADDRESS.fullmatch(address):
            raise ValueError(f"{address[:80]!a} is no address of a node")

    @port.validator
    def _check_port(self, _: object, port: int) -> None:
        if not 1 <= port <= 65535:
            raise ValueError(f"{port} is no port: 1 to 65535")

    @certificates.validator
    def _check_certificates(self, _: object, certificates: tuple[str, ...]) -> None:
        if not all(map(_FINGERPRINT.fullmatch, certificates)):
            raise ValueError("a certificate's fingerprint is 64 hex digits, lower case")
        if len(set(certificates)) != len(certificates) or len(certificates) > 2:
            raise ValueError("a node has one certificate, or two distinct ones during a renewal")


@frozen(kw_only=True)
class Cluster:
    """What all nodes of a cluster agree on.

    `security_model` is the one that was chosen, None while none was. `draining` holds the uids
    that have left the pool and still have a holder: no new draw, but the packet rules still stand.
    `master` is the uuid of the candidate that decides.
    """

    name: str = field()
    uuid: UUID
    uid_pool: UidRanges
    draining: UidRanges
    security_model: SecurityModel | None
    nodes: tuple[Member, ...]
    master: UUID
    created_at: datetime

    @name.validator
    def _check_name(self, _: object, name: str) -> None:
        require_name("a cluster", name)

    def __attrs_post_init__(self) -> None:
        if not self.uid_pool.isdisjoint(self.draining):
            raise ValueError("a uid is in the pool and leaves it at once")
        _require_distinct("name", (node.name.lower() for node in self.nodes))
        _require_distinct("uuid", (node.uuid for node in self.nodes))
        _require_distinct("certificate", (one for node in self.nodes for one in node.certificates))
        master = self.member(self.master)
        if master is None or not master.is_candidate or master.is_leaving:
            raise ValueError("the master is not one of the candidates")

    def member(self, uuid: UUID) -> Member | None:
        """The member with this uuid."""
        return next((node for node in self.nodes if node.uuid == uuid), None)

    def named(self, name: str) -> Member | None:
        """The member of this name; host names know no case (RFC 4343)."""
        return next((node for node in self.nodes if node.name.lower() == name.lower()), None)

    @property
    def master_member(self) -> Member:
        """The master; that there is one is checked when a cluster is made."""
        master = self.member(self.master)
        assert master is not None
        return master

    @property
    def candidates(self) -> tuple[Member, ...]:
        """Those that may order."""
        return tuple(node for node in self.nodes if node.is_candidate)

    @property
    def orderers(self) -> Mapping[UUID, frozenset[str]]:
        """The certificates of those that may order: the list that each node has."""
        return {
            node.uuid: frozenset(node.certificates)
            for node in self.candidates
            if node.certificates and not node.is_leaving
        }

    @property
    def default_model(self) -> SecurityModel:
        """The model of an instance that asks for none: `pool` once a pool is set, else `none`."""
        if self.security_model is not None:
            return self.security_model
        return SecurityModel.POOL if self.uid_pool else SecurityModel.NONE

    @property
    def guarded_uids(self) -> UidRanges:
        """The uids that the packet rules must hold: the pool's, and those that leave it."""
        return self.uid_pool | self.draining


def _require_distinct(what: str, values: Iterable[object]) -> None:
    seen: set[object] = set()
    for value in values:
        if value in seen:
            raise ValueError(f"two nodes have the {what} {value}")
        seen.add(value)


def next_term(revision: int) -> int:
    """The first revision of a new master's term: above all that the old one may still make.

    So what an old master changed after it was cut off never passes for newer than what its
    successor did.
    """
    return (revision // _TERM + 1) * _TERM


class _KeptMember(msgspec.Struct, forbid_unknown_fields=True, kw_only=True):
    name: str
    uuid: UUID
    address: str
    port: int
    role: Role
    certificates: tuple[str, ...]
    is_leaving: bool


class _KeptCluster(msgspec.Struct, forbid_unknown_fields=True, kw_only=True):
    """The shape of a document of format `FORMAT`: sets of uids are kept as people write them."""

    name: str
    uuid: UUID
    uid_pool: str
    draining: str
    security_model: SecurityModel | None
    nodes: tuple[_KeptMember, ...]
    master: UUID
    created_at: Annotated[datetime, msgspec.Meta(tz=True)]


def document_of(cluster: Cluster) -> Document:
    """The cluster as plain values, in the format `FORMAT`."""
    kept = _KeptCluster(
        name=cluster.name,
        uuid=cluster.uuid,
        uid_pool=str(cluster.uid_pool),
        draining=str(cluster.draining),
        security_model=cluster.security_model,
        nodes=tuple(_kept(node) for node in cluster.nodes),
        master=cluster.master,
        created_at=cluster.created_at,
    )
    return cast(Document, msgspec.to_builtins(kept))


def _kept(node: Member) -> _KeptMember:
    return _KeptMember(
        name=node.name,
        uuid=node.uuid,
        address=node.address,
        port=node.port,
        role=node.role,
        certificates=node.certificates,
        is_leaving=node.is_leaving,
    )


def _to_format_2(document: Document) -> Document:
    """One node without a uuid becomes the master: its uuid follows from what it always had."""
    try:
        cluster = UUID(cast(str, document["uuid"]))
        names = [str(node["name"]) for node in cast(list[dict[str, Any]], document["nodes"])]
        nodes = [
            {
                "name": name,
                "uuid": str(uuid5(cluster, name)),
                "address": name,
                "port": PORT,
                "role": "candidate",
                "certificates": [],
                "is_leaving": False,
            }
            for name in names
        ]
        return {**document, "nodes": nodes, "master": nodes[0]["uuid"]}
    except (AttributeError, IndexError, KeyError, TypeError) as error:
        raise ValueError("it is not a cluster of format 1") from error


MIGRATIONS: Final[Migrations] = {1: _to_format_2}
"""From the format that is the key to the next one; every format before `FORMAT` has its own."""


def migrate(document: Document, found: int, migrations: Migrations = MIGRATIONS) -> Document:
    """Bring a document of an earlier format up to date. Raises ValueError for an unknown one."""
    newest = max(migrations, default=0) + 1
    if not 1 <= found <= newest:
        raise ValueError(f"there is no format {found}")
    for version in range(found, newest):
        document = migrations[version](document)
    return document


def cluster_from(document: object) -> Cluster:
    """The cluster that a document of format `FORMAT` holds.

    Raises ValueError that says what is wrong, and where (`$` is the document).
    """
    kept = msgspec.convert(document, _KeptCluster)
    try:
        return Cluster(
            name=kept.name,
            uuid=kept.uuid,
            uid_pool=UidRanges.parse(kept.uid_pool),
            draining=UidRanges.parse(kept.draining),
            security_model=kept.security_model,
            nodes=tuple(_member(node) for node in kept.nodes),
            master=kept.master,
            created_at=kept.created_at,
        )
    except Fault as error:
        raise ValueError(error.message) from error


def _member(kept: _KeptMember) -> Member:
    return Member(
        kept.name,
        uuid=kept.uuid,
        address=kept.address,
        port=kept.port,
        role=kept.role,
        certificates=kept.certificates,
        is_leaving=kept.is_leaving,
    )
