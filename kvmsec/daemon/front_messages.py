"""What the root part says to the front and to the courier, beside the calls of nodes.

In the frames and envelopes of `kvmsec.rpc`; these calls are in no table that a node serves.
"""

from typing import Annotated, Final
from uuid import UUID

import msgspec
from msgspec import field

from kvmsec.rpc import messages as m
from kvmsec.rpc.calls import Call


class TrustMessage(m.Message, frozen=True, kw_only=True):
    """What a node serves with and whom it trusts, from now on: see `kvmsec.pki.standing.Trust`.

    `pair` is its key and certificate, `anchors` what a peer's must be signed by, both PEM. While
    the last resort lasts, `common` is the common pair and `certless` its fingerprint; `pair` is the
    common one too where the node's own can't be used. With `is_joining` it belongs to no cluster
    yet, and these are the temporary ones of a join.
    """

    pair: m.Pem
    anchors: m.Pem
    members: dict[UUID, m.Name]
    candidates: dict[UUID, tuple[m.Fingerprint, ...]]
    certificates: dict[UUID, tuple[m.Fingerprint, ...]] = field(default_factory=dict)
    certless: m.Fingerprint | None = None
    common: m.Pem | None = None
    is_joining: bool = False

    def __repr__(self) -> str:
        return "TrustMessage(…)"  # It holds the key.


class PeerMessage(m.Message, frozen=True, kw_only=True):
    """The fingerprint of the certificate that a node has shown to the courier."""

    fingerprint: m.Fingerprint


class RefusalMessage(m.Message, frozen=True, kw_only=True):
    """Somebody whom the front refused (`kvmsec.rpc.refusals.Refusal`)."""

    address: Annotated[str, msgspec.Meta(max_length=256)]
    reason: m.Words
    peer: m.Words | None = None
    call: m.Words | None = None
    more: int = 0


TRUST: Final = Call(
    name="front.trust", request=TrustMessage, response=m.Nothing, timeout_s=10.0, is_order=True
)
STOP: Final = Call(
    name="front.stop", request=m.Nothing, response=m.Nothing, timeout_s=10.0, is_order=True
)
"""Twice what the front gives to the calls under way."""
PEER: Final = Call(name="courier.peer", request=m.Nothing, response=PeerMessage, timeout_s=20.0)
REFUSED: Final = Call(
    name="front.refused", request=RefusalMessage, response=m.Nothing, timeout_s=10.0
)
