"""Whether a certificate was signed by a trust anchor, and may be used as a node's.

The rules are the cluster's: an anchor signs nodes directly, so a chain is two certificates long.
"""

from collections.abc import Callable, Iterable
from typing import Final, TypeVar

from cryptography import x509
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives import hashes
from cryptography.x509.oid import ExtendedKeyUsageOID

from kvmsec.pki.errors import PeerRefused, Step
from kvmsec.pki.keys import kind_of
from kvmsec.pki.unreadable import UNREADABLE

_Extension = TypeVar("_Extension", bound=x509.ExtensionType)

_USAGES: Final = (ExtendedKeyUsageOID.SERVER_AUTH, ExtendedKeyUsageOID.CLIENT_AUTH)
_DIGESTS: Final = (hashes.SHA256, hashes.SHA384, hashes.SHA512)
# Any other critical extension says something that nobody here would heed (RFC 5280 4.2).
_KNOWN: Final = (
    x509.BasicConstraints,
    x509.KeyUsage,
    x509.ExtendedKeyUsage,
    x509.SubjectAlternativeName,
    x509.SubjectKeyIdentifier,
    x509.AuthorityKeyIdentifier,
)


def anchor_of(certificate: x509.Certificate, anchors: Iterable[bytes]) -> x509.Certificate:
    """The anchor that has signed a node's certificate. Raises PeerRefused (step chain)."""
    _require_rules(certificate, "its certificate", _leaf_faults)
    for der in anchors:
        anchor = _anchor(der)
        if _is_signed_by(certificate, anchor):
            _require_rules(anchor, "the cluster's certificate", _anchor_faults)
            return anchor
    raise PeerRefused(Step.CHAIN, "its certificate is not signed by this cluster's certificate")


def require_own_signature(certificate: x509.Certificate) -> None:
    """Hold a self-signed node's certificate to the same rules. Raises PeerRefused (step chain)."""
    _require_rules(certificate, "its certificate", _leaf_faults)
    if not _is_signed_by(certificate, certificate):
        raise PeerRefused(Step.CHAIN, "the common certificate is not signed with its own key")


def _anchor(der: bytes) -> x509.Certificate:
    try:
        return x509.load_der_x509_certificate(der)
    except UNREADABLE:
        raise PeerRefused(Step.CHAIN, "this node's own server.pem can't be read") from None


def _is_signed_by(certificate: x509.Certificate, issuer: x509.Certificate) -> bool:
    try:
        certificate.verify_directly_issued_by(issuer)
    except (InvalidSignature, *UNREADABLE):
        return False
    return True


def _require_rules(
    certificate: x509.Certificate,
    what: str,
    faults: Callable[[x509.Certificate], str | None],
) -> None:
    try:
        fault = _own_faults(certificate) or faults(certificate)
    except UNREADABLE:
        fault = "has an extension that can't be read"
    if fault is not None:
        raise PeerRefused(Step.CHAIN, f"{what} {fault}")


def _own_faults(certificate: x509.Certificate) -> str | None:
    try:
        kind_of(certificate.public_key())
    except ValueError as error:
        return f"is refused: {error}"
    digest = certificate.signature_hash_algorithm  # None: Ed25519, which brings its own
    if digest is not None and not isinstance(digest, _DIGESTS):
        return f"is signed with {digest.name}"
    for extension in certificate.extensions:
        if extension.critical and not isinstance(extension.value, _KNOWN):
            return f"has a critical extension that is not known ({extension.oid.dotted_string})"
    return None


def _leaf_faults(certificate: x509.Certificate) -> str | None:
    basic = _extension(certificate, x509.BasicConstraints)
    if basic is not None and basic.ca:
        return "may sign others, which a node's may not"
    usage = _extension(certificate, x509.KeyUsage)
    if usage is not None and not usage.digital_signature:
        return "may not be used to sign a handshake (key usage)"
    if usage is not None and usage.key_cert_sign:
        return "may sign others (key usage), which a node's may not"
    purposes = _extension(certificate, x509.ExtendedKeyUsage)
    if purposes is None or not all(one in purposes for one in _USAGES):
        return "is not for servers and clients (extended key usage)"
    return None


def _anchor_faults(certificate: x509.Certificate) -> str | None:
    basic = _extension(certificate, x509.BasicConstraints)
    if basic is None or not basic.ca:
        return "may not sign others (basic constraints)"
    usage = _extension(certificate, x509.KeyUsage)
    if usage is not None and not usage.key_cert_sign:
        return "may not sign others (key usage)"
    return None


def _extension(certificate: x509.Certificate, kind: type[_Extension]) -> _Extension | None:
    try:
        return certificate.extensions.get_extension_for_class(kind).value
    except x509.ExtensionNotFound:
        return None
