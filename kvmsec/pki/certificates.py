"""Certificates: made, signed, and read (X.509v3, RFC 5280)."""

import hashlib
from datetime import datetime, timedelta
from typing import Final
from uuid import UUID

from attrs import field, frozen
from cryptography import x509
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives import serialization

from kvmsec.model.names import require_name
from kvmsec.pki.errors import BadLifetime, BadPem, RequestRefused
from kvmsec.pki.issuing import (
    MOST_CN,
    authority_builder,
    days,
    digest_for,
    leaf_builder,
    sign,
    subject_of,
    whole_seconds,
)
from kvmsec.pki.keys import (
    KeyKind,
    PublicKey,
    dump_key,
    kind_of,
    load_key,
    make_key,
    public_bytes,
)
from kvmsec.pki.pems import CERTIFICATE_LABEL, Pair, label_of, split_pems
from kvmsec.pki.unreadable import UNREADABLE

__all__ = ["Pair", "split_pems"]

CLOCK_BACK: Final = timedelta(minutes=5)
"""How long before it was made a certificate is valid: clocks of nodes differ."""
CLUSTER_DAYS: Final = 3650
NODE_DAYS: Final = 1825
CERTLESS_MARK: Final = "kvmsec:certless"
"""The URI (SAN) that tells the common certificate of the last resort from a node's."""
CERTLESS_MOST: Final = timedelta(days=7)

CERTLESS_SERVER_NAME: Final = "certless.kvmsec.invalid"
"""What a caller asks for (SNI, RFC 6066 3) to be shown the common certificate. RFC 2606 keeps
`.invalid` from ever being a node's name."""

_MOST_ANCHORS: Final = 2  # Before and after a renewal.


@frozen
class Request:
    """A new key and the request (PKCS #10) for its certificate. The key is never shown."""

    key_pem: str = field(repr=False)
    request_pem: str


@frozen
class CertificateFacts:
    """What a certificate says of itself; whether that is true is for `judgement` to say."""

    fingerprint: str
    subject: str
    names: tuple[str, ...]
    not_before: datetime
    not_after: datetime


def make_cluster_pair(
    name: str,
    uuid: UUID,
    *,
    kind: KeyKind = KeyKind.ED25519,
    now: datetime,
    lifetime_days: int = CLUSTER_DAYS,
) -> Pair:
    """The trust anchor of a cluster and its key, which signs the nodes' certificates.

    Raises BadName and BadLifetime.
    """
    require_name("a cluster", name)
    key = make_key(kind)
    made_at = whole_seconds(now)
    builder = authority_builder(
        subject_of(name), key.public_key(), made_at - CLOCK_BACK, made_at + days(lifetime_days)
    ).add_extension(_uri(uuid.urn), critical=False)
    return Pair(sign(builder, key), dump_key(key))


def make_request(node_name: str, node_uuid: UUID, *, kind: KeyKind = KeyKind.ED25519) -> Request:
    """A new key for a node, and the request for its certificate. Raises BadName."""
    key_pem = dump_key(make_key(kind))
    return Request(key_pem, request_for(key_pem, node_name, node_uuid))


def request_for(key_pem: str, node_name: str, node_uuid: UUID) -> str:
    """The request for a certificate of a key that there is already. Raises BadName and BadPem."""
    require_name("a node", node_name)
    key = load_key(key_pem)
    builder = (
        x509.CertificateSigningRequestBuilder()
        .subject_name(_node_subject(node_name, node_uuid))
        .add_extension(_node_names(node_name, node_uuid), critical=False)
    )
    request = builder.sign(key, digest_for(key))
    return request.public_bytes(serialization.Encoding.PEM).decode("ascii")


def sign_request(
    cluster: Pair,
    request_pem: str,
    *,
    node_name: str,
    node_uuid: UUID,
    now: datetime,
    lifetime_days: int = NODE_DAYS,
) -> str:
    """The certificate (PEM) of a node's key, signed by the cluster's.

    The names are the caller's; of the request only its key counts, which the request's signature
    shows to be the sender's. It ends with the cluster's certificate at the latest. Raises
    RequestRefused, BadName, BadLifetime, and BadPem for the cluster's pair.
    """
    require_name("a node", node_name)
    key = load_key(cluster.key_pem, "server.key")
    anchor = load_certificate(cluster.certificate_pem, "server.pem")
    public = _key_of_request(request_pem)
    if public_bytes(public) == public_bytes(key.public_key()):
        raise RequestRefused("its key is the cluster's own")
    made_at = whole_seconds(now)
    if anchor.not_valid_after_utc <= made_at:
        hint = "renew it with `kvmsec cluster renew-crypto --new-cluster-certificate`"
        raise BadPem("server.pem", "it has expired", hint=hint)
    ends = min(made_at + days(lifetime_days), anchor.not_valid_after_utc)
    subject = _node_subject(node_name, node_uuid)
    builder = (
        leaf_builder(subject, public, made_at - CLOCK_BACK, ends)
        .issuer_name(anchor.subject)
        .add_extension(_authority(anchor), critical=False)
        .add_extension(_node_names(node_name, node_uuid), critical=False)
    )
    return sign(builder, key)


def make_certless_pair(cluster_name: str, *, now: datetime, lifetime: timedelta) -> Pair:
    """The common pair of the last resort: self-signed, marked, never with the cluster's key.

    It lasts at most a week. Raises BadName and BadLifetime.
    """
    require_name("a cluster", cluster_name)
    if not timedelta(0) < lifetime <= CERTLESS_MOST:
        raise BadLifetime("the common certificate", f"up to {CERTLESS_MOST.days} days")
    key = make_key()
    made_at = whole_seconds(now)
    # With the cluster's own subject OpenSSL would take it for a certificate of the cluster's.
    subject = subject_of(cluster_name, unit="without client certificates")
    builder = (
        leaf_builder(subject, key.public_key(), made_at - CLOCK_BACK, made_at + lifetime)
        .issuer_name(subject)
        .add_extension(_uri(CERTLESS_MARK), critical=False)
    )
    return Pair(sign(builder, key), dump_key(key))


