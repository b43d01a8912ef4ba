"""What the root part told, as the values that peers are judged by; for confined processes."""

from kvmsec.daemon.front_messages import TrustMessage
from kvmsec.pki.certificates import der_of, fingerprint_of
from kvmsec.pki.pems import split_pems
from kvmsec.pki.standing import Trust


def trust_of(told: TrustMessage) -> Trust | None:
    """Whom to trust; None while this node joins, or calls one that does. Raises BadPem."""
    if told.is_joining:
        return None
    # TLS needs the common certificate among the anchors; it has signed nobody but itself.
    anchors = [der_of(block, "server.pem") for block in split_pems(told.anchors, "server.pem")]
    return Trust(
        anchors=tuple(der for der in anchors if fingerprint_of(der) != told.certless),
        members=told.members,
        candidates={uuid: frozenset(known) for uuid, known in told.candidates.items()},
        certless=told.certless,
        certificates={uuid: frozenset(known) for uuid, known in told.certificates.items()},
    )
