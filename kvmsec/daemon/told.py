"""What the root part told, as the values that peers are judged by; for confined processes."""

from kvmsec.daemon.front_messages import TrustMessage
from kvmsec.pki.certificates import anchors_of
from kvmsec.pki.standing import Trust


def trust_of(told: TrustMessage) -> Trust | None:
    """Whom to trust; None while this node joins, or calls one that does. Raises BadPem."""
    if told.is_joining:
        return None
    return Trust(
        anchors=anchors_of(told.anchors),
        members=told.members,
        candidates={uuid: frozenset(known) for uuid, known in told.candidates.items()},
        certless=told.certless,
    )
