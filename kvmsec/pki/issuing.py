"""The two shapes of certificate that there are: one that signs nodes, and a node's."""

import secrets
from datetime import UTC, datetime, timedelta
from typing import Final

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from kvmsec.pki.errors import BadLifetime
from kvmsec.pki.keys import KeyKind, PrivateKey, PublicKey, kind_of

MOST_CN: Final = 64
"""ub-common-name, RFC 5280 appendix A.1"""

_SERIAL_BITS: Final = 159  # The most that RFC 5280 4.1.2.2 has room for in 20 positive octets.
_MOST_DAYS: Final = 36500
_USAGES: Final = (ExtendedKeyUsageOID.SERVER_AUTH, ExtendedKeyUsageOID.CLIENT_AUTH)


def subject_of(name: str, *, unit: str | None = None) -> x509.Name:
    attributes = [x509.NameAttribute(NameOID.COMMON_NAME, name)]
    if unit is not None:
        attributes.insert(0, x509.NameAttribute(NameOID.ORGANIZATIONAL_UNIT_NAME, unit))
    return x509.Name(attributes)


def authority_builder(
    subject: x509.Name, key: PublicKey, starts: datetime, ends: datetime
) -> x509.CertificateBuilder:
    """A self-signed certificate that signs others, which sign none themselves."""
    return (
        _builder(subject, key, starts, ends)
        .issuer_name(subject)
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .add_extension(_usage(signs_certificates=True), critical=True)
    )


def leaf_builder(
    subject: x509.Name, key: PublicKey, starts: datetime, ends: datetime
) -> x509.CertificateBuilder:
    """A certificate that serves and calls, and signs no other; its issuer is still to be said."""
    return (
        _builder(subject, key, starts, ends)
        .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
        .add_extension(_usage(signs_certificates=False), critical=True)
        .add_extension(x509.ExtendedKeyUsage(_USAGES), critical=False)
    )


def sign(builder: x509.CertificateBuilder, key: PrivateKey) -> str:
    """The certificate in PEM."""
    return builder.sign(key, digest_for(key)).public_bytes(serialization.Encoding.PEM).decode()


def digest_for(key: PrivateKey) -> hashes.SHA256 | None:
    """Ed25519 brings its own."""
    return None if kind_of(key.public_key()) is KeyKind.ED25519 else hashes.SHA256()


def whole_seconds(now: datetime) -> datetime:
    """Certificates count no less. Raises ValueError for a time without a zone."""
    if now.tzinfo is None:
        raise ValueError("a time for a certificate needs a time zone")
    return now.astimezone(UTC).replace(microsecond=0)


def days(count: int) -> timedelta:
    """So many days. Raises BadLifetime."""
    if not 1 <= count <= _MOST_DAYS:
        raise BadLifetime("a certificate", f"1 to {_MOST_DAYS} days")
    return timedelta(days=count)


def _builder(
    subject: x509.Name, key: PublicKey, starts: datetime, ends: datetime
) -> x509.CertificateBuilder:
    return (
        x509.CertificateBuilder()
        .subject_name(subject)
        .public_key(key)
        .serial_number(secrets.randbits(_SERIAL_BITS) or 1)
        .not_valid_before(starts)
        .not_valid_after(ends)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key), critical=False)
    )


def _usage(*, signs_certificates: bool) -> x509.KeyUsage:
    return x509.KeyUsage(
        digital_signature=not signs_certificates,
        content_commitment=False,
        key_encipherment=False,
        data_encipherment=False,
        key_agreement=False,
        key_cert_sign=signs_certificates,
        crl_sign=False,
        encipher_only=False,
        decipher_only=False,
    )
