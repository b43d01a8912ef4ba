"""How a node and a cluster come to know each other: the join token and what is derived from it.

The token goes from the master to the new node by an admin's hand. It holds a secret of 128 bits
and the fingerprint of the cluster's certificate. From the secret both sides derive the same
temporary authority; each signs itself a temporary certificate with it. So TLS itself refuses, in
the handshake, whoever does not know the secret, and no stranger's request is ever parsed. On top
of it each message of the join carries a proof: HMAC-SHA256, keyed by the secret, over the side and
step, both temporary certificates, and the cluster's. A proof is of no use on another connection,
in the other direction, in another step, or for another cluster.
"""

import base64
import binascii
import hashlib
import hmac
import re
import secrets
from datetime import UTC, datetime, timedelta
from enum import StrEnum
from typing import Final

from attrs import field, frozen

from kvmsec.errors import BadName
from kvmsec.model.names import require_name
from kvmsec.pki.errors import BadLifetime, BadToken

SECRET_BYTES: Final = 16
LIFETIME: Final = timedelta(hours=1)
LONGEST: Final = timedelta(days=7)

_PREFIX: Final = "kvmsec-join-1-"
_MARK: Final = b"kvmsec join 1"
_CHECKSUM_BYTES: Final = 6
_TIME_BYTES: Final = 5
_FIXED_BYTES: Final = SECRET_BYTES + 32 + _TIME_BYTES
_MOST_CHARS: Final = 1024


class JoinRole(StrEnum):
    """Who shows a proof, and in which step; none passes for another."""

    MASTER_HELLO = "master-hello"
    NODE_HELLO = "node-hello"
    MASTER_ADMIT = "master-admit"


class Purpose(StrEnum):
    """What a key that is derived from a token's secret is for."""

    PROOF = "proof"
    AUTHORITY = "authority"


@frozen(kw_only=True)
class Invitation:
    """What a join token says. The secret is never shown."""

    secret: bytes = field(repr=False)
    anchor_fingerprint: str
    node_name: str
    expires_at: datetime

    def is_over(self, now: datetime) -> bool:
        return now >= self.expires_at


def invite(
    node_name: str, anchor_fingerprint: str, *, now: datetime, lifetime: timedelta = LIFETIME
) -> Invitation:
    """A new invitation, of at most a week. Raises BadName and BadLifetime."""
    require_name("a node", node_name)
    if not timedelta(0) < lifetime <= LONGEST:
        raise BadLifetime("an invitation", f"up to {LONGEST.days} days")
    expires_at = (now + lifetime).astimezone(UTC).replace(microsecond=0)
    return Invitation(
        secret=secrets.token_bytes(SECRET_BYTES),
        anchor_fingerprint=anchor_fingerprint,
        node_name=node_name,
        expires_at=expires_at,
    )


def format_token(invitation: Invitation) -> str:
    """The token: one line of letters, digits, `-` and `_`, with a checksum."""
    body = (
        invitation.secret
        + bytes.fromhex(invitation.anchor_fingerprint)
        + int(invitation.expires_at.timestamp()).to_bytes(_TIME_BYTES)
        + invitation.node_name.encode("ascii")
    )
    return _PREFIX + base64.urlsafe_b64encode(body + _checksum(body)).decode().rstrip("=")


