"""The cluster's key and its invitations, as `kvmsec.pki` keeps them on this node."""

from collections.abc import Sequence
from datetime import UTC, datetime

from attrs import frozen

from kvmsec.cluster.trust import Signed
from kvmsec.model.cluster import Cluster, Member
from kvmsec.pki import certificates
from kvmsec.pki.errors import NoInvitation
from kvmsec.pki.files import KeyFiles
from kvmsec.pki.invitations import Invitations as KeptInvitations
from kvmsec.pki.keys import KeyKind
from kvmsec.pki.pems import Pair


@frozen
class KeyFilesAuthority:
    """`kvmsec.cluster.trust.Authority`: what lies in the key files of a candidate."""

    files: KeyFiles

    def anchors(self) -> str:
        return self.files.anchors()

    def cluster_key(self) -> str:
        return self.files.cluster().key_pem

    def sign(self, request: str, member: Member) -> Signed:
        certificate = certificates.sign_request(
            self.files.cluster(),
            request,
            node_name=member.name,
            node_uuid=member.uuid,
            now=datetime.now(UTC),
        )
        return Signed(certificate, certificates.fingerprint_of(certificate))


@frozen
class KeyFilesFounding:
    """`kvmsec.cluster.trust.Founding`: a new cluster's pair, and its first node's."""

    files: KeyFiles
    kind: KeyKind = KeyKind.ED25519

    def found(self, cluster: Cluster) -> str:
        member = cluster.master_member
        now = datetime.now(UTC)
        pair = certificates.make_cluster_pair(cluster.name, cluster.uuid, kind=self.kind, now=now)
        request = certificates.make_request(member.name, member.uuid, kind=self.kind)
        certificate = certificates.sign_request(
            pair, request.request_pem, node_name=member.name, node_uuid=member.uuid, now=now
        )
        fingerprint = certificates.fingerprint_of(certificate)
        self.files.remove_all()
        self.files.put("server.key", pair.key_pem)
        self.files.write_candidates({member.uuid: frozenset({fingerprint})})
        self.files.install(pair.certificate_pem, Pair(certificate, request.key_pem))
        return fingerprint

    def undo(self) -> None:
        self.files.remove_all()


@frozen
class PkiInvitations:
    """`kvmsec.cluster.trust.Invitations`: those that `node invite` has written down."""

    kept: KeptInvitations

    def is_current(self, name: str) -> bool:
        return name in self.current()

    def current(self) -> Sequence[str]:
        return [one.node_name for one in self.kept.current(datetime.now(UTC))]

    def spend(self, name: str) -> None:
        now = datetime.now(UTC)
        try:
            self.kept.spend(self.kept.find(name, now), now)
        except NoInvitation:
            return