def load_certificate(pem_or_der: str | bytes, what: str = "the certificate") -> x509.Certificate:
    """Parse one certificate, PEM or DER. Raises BadPem."""
    try:
        if isinstance(pem_or_der, bytes):
            return x509.load_der_x509_certificate(pem_or_der)
        blocks = split_pems(pem_or_der, what)
        if len(blocks) != 1 or label_of(blocks[0]) != CERTIFICATE_LABEL:
            raise BadPem(what, "it is not one certificate in PEM")
        return x509.load_pem_x509_certificate(blocks[0].encode())
    except UNREADABLE as error:
        raise BadPem(what, f"it is no X.509 certificate ({error})") from None


def der_of(pem: str, what: str = "the certificate") -> bytes:
    """The DER of a certificate. Raises BadPem."""
    return load_certificate(pem, what).public_bytes(serialization.Encoding.DER)


def anchors_of(text: str, what: str = "server.pem") -> tuple[bytes, ...]:
    """The DER of each trust anchor in a text: one, or two during a renewal. Raises BadPem."""
    blocks = split_pems(text, what)
    if len(blocks) > _MOST_ANCHORS:
        raise BadPem(what, f"it has {len(blocks)} certificates, more than {_MOST_ANCHORS}")
    return tuple(der_of(block, what) for block in blocks)


def fingerprint_of(pem_or_der: str | bytes) -> str:
    """SHA-256 of a certificate's DER, 64 hex digits in lower case. Raises BadPem.

    Bytes are taken as they came over the wire, whatever they are.
    """
    der = der_of(pem_or_der) if isinstance(pem_or_der, str) else pem_or_der
    return hashlib.sha256(der).hexdigest()


def facts_of(pem: str) -> CertificateFacts:
    """What a certificate says. Raises BadPem."""
    certificate = load_certificate(pem)
    try:
        names = tuple(str(name.value) for name in names_of(certificate))
        subject = certificate.subject.rfc4514_string()
    except UNREADABLE as error:
        raise BadPem("the certificate", str(error)) from None
    return CertificateFacts(
        fingerprint=fingerprint_of(certificate.public_bytes(serialization.Encoding.DER)),
        subject=subject,
        names=names,
        not_before=certificate.not_valid_before_utc,
        not_after=certificate.not_valid_after_utc,
    )


def names_of(certificate: x509.Certificate) -> tuple[x509.GeneralName, ...]:
    """The subject's alternative names; none where there is none. Raises UNREADABLE."""
    try:
        return tuple(
            certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
        )
    except x509.ExtensionNotFound:
        return ()


def public_key_of(certificate: x509.Certificate, what: str = "the certificate") -> PublicKey:
    """The key that a certificate is for. Raises BadPem for one that no node may have."""
    try:
        key = certificate.public_key()
        kind_of(key)
    except UNREADABLE as error:
        raise BadPem(what, str(error)) from None
    assert isinstance(key, PublicKey)
    return key


def require_whole(pair: Pair, what: str = "the pair") -> Pair:
    """The pair itself, if its key belongs to its certificate. Raises BadPem."""
    public = public_key_of(load_certificate(pair.certificate_pem, what), what)
    key = load_key(pair.key_pem, what)
    if public_bytes(public) != public_bytes(key.public_key()):
        raise BadPem(what, "its key does not belong to its certificate")
    return pair


def _key_of_request(request_pem: str) -> PublicKey:
    try:
        (block,) = split_pems(request_pem, "the request")
        request = x509.load_pem_x509_csr(block.encode())
        is_theirs = request.is_signature_valid
        key = request.public_key()
        kind_of(key)
    except BadPem as error:
        raise RequestRefused(error.reason) from None
    except InvalidSignature:
        is_theirs = False
    except UNREADABLE as error:
        words = str(error) if str(error).startswith("its ") else "it is no whole PKCS #10 request"
        raise RequestRefused(words) from None
    if not is_theirs:
        raise RequestRefused("it is not signed with the key that it is for")
    assert isinstance(key, PublicKey)
    return key


def _node_subject(name: str, uuid: UUID) -> x509.Name:
    """A host's name may be longer than a common name: the uuid stands in then."""
    return subject_of(name if len(name) <= MOST_CN else str(uuid))


def _node_names(name: str, uuid: UUID) -> x509.SubjectAlternativeName:
    return x509.SubjectAlternativeName(
        [x509.DNSName(name), x509.UniformResourceIdentifier(uuid.urn)]
    )


def _uri(uri: str) -> x509.SubjectAlternativeName:
    return x509.SubjectAlternativeName([x509.UniformResourceIdentifier(uri)])


def _authority(anchor: x509.Certificate) -> x509.AuthorityKeyIdentifier:
    """The anchor's own key identifier, however whoever made it has derived it."""
    try:
        identifier = anchor.extensions.get_extension_for_class(x509.SubjectKeyIdentifier).value
    except x509.ExtensionNotFound:
        key = anchor.public_key()
        assert isinstance(key, PublicKey)
        return x509.AuthorityKeyIdentifier.from_issuer_public_key(key)
    return x509.AuthorityKeyIdentifier.from_issuer_subject_key_identifier(identifier)
