"""The last resort: for a bounded time a cluster runs on one common certificate.

For when certificates are what is broken: a lost `client.pem`, a wrong `server.pem`, a list that
names nobody, peers that can't read each other's certificates. The master mints a short-lived pair
of its own kind, never with the cluster's key, and hands it to each node that it still reaches; to
the others it is carried by hand, sealed. Whoever holds it may order, on each node that holds it:
that is what it weakens, and why it ends by itself.

How a node behaves while it holds one that is valid (`ways_to_call`, `pair_to_serve`):

- It trusts the cluster's anchors *and* the common certificate, whatever else of its files is
  broken.
- It serves its own pair, so that nodes without the common one reach it as ever; and the common one
  to a caller that asks for it by name (SNI `CERTLESS_SERVER_NAME`), or to all when its own pair
  can't be used.
- It calls with its own pair first, and with the common one when that was refused, asking for the
  common one by name.
"""

import asyncio
from collections.abc import Callable, Mapping, Sequence
from datetime import datetime, timedelta
from typing import Final, Protocol
from uuid import UUID

import msgspec
from attrs import field, frozen

from kvmsec.errors import KvmsecError, NoCluster, NotMaster
from kvmsec.linux.errors import Fault
from kvmsec.model.cluster import Cluster
from kvmsec.pki.certificates import (
    CERTLESS_SERVER_NAME,
    facts_of,
    fingerprint_of,
    make_certless_pair,
)
from kvmsec.pki.errors import PkiError
from kvmsec.pki.files import KeyFiles
from kvmsec.pki.pems import Pair
from kvmsec.pki.private_files import read_private
from kvmsec.pki.sealing import open_sealed, seal
from kvmsec.store import Store

SHORTEST: Final = timedelta(minutes=10)
LONGEST: Final = timedelta(hours=24)
"""Long enough to carry a file to a far node, short enough to be over by the next day."""

CERTLESS_FILE: Final = "certless.pem"

_REMOVED: Final = "it is removed; hand it out again with `kvmsec cluster certless enable`"


class BadDuration(KvmsecError):
    """A time that the last resort may not last."""

    def __init__(self, found: timedelta) -> None:
        super().__init__(
            f"the cluster can't run without client certificates for {found}",
            hint="from 10m to 24h; run the command again before it ends, if it must last longer",
        )
        self.found = found


class BadBundle(KvmsecError):
    """A sealed file that holds no common pair for this node."""

    def __init__(self, reason: str) -> None:
        super().__init__(
            f"the file can't be installed: {reason}",
            hint="write a new one on the master: `kvmsec cluster certless enable --bundle FILE`",
        )
        self.reason = reason


class CertlessNode(Protocol):
    """The part of a node that the last resort needs. Calls raise a Fault."""

    @property
    def name(self) -> str: ...

    @property
    def uuid(self) -> UUID: ...

    async def put_file(self, name: str, content: str | None) -> None:
        """Put `certless.pem` in place, or remove it (None), called through whichever pair works."""


@frozen(kw_only=True)
class Handed:
    """What became of the common pair: who has it, or has no more, and whom it did not reach."""

    fingerprint: str | None
    until: datetime | None
    done: tuple[str, ...]
    missed: Mapping[str, str]
    bundle: bytes | None = field(default=None, repr=False)