def parse_token(text: str) -> Invitation:
    """Read a token as it was typed or pasted. Raises BadToken; its words hold nothing of the token.

    Whether it is over is for `require_current` to say, by the reader's clock.
    """
    token = text.strip()
    if len(token) > _MOST_CHARS or not token.startswith(_PREFIX):
        raise BadToken(f"is none: one begins with {_PREFIX}")
    encoded = token.removeprefix(_PREFIX)
    if re.fullmatch(r"[A-Za-z0-9_-]+", encoded, re.ASCII) is None:
        raise BadToken("has a character that none has, or is broken over several lines")
    try:
        content = base64.urlsafe_b64decode(encoded + "=" * (-len(encoded) % 4))
    except binascii.Error:
        raise BadToken("is mistyped or cut off") from None
    if base64.urlsafe_b64encode(content).decode().rstrip("=") != encoded:
        # The last letter has bits that belong to no byte (RFC 4648, 3.5).
        raise BadToken("is mistyped: its last letter is another")
    body, checksum = content[:-_CHECKSUM_BYTES], content[-_CHECKSUM_BYTES:]
    if len(body) <= _FIXED_BYTES or not hmac.compare_digest(_checksum(body), checksum):
        raise BadToken("is mistyped or cut off: its checksum is wrong")
    return _invitation(body)


def _invitation(body: bytes) -> Invitation:
    secret, rest = body[:SECRET_BYTES], body[SECRET_BYTES:]
    fingerprint, rest = rest[:32], rest[32:]
    seconds, name = int.from_bytes(rest[:_TIME_BYTES]), rest[_TIME_BYTES:]
    try:
        expires_at = datetime.fromtimestamp(seconds, UTC)
        node_name = require_name("a node", name.decode("ascii"))
    except (ValueError, OverflowError, OSError, BadName):
        raise BadToken("names no node or no time, so no kvmsec has made it") from None
    return Invitation(
        secret=secret,
        anchor_fingerprint=fingerprint.hex(),
        node_name=node_name,
        expires_at=expires_at,
    )


def require_current(invitation: Invitation, now: datetime) -> Invitation:
    """The invitation itself, while it has not ended. Raises BadToken."""
    if invitation.is_over(now):
        raise BadToken(
            f"for the node {invitation.node_name} was over at {invitation.expires_at.isoformat()}",
            hint=f"compare the clocks; then run `kvmsec node invite {invitation.node_name}` again",
        )
    return invitation


def proof(
    secret: bytes,
    *,
    role: JoinRole,
    master_fingerprint: str,
    node_fingerprint: str,
    anchor_fingerprint: str,
    said: bytes = b"",
) -> str:
    """The proof that goes with a message of a join: 64 hex digits.

    The first two fingerprints are those of the certificates that TLS has shown, each side's own and
    the other's; `said` is what else the proof is to vouch for, such as the request for a
    certificate.
    """
    message = hashlib.sha256()
    parts = (role.value, master_fingerprint, node_fingerprint, anchor_fingerprint)
    for part in (*(one.encode("ascii") for one in parts), said):
        message.update(len(part).to_bytes(8) + part)  # with its length: none runs into the next
    return hmac.digest(derived(secret, Purpose.PROOF), message.digest(), "sha256").hex()


def check_proof(
    shown: str,
    secret: bytes,
    *,
    role: JoinRole,
    master_fingerprint: str,
    node_fingerprint: str,
    anchor_fingerprint: str,
    said: bytes = b"",
) -> None:
    """Hold a proof against the one that it should be, in constant time. Raises BadToken."""
    wanted = proof(
        secret,
        role=role,
        master_fingerprint=master_fingerprint,
        node_fingerprint=node_fingerprint,
        anchor_fingerprint=anchor_fingerprint,
        said=said,
    )
    if not hmac.compare_digest(shown.encode(), wanted.encode()):
        raise BadToken(
            "is not the one that the other side has, or somebody stands between the two",
            hint="invite the node again with `kvmsec node invite NAME` and carry the token over",
        )


def derived(secret: bytes, purpose: Purpose) -> bytes:
    """32 bytes that only who knows the secret can tell, others for each purpose."""
    if len(secret) != SECRET_BYTES:
        raise ValueError(f"a secret of a join has {SECRET_BYTES} bytes")
    return hmac.digest(secret, _MARK + b" " + purpose.value.encode(), "sha256")


def _checksum(body: bytes) -> bytes:
    return hashlib.sha256(_MARK + b" checksum" + body).digest()[:_CHECKSUM_BYTES]
