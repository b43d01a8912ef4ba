"""What stands in a certificate, and whose key it is signed for."""

from datetime import datetime, timedelta
from uuid import UUID

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import dsa, ec, ed448, rsa
from cryptography.x509.oid import ExtendedKeyUsageOID

from kvmsec.errors import BadName
from kvmsec.pki import certificates
from kvmsec.pki.certificates import Pair, load_certificate
from kvmsec.pki.errors import BadLifetime, BadPem, RequestRefused
from kvmsec.pki.keys import KeyKind, dump_key, kind_of, load_key, make_key
from tests.unit.kvmsec.pki.authorities import NOW, UUIDS, make_cluster, make_node

ALPHA = UUIDS["alpha"]


def _sign(cluster: Pair, request_pem: str, name: str = "alpha", uuid: UUID = ALPHA) -> str:
    return certificates.sign_request(
        cluster, request_pem, node_name=name, node_uuid=uuid, now=NOW, lifetime_days=10
    )


@pytest.mark.parametrize("kind", KeyKind)
def test_a_node_is_named_and_may_serve_and_call_and_sign_nobody(kind: KeyKind) -> None:
    cluster = make_cluster(kind)
    certificate = load_certificate(make_node(cluster, "alpha", kind=kind).certificate_pem)
    extensions = certificate.extensions

    names = extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    assert names.get_values_for_type(x509.DNSName) == ["alpha"]
    assert names.get_values_for_type(x509.UniformResourceIdentifier) == [f"urn:uuid:{ALPHA}"]
    assert certificate.subject.rfc4514_string() == "CN=alpha"
    assert certificate.version is x509.Version.v3
    purposes = extensions.get_extension_for_class(x509.ExtendedKeyUsage).value
    both = {ExtendedKeyUsageOID.SERVER_AUTH, ExtendedKeyUsageOID.CLIENT_AUTH}
    assert set(purposes) == both
    assert not extensions.get_extension_for_class(x509.BasicConstraints).value.ca
    assert not extensions.get_extension_for_class(x509.KeyUsage).value.key_cert_sign
    certificate.verify_directly_issued_by(load_certificate(cluster.certificate_pem))


def test_the_clusters_certificate_signs_nodes_and_no_further_authority() -> None:
    certificate = load_certificate(make_cluster().certificate_pem)
    basic = certificate.extensions.get_extension_for_class(x509.BasicConstraints)

    assert basic.critical
    assert (basic.value.ca, basic.value.path_length) == (True, 0)
    assert certificate.extensions.get_extension_for_class(x509.KeyUsage).value.key_cert_sign
    certificate.extensions.get_extension_for_class(x509.SubjectKeyIdentifier)


def test_a_certificate_is_valid_from_five_minutes_before_it_was_made() -> None:
    cluster = make_cluster()
    for pem, days in [(cluster.certificate_pem, 100), (_pem_of("alpha", cluster), 10)]:
        facts = certificates.facts_of(pem)
        assert facts.not_before == NOW - timedelta(minutes=5)
        assert facts.not_after == NOW + timedelta(days=days)


def _pem_of(name: str, cluster: Pair) -> str:
    return make_node(cluster, name).certificate_pem


def test_serials_are_positive_random_and_fit_20_octets() -> None:
    cluster = make_cluster()
    serials = [load_certificate(_pem_of("alpha", cluster)).serial_number for _ in range(64)]

    assert len(set(serials)) == 64
    assert all(0 < serial < 1 << 159 for serial in serials)
    assert max(serials) > 1 << 150


def test_a_node_ends_with_its_cluster_at_the_latest() -> None:
    cluster = make_cluster(days=3)
    facts = certificates.facts_of(make_node(cluster, "alpha", days=10).certificate_pem)
    assert facts.not_after == NOW + timedelta(days=3)


def test_an_expired_cluster_signs_nobody() -> None:
    cluster = make_cluster(now=NOW - timedelta(days=101))
    with pytest.raises(BadPem, match="expired") as caught:
        make_node(cluster, "alpha")
    assert "renew-crypto" in str(caught.value.hint)


def test_the_names_are_the_signers_and_never_the_requests() -> None:
    cluster = make_cluster()
    request = certificates.make_request("beta", UUIDS["beta"])

    facts = certificates.facts_of(_sign(cluster, request.request_pem))
    assert facts.names == ("alpha", f"urn:uuid:{ALPHA}")
    assert facts.subject == "CN=alpha"


