"""This node's attempt to join a cluster, while it has a token that can be used."""

from typing import TYPE_CHECKING

from attrs import frozen

from kvmsec.daemon.front_messages import TrustMessage
from kvmsec.paths import Paths
from kvmsec.store import Store

if TYPE_CHECKING:
    from kvmsec.cluster.members.arriving import Arrival
    from kvmsec.pki.joining import Invitation


@frozen
class _Attempt:
    """One token's: the certificate that is shown stays the same, for the proofs are bound to it."""

    invitation: "Invitation"
    arrival: "Arrival"
    message: TrustMessage


class Joining:
    """Answers whoever knows the token that `kvmsec node join` has written down here."""

    def __init__(self, paths: Paths, store: Store) -> None:
        self._paths = paths
        self._store = store
        self._attempt: _Attempt | None = None

    def arrival(self) -> "Arrival | None":
        """What answers; None without a token. Raises KeyFileRefused for a file that is unsafe."""
        attempt = self._current()
        return None if attempt is None else attempt.arrival

    def message(self) -> TrustMessage | None:
        """What the front serves with meanwhile; None without a token."""
        attempt = self._current()
        return None if attempt is None else attempt.message

    def _current(self) -> _Attempt | None:
        if not self._paths.invitations.exists():
            return None
        from kvmsec.cluster.members.arriving import standing_invitation
        from kvmsec.pki.invitations import Invitations

        invitation = standing_invitation(Invitations(self._paths.invitations))
        if invitation is None:
            self._attempt = None
        elif self._attempt is None or self._attempt.invitation != invitation:
            self._attempt = self._begin(invitation)
        return self._attempt

    def _begin(self, invitation: "Invitation") -> _Attempt:
        from kvmsec.cluster.members.arriving import Arrival
        from kvmsec.pki.certificates import fingerprint_of
        from kvmsec.pki.files import KeyFiles
        from kvmsec.pki.invitations import Invitations
        from kvmsec.pki.join_certificates import join_anchor, make_joining_pair

        pair = make_joining_pair(invitation.secret)
        arrival = Arrival(
            invitation=invitation,
            own_fingerprint=fingerprint_of(pair.certificate_pem),
            files=KeyFiles(self._paths.key_files),
            store=self._store,
            invitations=Invitations(self._paths.invitations),
        )
        anchors = join_anchor(invitation.secret)
        return _Attempt(
            invitation,
            arrival,
            TrustMessage(
                pair=pair.pem, anchors=anchors, members={}, candidates={}, is_joining=True
            ),
        )
