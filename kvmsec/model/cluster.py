"""The cluster: its name, its uid pool, its security model, its nodes; and how they are kept.

A store keeps a cluster as a document of plain values and the number of its format. What an earlier
release wrote is brought up to date, one format after the other. A key more or less than the format
has is a fault, so whoever adds one raises `FORMAT` and adds a migration.
"""

from collections.abc import Callable, Mapping
from datetime import datetime
from typing import Annotated, Final, cast
from uuid import UUID

import msgspec
from attrs import field, frozen

from kvmsec.linux.errors import Fault
from kvmsec.model.names import require_name
from kvmsec.model.security import SecurityModel
from uidpool.ranges import UidRanges

FORMAT: Final = 1

Document = dict[str, object]
Migrations = Mapping[int, Callable[[Document], Document]]

MIGRATIONS: Final[Migrations] = {}
"""From the format that is the key to the next one; every format before `FORMAT` has its own."""


@frozen
class Member:
    """A node of the cluster."""

    name: str = field()

    @name.validator
    def _check_name(self, _: object, name: str) -> None:
        require_name("a node", name)


@frozen(kw_only=True)
class Cluster:
    """What all nodes of a cluster agree on.

    `security_model` is the one that was chosen, None while none was. `draining` holds the uids
    that have left the pool and still have a holder: no new draw, but the packet rules still stand.
    """

    name: str = field()
    uuid: UUID
    uid_pool: UidRanges
    draining: UidRanges
    security_model: SecurityModel | None
    nodes: tuple[Member, ...]
    created_at: datetime

    @name.validator
    def _check_name(self, _: object, name: str) -> None:
        require_name("a cluster", name)

    def __attrs_post_init__(self) -> None:
        if not self.uid_pool.isdisjoint(self.draining):
            raise ValueError("a uid is in the pool and leaves it at once")

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


class _KeptMember(msgspec.Struct, forbid_unknown_fields=True):
    name: str


class _KeptCluster(msgspec.Struct, forbid_unknown_fields=True, kw_only=True):
    """The shape of a document of format `FORMAT`: sets of uids are kept as people write them."""

    name: str
    uuid: UUID
    uid_pool: str
    draining: str
    security_model: SecurityModel | None
    nodes: tuple[_KeptMember, ...]
    created_at: Annotated[datetime, msgspec.Meta(tz=True)]


def document_of(cluster: Cluster) -> Document:
    """The cluster as plain values, in the format `FORMAT`."""
    kept = _KeptCluster(
        name=cluster.name,
        uuid=cluster.uuid,
        uid_pool=str(cluster.uid_pool),
        draining=str(cluster.draining),
        security_model=cluster.security_model,
        nodes=tuple(_KeptMember(node.name) for node in cluster.nodes),
        created_at=cluster.created_at,
    )
    return cast(Document, msgspec.to_builtins(kept))


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
            nodes=tuple(Member(node.name) for node in kept.nodes),
            created_at=kept.created_at,
        )
    except Fault as error:
        raise ValueError(error.message) from error
