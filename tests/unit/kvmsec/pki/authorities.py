"""A cluster of certificates to be judged: two candidates and a plain node."""

import ssl
from datetime import UTC, datetime, timedelta
from uuid import UUID

from attrs import field, frozen
from cryptography import x509

from kvmsec.pki.certificates import (
    Pair,
    anchors_of,
    der_of,
    fingerprint_of,
    load_certificate,
    make_cluster_pair,
    make_request,
    sign_request,
)
from kvmsec.pki.issuing import leaf_builder, sign, subject_of
from kvmsec.pki.keys import KeyKind, dump_key, load_key, make_key
from kvmsec.pki.standing import Trust

NOW = datetime(2026, 5, 4, 12, tzinfo=UTC)
CLUSTER = UUID("c0000000-0000-4000-8000-000000000000")
UUIDS = {
    "alpha": UUID("a0000000-0000-4000-8000-000000000000"),
    "beta": UUID("b0000000-0000-4000-8000-000000000000"),
    "plain": UUID("d0000000-0000-4000-8000-000000000000"),
}


def make_cluster(kind: KeyKind = KeyKind.ED25519, now: datetime = NOW, days: int = 100) -> Pair:
    return make_cluster_pair("prod", CLUSTER, kind=kind, now=now, lifetime_days=days)


def make_node(
    cluster: Pair,
    name: str,
    *,
    kind: KeyKind = KeyKind.ED25519,
    now: datetime = NOW,
    days: int = 10,
    uuid: UUID | None = None,
) -> Pair:
    request = make_request(name, uuid or UUIDS[name], kind=kind)
    certificate = sign_request(
        cluster,
        request.request_pem,
        node_name=name,
        node_uuid=uuid or UUIDS[name],
        now=now,
        lifetime_days=days,
    )
    return Pair(certificate, request.key_pem)


@frozen
class Town:
    """A cluster with its nodes' pairs; `trust` is what each node goes by."""

    cluster: Pair = field(factory=make_cluster)
    pairs: dict[str, Pair] = field(init=False)

    @pairs.default
    def _make_pairs(self) -> dict[str, Pair]:
        return {name: make_node(self.cluster, name) for name in UUIDS}

    def der(self, name: str) -> bytes:
        return der_of(self.pairs[name].certificate_pem)

    def trust(self, **candidates: str) -> Trust:
        """The two candidates are listed under their own certificates, unless told otherwise."""
        listed = candidates or {"alpha": "alpha", "beta": "beta"}
        return Trust(
            anchors=anchors_of(self.cluster.certificate_pem),
            members={uuid: name for name, uuid in UUIDS.items()},
            candidates={
                UUIDS[name]: frozenset({fingerprint_of(self.pairs[owner].certificate_pem)})
                for name, owner in listed.items()
            },
        )


def forged(
    issuer: Pair,
    names: list[x509.GeneralName] | None,
    *more: tuple[x509.ExtensionType, bool],
    starts: datetime = NOW - timedelta(days=1),
    ends: datetime = NOW + timedelta(days=1),
    builder: x509.CertificateBuilder | None = None,
    kind: KeyKind = KeyKind.ED25519,
) -> Pair:
    """A certificate that the issuer's key has signed, whatever our own rules say of it."""
    key = make_key(kind)
    made = builder or leaf_builder(subject_of("forged"), key.public_key(), starts, ends)
    made = made.issuer_name(load_certificate(issuer.certificate_pem).subject)
    if names is not None:
        made = made.add_extension(x509.SubjectAlternativeName(names), critical=False)
    for extension, is_critical in more:
        made = made.add_extension(extension, critical=is_critical)
    return Pair(sign(made, load_key(issuer.key_pem)), dump_key(key))


def names_for(name: str, uuid: UUID) -> list[x509.GeneralName]:
    return [x509.DNSName(name), x509.UniformResourceIdentifier(uuid.urn)]


def shake(
    client: ssl.SSLContext, server: ssl.SSLContext, server_name: str = ""
) -> tuple[ssl.SSLObject, ssl.SSLObject]:
    """A handshake in memory: the client's side and the server's. Raises ssl.SSLError."""
    to_client, to_server = ssl.MemoryBIO(), ssl.MemoryBIO()
    sides = [
        client.wrap_bio(to_client, to_server, server_hostname=server_name or None),
        server.wrap_bio(to_server, to_client, server_side=True),
    ]
    pending = list(sides)
    while pending:
        before = list(pending)
        written = to_client.pending, to_server.pending
        for side in before:
            try:
                side.do_handshake()
                pending.remove(side)
            except ssl.SSLWantReadError:
                pass
        if before == pending and written == (to_client.pending, to_server.pending):
            raise ssl.SSLError("the handshake does not go on")
    # In TLS 1.3 the client is done before the server has judged its certificate.
    sides[1].write(b"welcome")
    assert sides[0].read(7) == b"welcome"
    return sides[0], sides[1]
