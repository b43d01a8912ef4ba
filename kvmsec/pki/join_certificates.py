"""The temporary certificates of a join, signed with what the token's secret gives.

The clock of a new node is often wrong. What ends is the invitation, not these certificates.
"""

from datetime import UTC, datetime
from typing import Final

from cryptography.hazmat.primitives.asymmetric import ed25519

from kvmsec.pki.issuing import authority_builder, leaf_builder, sign, subject_of
from kvmsec.pki.joining import Purpose, derived
from kvmsec.pki.keys import dump_key, make_key
from kvmsec.pki.pems import Pair

_FROM: Final = datetime(2000, 1, 1, tzinfo=UTC)
_TO: Final = datetime(9999, 12, 31, 23, 59, 59, tzinfo=UTC)  # "no end", RFC 5280 4.1.2.5
_AUTHORITY: Final = "kvmsec join authority"


def join_anchor(secret: bytes) -> str:
    """The temporary authority (PEM) of a join: each side makes it, with the same key."""
    key = _authority_key(secret)
    return sign(authority_builder(subject_of(_AUTHORITY), key.public_key(), _FROM, _TO), key)


def make_joining_pair(secret: bytes) -> Pair:
    """A new temporary pair for one side of a join: only who knows the secret can make one."""
    key = make_key()
    builder = leaf_builder(subject_of("kvmsec joining"), key.public_key(), _FROM, _TO)
    issued = builder.issuer_name(subject_of(_AUTHORITY))
    return Pair(sign(issued, _authority_key(secret)), dump_key(key))


def _authority_key(secret: bytes) -> ed25519.Ed25519PrivateKey:
    seed = derived(secret, Purpose.AUTHORITY)
    return ed25519.Ed25519PrivateKey.from_private_bytes(seed)
