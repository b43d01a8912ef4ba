"""Who a peer is and what it may do, told from its certificate. Pure: no clock, no file.

Name, chain, validity, fingerprint, role: the first that fails is the answer. TLS has proved that
the peer holds the certificate's key, and has checked the chain by OpenSSL's rules; here all of it
is checked again by this cluster's, for each request.
"""

from datetime import datetime, timedelta
from typing import Final
from uuid import UUID

from cryptography import x509

from kvmsec.errors import BadName
from kvmsec.model.names import require_name
from kvmsec.pki.certificates import CERTLESS_MARK, fingerprint_of, names_of
from kvmsec.pki.chain import anchor_of, require_own_signature
from kvmsec.pki.errors import PeerRefused, Step
from kvmsec.pki.standing import Peer, Trust, judge_standing, require_member, require_orderer
from kvmsec.pki.unreadable import UNREADABLE

__all__ = ["Peer", "PeerRefused", "Step", "Trust", "require_orderer"]

SKEW: Final = timedelta(seconds=150)
"""How far two nodes' clocks may differ, as the reference has it."""

_MOST_DER: Final = 1 << 14
_URN: Final = "urn:uuid:"
_CERTLESS_NAME: Final = "a node without a client certificate"


def judge(der: bytes, trust: Trust, now: datetime) -> Peer:
    """The member of the cluster that a certificate is of; one that may not order passes as well.

    Whoever acts on an order asks `judge_orderer` instead. Raises PeerRefused.
    """
    certificate = _parsed(der)
    name, uuid = _names_in(certificate)
    if uuid is None:
        require_own_signature(certificate)
        # It was to end at that time: no allowance.
        _require_valid(certificate, now, timedelta(0), "the common certificate")
    else:
        require_member(name, uuid, trust)
        anchor = anchor_of(certificate, trust.anchors)
        _require_valid(certificate, now, SKEW, f"the certificate of {name}")
        _require_valid(anchor, now, SKEW, "the cluster's certificate")
    return judge_standing(name, uuid, fingerprint_of(der), trust)


def judge_orderer(der: bytes, trust: Trust, now: datetime) -> Peer:
    """Like `judge`, for an order: only a master candidate passes. Raises PeerRefused."""
    return require_orderer(judge(der, trust, now))


def require_node(der: bytes, trust: Trust, *, name: str, uuid: UUID, now: datetime) -> Peer:
    """What a caller asks of the node that it reached: that it is the one it meant to reach.

    The common certificate of the last resort names no node: it passes for each. Raises PeerRefused.
    """
    found, found_uuid = _names_in(_parsed(der))
    if found_uuid is not None and (found, found_uuid) != (name, uuid):
        raise PeerRefused(
            Step.NAME, f"{found} ({found_uuid}) answered where {name} ({uuid}) was called"
        )
    return judge(der, trust, now)


def _parsed(der: bytes) -> x509.Certificate:
    if not der:
        raise PeerRefused(Step.NAME, "it has shown no certificate")
    if len(der) > _MOST_DER:
        raise PeerRefused(Step.NAME, f"its certificate is larger than {_MOST_DER} bytes")
    try:
        return x509.load_der_x509_certificate(der)
    except UNREADABLE:
        raise PeerRefused(Step.NAME, "it has shown no X.509 certificate") from None


def _names_in(certificate: x509.Certificate) -> tuple[str, UUID | None]:
    """The one name and the one uuid in a certificate; no uuid where it is the common one."""
    try:
        names = names_of(certificate)
    except UNREADABLE:
        raise PeerRefused(Step.NAME, "the names in its certificate can't be read") from None
    hosts = [name.value for name in names if isinstance(name, x509.DNSName)]
    uris = [name.value for name in names if isinstance(name, x509.UniformResourceIdentifier)]
    if uris == [CERTLESS_MARK] and len(names) == 1:
        return _CERTLESS_NAME, None
    if len(names) != 2 or len(hosts) != 1 or len(uris) != 1:
        raise PeerRefused(
            Step.NAME,
            "its certificate does not name one node: one DNS name and one urn:uuid, "
            f"but {len(hosts)} and {len(uris)} among {len(names)} names",
        )
    return _host(hosts[0]), _uuid(uris[0])


def _host(name: str) -> str:
    try:
        return require_name("a node", name)
    except BadName as error:
        raise PeerRefused(Step.NAME, error.message) from None


def _uuid(uri: str) -> UUID:
    """RFC 9562 writes it in lower case; what else UUID() takes is nobody's spelling of a node."""
    try:
        uuid = UUID(uri.removeprefix(_URN))
    except ValueError:
        uuid = None
    if uuid is None or uuid.urn != uri.lower():
        raise PeerRefused(Step.NAME, f"its certificate has no uuid of a node but {uri}")
    return uuid


def _require_valid(
    certificate: x509.Certificate, now: datetime, skew: timedelta, what: str
) -> None:
    starts, ends = certificate.not_valid_before_utc, certificate.not_valid_after_utc
    if now + skew < starts:
        raise PeerRefused(
            Step.VALIDITY, f"{what} is valid from {starts.isoformat()}, and it is {_shown(now)}"
        )
    if now - skew > ends:
        raise PeerRefused(
            Step.VALIDITY, f"{what} has expired at {ends.isoformat()}, and it is {_shown(now)}"
        )


def _shown(now: datetime) -> str:
    return now.isoformat(timespec="seconds")
