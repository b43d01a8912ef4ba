"""What a name and a fingerprint are worth: who is a member, and who may order.

The part of `judgement` that needs no certificate, so that whoever gets a peer's name and
fingerprint from somebody else can ask its own list again. Pure: no clock, no file.
"""

import hmac
from collections.abc import Iterable, Mapping
from uuid import UUID

from attrs import field, frozen

from kvmsec.pki.errors import NobodyListed, PeerRefused, Step


@frozen(kw_only=True)
class Trust:
    """Whom this node trusts.

    `anchors` are DER; `members` has the name of each node's uuid, `candidates` the fingerprints of
    those that may order. `certless` is the fingerprint of the common certificate while it is valid.
    `certificates` has those that the state has of each member: a plain node shows one of them. One
    that the state has none of is asked for an anchor's signature alone.
    """

    anchors: tuple[bytes, ...]
    members: Mapping[UUID, str]
    candidates: Mapping[UUID, frozenset[str]]
    certless: str | None = None
    certificates: Mapping[UUID, frozenset[str]] = field(factory=dict)


@frozen(kw_only=True)
class Peer:
    """Who is at the other end; `uuid` is None where it came with the common certificate."""

    name: str
    uuid: UUID | None
    fingerprint: str
    may_order: bool


def judge_standing(name: str, uuid: UUID | None, fingerprint: str, trust: Trust) -> Peer:
    """What a peer may do whose certificate was found good: the steps name, fingerprint and role.

    Raises PeerRefused. Never take `name`, `uuid` and `fingerprint` from the peer's own words.
    """
    if uuid is None:
        _require_certless(fingerprint, trust)
        return Peer(name=name, uuid=None, fingerprint=fingerprint, may_order=True)
    require_member(name, uuid, trust)
    if not trust.candidates:
        raise NobodyListed
    is_candidate = uuid in trust.candidates
    if is_candidate and not is_among(fingerprint, trust.candidates[uuid]):
        raise PeerRefused(
            Step.FINGERPRINT, f"the list has another certificate for {name} than {fingerprint}"
        )
    known = trust.certificates.get(uuid)
    if not is_candidate and known and not is_among(fingerprint, known):
        raise PeerRefused(
            Step.FINGERPRINT,
            f"the cluster's state has another certificate for {name} than {fingerprint}",
        )
    for other, fingerprints in trust.candidates.items():
        if other != uuid and is_among(fingerprint, fingerprints):
            owner = trust.members.get(other, str(other))
            raise PeerRefused(
                Step.FINGERPRINT, f"the list has the certificate of {name} under {owner}"
            )
    return Peer(name=name, uuid=uuid, fingerprint=fingerprint, may_order=is_candidate)


def require_orderer(peer: Peer) -> Peer:
    """The peer itself, if it may order. Raises PeerRefused (step role)."""
    if not peer.may_order:
        raise PeerRefused(Step.ROLE, f"{peer.name} is no master candidate")
    return peer


def require_member(name: str, uuid: UUID, trust: Trust) -> None:
    """Refuse a name and a uuid that the cluster's state does not have together: step name."""
    member = trust.members.get(uuid)
    if member is None:
        raise PeerRefused(Step.NAME, f"the cluster has no node with the uuid {uuid} ({name})")
    if member != name:
        raise PeerRefused(Step.NAME, f"the uuid {uuid} is the node {member}'s, not {name}'s")


def is_among(fingerprint: str, fingerprints: Iterable[str]) -> bool:
    """Whether a fingerprint is one of these, compared in constant time.

    All are looked at, so that the time does not tell which one was met.
    """
    given = fingerprint.encode()
    found = False
    for one in fingerprints:
        found |= hmac.compare_digest(given, one.encode())
    return found


def _require_certless(fingerprint: str, trust: Trust) -> None:
    if trust.certless is None:
        raise PeerRefused(
            Step.FINGERPRINT, "this node does not run without client certificates, or no more"
        )
    if not is_among(fingerprint, (trust.certless,)):
        raise PeerRefused(
            Step.FINGERPRINT, f"{fingerprint} is not the common certificate that this node has"
        )