def test_a_request_to_be_an_authority_is_not_heeded() -> None:
    key = make_key()
    request = (
        x509.CertificateSigningRequestBuilder()
        .subject_name(x509.Name([]))
        .add_extension(x509.BasicConstraints(ca=True, path_length=9), critical=True)
        .sign(key, None)
    )
    pem = request.public_bytes(serialization.Encoding.PEM).decode()
    certificate = load_certificate(_sign(make_cluster(), pem))
    assert not certificate.extensions.get_extension_for_class(x509.BasicConstraints).value.ca


def test_a_request_that_another_key_has_signed_is_refused() -> None:
    mine, theirs = (certificates.make_request("alpha", ALPHA) for _ in range(2))
    parsed = x509.load_pem_x509_csr(mine.request_pem.encode())
    other = x509.load_pem_x509_csr(theirs.request_pem.encode())
    der = parsed.public_bytes(serialization.Encoding.DER)
    forged = x509.load_der_x509_csr(der.replace(parsed.signature, other.signature))

    with pytest.raises(RequestRefused, match="not signed with the key"):
        _sign(make_cluster(), forged.public_bytes(serialization.Encoding.PEM).decode())


def _request_with(key: object, digest: hashes.HashAlgorithm | None) -> str:
    builder = x509.CertificateSigningRequestBuilder().subject_name(x509.Name([]))
    request = builder.sign(key, digest)  # type: ignore[arg-type]
    return request.public_bytes(serialization.Encoding.PEM).decode()


@pytest.mark.parametrize(
    ("make", "digest"),
    [
        (lambda: rsa.generate_private_key(65537, 2048), hashes.SHA256()),
        (lambda: rsa.generate_private_key(3, 3072), hashes.SHA256()),
        (lambda: ec.generate_private_key(ec.SECP384R1()), hashes.SHA256()),
        (lambda: ec.generate_private_key(ec.SECP256K1()), hashes.SHA256()),
        (lambda: dsa.generate_private_key(2048), hashes.SHA256()),
        (ed448.Ed448PrivateKey.generate, None),
    ],
    ids=["rsa2048", "exponent3", "p384", "secp256k1", "dsa", "ed448"],
)
def test_a_weak_or_foreign_key_is_signed_by_nobody(make: object, digest: object) -> None:
    pem = _request_with(make(), digest)  # type: ignore[operator, arg-type]
    with pytest.raises(RequestRefused, match="its "):
        _sign(make_cluster(), pem)


@pytest.mark.parametrize("pem", ["", "no request", "-----BEGIN CERTIFICATE REQUEST-----\nAAAA\n"])
def test_what_is_no_request_is_refused(pem: str) -> None:
    with pytest.raises(RequestRefused):
        _sign(make_cluster(), pem)
    with pytest.raises(RequestRefused):
        _sign(make_cluster(), make_cluster().certificate_pem)


def test_the_clusters_own_key_is_no_nodes() -> None:
    cluster = make_cluster()
    request = certificates.request_for(cluster.key_pem, "alpha", ALPHA)
    with pytest.raises(RequestRefused, match="the cluster's own"):
        _sign(cluster, request)


@pytest.mark.parametrize("name", ["", "a_b", "-a", "a\n", "*", "é", "a" * 254])
def test_a_name_that_no_node_may_have_is_in_no_certificate(name: str) -> None:
    cluster = make_cluster()
    request = certificates.make_request("alpha", ALPHA)
    with pytest.raises(BadName):
        _sign(cluster, request.request_pem, name)
    with pytest.raises(BadName):
        certificates.make_request(name, ALPHA)


def test_a_host_name_longer_than_a_common_name_has_its_place() -> None:
    name = ".".join(["a" * 60] * 4)
    facts = certificates.facts_of(make_node(make_cluster(), name, uuid=ALPHA).certificate_pem)
    assert facts.names == (name, f"urn:uuid:{ALPHA}")
    assert facts.subject == f"CN={ALPHA}"


def test_no_key_is_shown_by_what_holds_it() -> None:
    pair = make_cluster()
    request = certificates.make_request("alpha", ALPHA)
    for held, key in [(pair, pair.key_pem), (request, request.key_pem)]:
        assert "PRIVATE" not in repr(held)
        assert key.splitlines()[1] not in repr(held)