class _Bundle(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What is sealed: for which cluster the pair is."""

    cluster: UUID
    pair: str


Log = Callable[[str], None]


async def enable(
    store: Store,
    nodes: Sequence[CertlessNode],
    own_uuid: UUID,
    lasts: timedelta,
    *,
    now: datetime,
    log: Log,
    passphrase: str | None = None,
) -> Handed:
    """Mint a common pair and hand it out; with a passphrase it is sealed to be carried as well.

    A pair that was handed out before is replaced. Raises BadDuration, NoCluster, NotMaster,
    ValueError for a passphrase that is too short; a node that it did not reach is in the answer.
    """
    if not SHORTEST <= lasts <= LONGEST:
        raise BadDuration(lasts)
    cluster = _require_master(store, own_uuid)
    pair = make_certless_pair(cluster.name, now=now, lifetime=lasts)
    fingerprint = fingerprint_of(pair.certificate_pem)
    until = facts_of(pair.certificate_pem).not_after
    bundle = None
    if passphrase is not None:
        document = msgspec.json.encode(_Bundle(cluster=cluster.uuid, pair=pair.pem))
        bundle = seal(document, passphrase)
        log(f"sealed the common certificate {fingerprint} to be carried by hand")
    log(f"the cluster runs without client certificates until {until.isoformat()} ({fingerprint})")
    done, missed = await _put(nodes, pair.pem, log)
    return Handed(fingerprint=fingerprint, until=until, done=done, missed=missed, bundle=bundle)


async def disable(
    store: Store, nodes: Sequence[CertlessNode], own_uuid: UUID, *, log: Log
) -> Handed:
    """End it before its time; a node that is not reached keeps the pair until its end.

    Raises NoCluster and NotMaster.
    """
    _require_master(store, own_uuid)
    log("the cluster runs with client certificates again")
    # The master last: the others may be reached by the common pair alone.
    others = [node for node in nodes if node.uuid != own_uuid]
    done, missed = await _put(others, None, log)
    own, own_missed = await _put([node for node in nodes if node.uuid == own_uuid], None, log)
    return Handed(fingerprint=None, until=None, done=done + own, missed={**missed, **own_missed})


def open_bundle(sealed: bytes, passphrase: str, *, cluster: UUID | None, now: datetime) -> Pair:
    """The common pair in a sealed file, for a node of `cluster` (None: it does not know its own).

    Raises SealBroken, WrongPassphrase, BadBundle and BadPem.
    """
    try:
        bundle = msgspec.json.decode(open_sealed(sealed, passphrase), type=_Bundle)
    except msgspec.MsgspecError:
        raise BadBundle("it was sealed for something else") from None
    if cluster is not None and bundle.cluster != cluster:
        raise BadBundle(f"it is for the cluster {bundle.cluster}, this node is of {cluster}")
    pair = Pair.parse(bundle.pair, "the common pair")
    facts = facts_of(pair.certificate_pem)
    if not facts.not_before <= now <= facts.not_after:
        raise BadBundle(
            f"it is valid from {facts.not_before.isoformat()} to {facts.not_after.isoformat()}, "
            f"and here it is {now.isoformat(timespec='seconds')}"
        )
    return pair


def remove_expired(keys: KeyFiles, now: datetime, log: Log) -> bool:
    """Remove a common pair that is over, for whoever looks after a node; returns whether it was.

    It counts for nothing from its end on, removed or not. One that is not valid yet stays: this
    node's clock may be behind. One that can't be read is removed. Raises NotRoot.
    """
    try:
        text = read_private(keys.directory / CERTLESS_FILE, hint=_REMOVED)
        if text is None:
            return False
        pair = Pair.parse(text, CERTLESS_FILE)
        if now <= facts_of(pair.certificate_pem).not_after:
            return False
        why = "is over"
    except PkiError as error:
        why = f"can't be used: {error.message}"
    keys.put(CERTLESS_FILE, None)
    log(f"{CERTLESS_FILE} was removed: it {why}")
    return True


# How a node behaves while it holds one ---------------------------------------------------------


@frozen
class Way:
    """One way to call a node; `server_name` is what is asked for by SNI, None for nothing."""

    pair: Pair
    server_name: str | None = None


def ways_to_call(own: Pair | None, common: Pair | None) -> tuple[Way, ...]:
    """How to call, the first that is not refused; `own` is None where it can't be used."""
    ways = [] if own is None else [Way(own)]
    if common is not None:
        ways.append(Way(common, CERTLESS_SERVER_NAME))
    return tuple(ways)


def pair_to_serve(own: Pair | None, common: Pair | None, server_name: str | None) -> Pair | None:
    """What to show to a caller that asked for `server_name`; None when there is nothing."""
    if common is not None and (own is None or server_name == CERTLESS_SERVER_NAME):
        return common
    return own


# Handing out -----------------------------------------------------------------------------------


def _require_master(store: Store, own_uuid: UUID) -> Cluster:
    cluster, _ = store.load()
    if cluster is None:
        raise NoCluster
    if cluster.master != own_uuid:
        raise NotMaster(cluster.master_member.name)
    return cluster


async def _put(
    nodes: Sequence[CertlessNode], content: str | None, log: Log
) -> tuple[tuple[str, ...], dict[str, str]]:
    outcomes = await asyncio.gather(
        *(node.put_file(CERTLESS_FILE, content) for node in nodes), return_exceptions=True
    )
    done: list[str] = []
    missed: dict[str, str] = {}
    what = "removed from" if content is None else "handed to"
    for node, outcome in zip(nodes, outcomes, strict=True):
        if isinstance(outcome, Fault):
            missed[node.name] = outcome.message
            log(f"the common certificate could not be {what} {node.name}: {outcome.message}")
        elif isinstance(outcome, BaseException):
            raise outcome
        else:
            done.append(node.name)
            log(f"the common certificate was {what} {node.name}")
    return tuple(done), missed
