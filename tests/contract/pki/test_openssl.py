"""Our certificates read by the system's `openssl`, and its certificates taken as ours."""

from pathlib import Path

import pytest

from kvmsec.pki import certificates
from kvmsec.pki.certificates import Pair, anchors_of, der_of, facts_of, fingerprint_of
from kvmsec.pki.errors import BadPem, PkiError
from kvmsec.pki.files import KeyFiles
from kvmsec.pki.judgement import judge_orderer
from kvmsec.pki.keys import KeyKind
from tests.contract.pki.openssl_program import (
    KEY_NAMES,
    KEYS,
    UUID_A,
    Openssl,
    call_with_openssl,
    now,
    our_cluster,
    our_node,
    our_server,
    trust_in,
)

# What we make, read by openssl ---------------------------------------------------------------


@pytest.mark.parametrize("kind", KeyKind)
@pytest.mark.parametrize("cluster_kind", KeyKind)
def test_openssl_verifies_our_chain_by_its_strictest_rules(
    kind: KeyKind, cluster_kind: KeyKind, openssl: Openssl
) -> None:
    cluster = our_cluster(cluster_kind)
    openssl.write("server.pem", cluster.certificate_pem)
    openssl.write("node.pem", our_node(cluster, kind=kind).certificate_pem)
    for purpose in ("sslserver", "sslclient"):
        rules = ("-x509_strict", "-check_ss_sig", "-purpose", purpose)
        said = openssl("verify", *rules, "-CAfile", "server.pem", "node.pem")
        assert "node.pem: OK" in said


@pytest.mark.parametrize("kind", KeyKind)
def test_openssl_reads_our_keys_requests_and_extensions(kind: KeyKind, openssl: Openssl) -> None:
    request = certificates.make_request("alpha", UUID_A, kind=kind)
    openssl.write("key", request.key_pem)
    openssl.write("csr", request.request_pem)
    openssl.write("node.pem", our_node(our_cluster(), kind=kind).certificate_pem)

    assert "valid" in openssl("pkey", "-in", "key", "-check", "-noout")
    assert "OK" in openssl("req", "-in", "csr", "-verify", "-noout")
    text = openssl("x509", "-in", "node.pem", "-noout", "-text")
    for words in (
        f"DNS:alpha, URI:urn:uuid:{UUID_A}",
        "TLS Web Server Authentication, TLS Web Client Authentication",
        "CA:FALSE",
        "Version: 3",
    ):
        assert words in text


def test_openssl_agrees_on_the_fingerprint(openssl: Openssl) -> None:
    pem = our_cluster().certificate_pem
    openssl.write("server.pem", pem)
    said = openssl("x509", "-in", "server.pem", "-noout", "-fingerprint", "-sha256")
    assert said.strip().partition("=")[2].replace(":", "").lower() == fingerprint_of(pem)


# What openssl makes, taken by us -------------------------------------------------------------


@pytest.mark.parametrize("key", KEYS, ids=KEY_NAMES)
@pytest.mark.parametrize("cluster_key", KEYS, ids=KEY_NAMES)
def test_a_cluster_and_a_node_of_openssls_making_are_taken(
    key: tuple[str, ...], cluster_key: tuple[str, ...], openssl: Openssl, tmp_path: Path
) -> None:
    cluster = openssl.make_cluster(cluster_key)
    pair = openssl.make_node(cluster, "alpha", UUID_A, key)

    assert judge_orderer(der_of(pair.certificate_pem), trust_in(cluster, pair), now()).may_order
    directory = tmp_path / "var"
    directory.mkdir(mode=0o700)
    files = KeyFiles(directory)
    files.install(cluster.certificate_pem, Pair.parse(pair.pem))
    files.put("server.key", cluster.key_pem)
    assert fingerprint_of(files.own().certificate_pem) == fingerprint_of(pair.certificate_pem)
    assert files.cluster().certificate_pem == cluster.certificate_pem
    with our_server(files.own(), files.anchors(), tmp_path) as listener:
        call_with_openssl(openssl, pair, cluster.certificate_pem, listener)


@pytest.mark.parametrize("mask", ["utf8only", "nombstr", "pkix", "default", "MASK:0x2"])
@pytest.mark.parametrize("key", [KEYS[0], KEYS[2], KEYS[4]], ids=lambda one: " ".join(one))
def test_each_encoding_of_a_clusters_name_signs_nodes_that_openssl_verifies(
    mask: str, key: tuple[str, ...], openssl: Openssl
) -> None:
    cluster = openssl.make_cluster(key, mask=mask)
    pair = our_node(cluster)
    openssl.write("node.pem", pair.certificate_pem)

    assert "OK" in openssl("verify", "-x509_strict", "-CAfile", "cluster.pem", "node.pem")
    assert judge_orderer(der_of(pair.certificate_pem), trust_in(cluster, pair), now()).may_order


@pytest.mark.parametrize("key", KEYS, ids=KEY_NAMES)
def test_a_request_of_openssls_making_is_signed(key: tuple[str, ...], openssl: Openssl) -> None:
    cluster = our_cluster()
    key_pem, request = openssl.make_request(key)
    certificate = certificates.sign_request(
        cluster, request, node_name="alpha", node_uuid=UUID_A, now=now()
    )
    pair = certificates.require_whole(Pair(certificate, key_pem))
    assert judge_orderer(der_of(certificate), trust_in(cluster, pair), now()).may_order
    assert facts_of(certificate).subject == "CN=alpha"


def test_text_that_openssl_puts_around_a_certificate_is_left_out(openssl: Openssl) -> None:
    pem = our_cluster().certificate_pem
    openssl.write("server.pem", pem)
    text = openssl("x509", "-in", "server.pem", "-text")
    assert text != pem
    assert certificates.split_pems(text) == (pem,)
    with pytest.raises(BadPem):
        anchors_of(openssl("x509", "-in", "server.pem", "-trustout"))


@pytest.mark.parametrize(
    "key",
    [
        ("genrsa", "2048"),
        ("genpkey", "-algorithm", "EC", "-pkeyopt", "ec_paramgen_curve:P-384"),
        ("genpkey", "-algorithm", "ed448"),
    ],
    ids=lambda one: one[-1],
)
def test_a_weak_or_foreign_key_of_openssls_making_is_refused(
    key: tuple[str, ...], openssl: Openssl
) -> None:
    cluster = our_cluster()
    _, request = openssl.make_request(key)
    with pytest.raises(PkiError):
        certificates.sign_request(cluster, request, node_name="a", node_uuid=UUID_A, now=now())
    pair = openssl.make_node(cluster, "alpha", UUID_A, key)
    with pytest.raises(PkiError):
        judge_orderer(der_of(pair.certificate_pem), trust_in(cluster, pair), now())


def test_a_certificate_that_is_signed_with_sha1_is_refused(openssl: Openssl) -> None:
    cluster = our_cluster(KeyKind.RSA3072)
    openssl.make_node(cluster, "alpha", UUID_A, KEYS[0])
    signer = ("-sha1", "-CA", "ca.pem", "-CAkey", "ca.key", "-extfile", "node.cnf")
    openssl("x509", "-req", "-in", "node.csr", *signer, "-out", "node.pem")
    pair = Pair(openssl.read("node.pem"), openssl.read("node.key"))
    with pytest.raises(PkiError, match="sha1"):
        judge_orderer(der_of(pair.certificate_pem), trust_in(cluster, pair), now())