@pytest.mark.parametrize("days", [0, -1, 36501])
def test_a_lifetime_that_makes_no_sense_is_refused(days: int) -> None:
    with pytest.raises(BadLifetime):
        make_cluster(days=days)
    with pytest.raises(BadLifetime):
        make_node(make_cluster(), "alpha", days=days)


def test_a_time_without_a_zone_is_refused() -> None:
    with pytest.raises(ValueError, match="time zone"):
        make_cluster(now=datetime(2026, 1, 1))


@pytest.mark.parametrize("hours", [0, -1, 7 * 24 + 1])
def test_a_common_pair_lasts_a_week_at_most(hours: int) -> None:
    with pytest.raises(BadLifetime):
        certificates.make_certless_pair("prod", now=NOW, lifetime=timedelta(hours=hours))


def test_a_fingerprint_is_that_of_the_der_however_it_is_given() -> None:
    pem = make_cluster().certificate_pem
    digest = load_certificate(pem).fingerprint(hashes.SHA256()).hex()

    assert certificates.fingerprint_of(pem) == digest
    assert certificates.fingerprint_of(certificates.der_of(pem)) == digest
    assert certificates.fingerprint_of("a comment\n" + pem.replace("\n", "\r\n")) == digest


def test_a_pair_is_read_in_any_order_and_only_whole() -> None:
    pair, other = make_cluster(), make_cluster()

    assert Pair.parse(pair.pem) == pair
    assert Pair.parse(pair.certificate_pem + "a comment\n" + pair.key_pem) == pair
    for text in ["", pair.key_pem, pair.certificate_pem, pair.pem + other.pem, pair.pem[:-40]]:
        with pytest.raises(BadPem):
            Pair.parse(text)
    with pytest.raises(BadPem, match="does not belong"):
        certificates.require_whole(Pair(pair.certificate_pem, other.key_pem))


def test_pem_blocks_are_bounded() -> None:
    pem = make_cluster().certificate_pem

    assert certificates.split_pems(pem + "words\n" + pem) == (pem, pem)
    for text in [pem * 17, pem + " " * (1 << 16), pem + pem[:-30], "", "words"]:
        with pytest.raises(BadPem):
            certificates.split_pems(text)
    with pytest.raises(BadPem, match="more than 2"):
        certificates.anchors_of(pem * 3)


@pytest.mark.parametrize("kind", KeyKind)
@pytest.mark.parametrize(
    "form", [serialization.PrivateFormat.PKCS8, serialization.PrivateFormat.TraditionalOpenSSL]
)
def test_a_key_is_read_in_each_of_its_formats(
    kind: KeyKind, form: serialization.PrivateFormat
) -> None:
    key = make_key(kind)
    if kind is KeyKind.ED25519:
        form = serialization.PrivateFormat.PKCS8  # There is no other.
    pem = key.private_bytes(serialization.Encoding.PEM, form, serialization.NoEncryption())

    read = load_key(pem.decode())
    assert kind_of(read.public_key()) is kind
    assert dump_key(read) == dump_key(key)
    assert "BEGIN PRIVATE KEY" in dump_key(key)


@pytest.mark.parametrize(
    "form", [serialization.PrivateFormat.PKCS8, serialization.PrivateFormat.TraditionalOpenSSL]
)
def test_a_key_with_a_passphrase_is_told_as_such(form: serialization.PrivateFormat) -> None:
    seal = serialization.BestAvailableEncryption(b"secret")
    pem = make_key(KeyKind.P256).private_bytes(serialization.Encoding.PEM, form, seal)
    with pytest.raises(BadPem, match="passphrase"):
        load_key(pem.decode())


def test_an_error_about_a_key_does_not_show_it() -> None:
    pem = dump_key(make_key(KeyKind.RSA3072))
    lines = pem.splitlines()
    broken = "\n".join([lines[0], *lines[2:], ""])
    with pytest.raises(BadPem) as caught:
        load_key(broken)
    shown = f"{caught.value}{caught.value.hint}{caught.value.__cause__}{caught.value.args}"
    assert not any(line in shown for line in lines[1:-1])


def test_a_certificate_that_can_not_be_read_is_told_of() -> None:
    for text in ["", "words", dump_key(make_key()), b"\x30\x03abc"]:
        with pytest.raises(BadPem):
            load_certificate(text)
