"""A new node's side of a join: it answers whoever knows the token, and becomes a member."""

from collections.abc import Callable
from datetime import UTC, datetime

from attrs import define, field

from kvmsec.cluster.members.proofs import said_in_admission, said_in_answer, said_in_hello
from kvmsec.errors import MemberRefused
from kvmsec.pki.certificates import (
    Request,
    anchors_of,
    fingerprint_of,
    load_certificate,
    make_request,
)
from kvmsec.pki.chain import anchor_of
from kvmsec.pki.errors import BadToken, PeerRefused
from kvmsec.pki.files import KeyFiles
from kvmsec.pki.invitations import Invitations
from kvmsec.pki.joining import (
    Invitation,
    JoinRole,
    check_proof,
    parse_token,
    proof,
    require_current,
)
from kvmsec.pki.pems import Pair
from kvmsec.rpc.messages import AdmitRequest, JoinAnswer, JoinRequest
from kvmsec.store import Store


def accept_token(token: str, files: KeyFiles, store: Store, invitations: Invitations) -> Invitation:
    """Write down an invitation that was carried here, so that this node's daemon answers to it.

    Raises BadToken, and MemberRefused where this node belongs to a cluster.
    """
    now = datetime.now(UTC)
    invitation = require_current(parse_token(token), now)
    cluster, _ = store.load()
    if cluster is not None and files.is_member():
        raise MemberRefused(
            f"this node belongs to the cluster {cluster.name}",
            hint="let it forget that first: `kvmsec node leave` here; out of the cluster for good, "
            "`kvmsec node remove` on the master",
        )
    for other in invitations.current(now):
        invitations.spend(other, now)
    invitations.add(invitation, now)
    return invitation


def standing_invitation(invitations: Invitations) -> Invitation | None:
    """The invitation that this node has accepted, while it can be used."""
    return next(iter(invitations.current(datetime.now(UTC))), None)


@define
class Arrival:
    """One attempt to join, for as long as the node serves with the same temporary certificate.

    `own_fingerprint` is that certificate's; the caller's is that of the peer of each call.
    `welcomed` is called once this node is a member.
    """

    invitation: Invitation
    own_fingerprint: str
    files: KeyFiles
    store: Store
    invitations: Invitations
    welcomed: Callable[[], None] = lambda: None
    _request: Request | None = None
    _asked: JoinRequest | None = field(default=None)

    def hello(self, request: JoinRequest, caller: str) -> JoinAnswer:
        """Prove that this node knows the token, to who does. Raises BadToken."""
        self._check(request.proof, JoinRole.MASTER_HELLO, caller, said_in_hello(request))
        if request.node_name != self.invitation.node_name:
            raise BadToken(f"is for {self.invitation.node_name}, not for {request.node_name}")
        self._request = make_request(request.node_name, request.node_uuid)
        self._asked = request
        shown = proof(
            self.invitation.secret,
            role=JoinRole.NODE_HELLO,
            master_fingerprint=caller,
            node_fingerprint=self.own_fingerprint,
            anchor_fingerprint=self.invitation.anchor_fingerprint,
            said=said_in_answer(self._request.request_pem),
        )
        return JoinAnswer(proof=shown, signing_request=self._request.request_pem)

    def admit(self, request: AdmitRequest, caller: str) -> None:
        """Become a member. Killed within it, this node is none, and is admitted again.

        Raises BadToken, MemberRefused before a `hello`, BadPem, and what the store raises.
        """
        self._check(request.proof, JoinRole.MASTER_ADMIT, caller, said_in_admission(request))
        if self._request is None or self._asked is None or request.state.document is None:
            raise MemberRefused("nobody has said hello yet", hint="run `kvmsec node add` again")
        self._require_invited(request)
        if not self.files.is_member():
            self.store.leave()  # what a killed admission may have left
        self.store.introduce(self._asked.node_uuid)
        self.store.put_copy(
            request.state.document,
            request.state.format,
            request.state.revision,
            at=datetime.now(UTC),
        )
        cluster, _ = self.store.load()
        if cluster is not None and cluster.orderers:
            self.files.write_candidates(cluster.orderers)
        # The pair last: a node without one is no member.
        self.files.install(request.anchors, Pair(request.certificate, self._request.key_pem))
        self.invitations.spend(self.invitation, datetime.now(UTC))
        self.welcomed()

    def _require_invited(self, request: AdmitRequest) -> None:
        """Hold the certificate to the one that the token was made for. Raises BadToken, BadPem.

        By its signature: whoever has read the token can put that anchor beside one of its own, as
        they are during a renewal, but has not the key.
        """
        invited = [
            der
            for der in anchors_of(request.anchors)
            if fingerprint_of(der) == self.invitation.anchor_fingerprint
        ]
        try:
            anchor_of(load_certificate(request.certificate), invited)
        except PeerRefused as error:
            raise BadToken(
                "was made for a cluster with another certificate",
                hint="invite the node again with `kvmsec node invite NAME`",
            ) from error

    def _check(self, shown: str, role: JoinRole, caller: str, said: bytes) -> None:
        require_current(self.invitation, datetime.now(UTC))
        check_proof(
            shown,
            self.invitation.secret,
            role=role,
            master_fingerprint=caller,
            node_fingerprint=self.own_fingerprint,
            anchor_fingerprint=self.invitation.anchor_fingerprint,
            said=said,
        )
