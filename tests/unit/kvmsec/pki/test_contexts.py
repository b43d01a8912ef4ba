"""TLS between nodes: who gets through a handshake, and what of it stays."""

import os
import ssl
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from cryptography import x509

from kvmsec.pki import contexts
from kvmsec.pki.certificates import Pair, load_certificate, make_certless_pair
from kvmsec.pki.errors import BadPem
from kvmsec.pki.issuing import authority_builder, sign, subject_of
from kvmsec.pki.join_certificates import join_anchor
from kvmsec.pki.keys import KeyKind, dump_key, load_key, make_key
from tests.unit.kvmsec.pki.authorities import (
    UUIDS,
    forged,
    make_cluster,
    make_node,
    names_for,
    shake,
)

# OpenSSL goes by the machine's clock.
TODAY = datetime.now(UTC)


@pytest.fixture(scope="module")
def cluster() -> Pair:
    return make_cluster(now=TODAY)


def _contexts(own: Pair, anchors: str) -> tuple[ssl.SSLContext, ssl.SSLContext]:
    return contexts.client_context(own, anchors), contexts.server_context(own, anchors)


@pytest.mark.parametrize("kind", KeyKind)
def test_two_nodes_see_each_others_certificate(kind: KeyKind) -> None:
    cluster = make_cluster(kind, now=TODAY)
    alpha, beta = (make_node(cluster, name, kind=kind, now=TODAY) for name in ("alpha", "beta"))
    client, server = shake(
        contexts.client_context(alpha, cluster.certificate_pem),
        contexts.server_context(beta, cluster.certificate_pem),
    )
    assert client.getpeercert(True) == ssl.PEM_cert_to_DER_cert(beta.certificate_pem)
    assert server.getpeercert(True) == ssl.PEM_cert_to_DER_cert(alpha.certificate_pem)
    assert (client.version(), server.version()) == ("TLSv1.3", "TLSv1.3")
    assert client.compression() is None


def _foreign(cluster: Pair) -> Pair:
    return make_node(make_cluster(now=TODAY), "alpha", now=TODAY)


def _expired(cluster: Pair) -> Pair:
    return forged(
        cluster,
        names_for("alpha", UUIDS["alpha"]),
        starts=TODAY - timedelta(days=2),
        ends=TODAY - timedelta(days=1),
    )


def _not_yet(cluster: Pair) -> Pair:
    return make_node(cluster, "alpha", now=TODAY + timedelta(days=1))


def _grandchild(cluster: Pair) -> Pair:
    return forged(
        make_node(cluster, "beta", now=TODAY),
        names_for("alpha", UUIDS["alpha"]),
        starts=TODAY - timedelta(days=1),
        ends=TODAY + timedelta(days=1),
    )


STRANGERS = [_foreign, _expired, _not_yet, _grandchild]


@pytest.mark.parametrize("stranger", STRANGERS)
def test_a_stranger_is_refused_on_either_side(stranger: object, cluster: Pair) -> None:
    anchors = cluster.certificate_pem
    pair = stranger(cluster)  # type: ignore[operator]
    good_client, good_server = _contexts(make_node(cluster, "beta", now=TODAY), anchors)
    bad_client, bad_server = _contexts(pair, anchors)

    with pytest.raises(ssl.SSLError):
        shake(bad_client, good_server)
    with pytest.raises(ssl.SSLError):
        shake(good_client, bad_server)


def test_a_chain_that_a_node_began_is_refused(cluster: Pair) -> None:
    beta = make_node(cluster, "beta", now=TODAY)
    below = _grandchild(cluster)
    client = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    client.check_hostname = False
    client.load_verify_locations(cadata=cluster.certificate_pem)
    contexts._load_pair(client, Pair(below.certificate_pem + beta.certificate_pem, below.key_pem))
    with pytest.raises(ssl.SSLError):
        shake(client, contexts.server_context(beta, cluster.certificate_pem))


def test_a_client_without_a_certificate_is_refused(cluster: Pair) -> None:
    _, server = _contexts(make_node(cluster, "beta", now=TODAY), cluster.certificate_pem)
    client = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    client.check_hostname = False
    client.load_verify_locations(cadata=cluster.certificate_pem)
    with pytest.raises(ssl.SSLError):
        shake(client, server)


def test_an_older_tls_is_refused(cluster: Pair) -> None:
    pair = make_node(cluster, "beta", now=TODAY)
    client, server = _contexts(pair, cluster.certificate_pem)
    for context in (client, server):
        assert context.minimum_version == context.maximum_version == ssl.TLSVersion.TLSv1_3
    client.minimum_version = ssl.TLSVersion.TLSv1_2
    client.maximum_version = ssl.TLSVersion.TLSv1_2
    with pytest.raises(ssl.SSLError):
        shake(client, server)


def test_no_session_outlives_its_connection(cluster: Pair) -> None:
    pair = make_node(cluster, "beta", now=TODAY)
    client, server = _contexts(pair, cluster.certificate_pem)
    called, _ = shake(client, server)
    assert called.session is None or not called.session.has_ticket
    assert server.num_tickets == 0


def test_during_a_renewal_of_the_cluster_old_and_new_meet(cluster: Pair) -> None:
    new = make_cluster(now=TODAY)  # of the same name
    both = cluster.certificate_pem + new.certificate_pem
    old_pair, new_pair = (make_node(one, "alpha", now=TODAY) for one in (cluster, new))
    for mine, theirs in [(old_pair, new_pair), (new_pair, old_pair), (new_pair, new_pair)]:
        shake(contexts.client_context(mine, both), contexts.server_context(theirs, both))


def test_a_common_pair_meets_itself_and_signs_nobody(cluster: Pair) -> None:
    common = make_certless_pair("prod", now=TODAY, lifetime=timedelta(hours=1))
    anchors = cluster.certificate_pem + common.certificate_pem
    client, server = _contexts(common, anchors)
    shake(client, server)

    signed = forged(common, [], starts=TODAY - timedelta(days=1), ends=TODAY + timedelta(days=1))
    with pytest.raises(ssl.SSLError):
        shake(contexts.client_context(signed, anchors), server)
    alone = contexts.server_context(make_node(cluster, "beta", now=TODAY), cluster.certificate_pem)
    with pytest.raises(ssl.SSLError):
        shake(client, alone)


def test_no_key_is_left_on_a_disk_or_open(cluster: Pair, tmp_path: Path) -> None:
    pair = make_node(cluster, "beta", now=TODAY)
    before = sorted(os.listdir("/proc/self/fd"))
    here = os.getcwd()
    os.chdir(tmp_path)
    try:
        _contexts(pair, cluster.certificate_pem)
    finally:
        os.chdir(here)
    assert sorted(os.listdir("/proc/self/fd")) == before
    assert list(tmp_path.iterdir()) == []


def test_a_pair_that_does_not_belong_together_makes_no_context(cluster: Pair) -> None:
    alpha, beta = (make_node(cluster, name, now=TODAY) for name in ("alpha", "beta"))
    mixed = Pair(alpha.certificate_pem, beta.key_pem)
    for make in (contexts.server_context, contexts.client_context):
        with pytest.raises(BadPem):
            make(mixed, cluster.certificate_pem)
        for anchors in ("", "no certificate"):
            with pytest.raises(BadPem):
                make(alpha, anchors)


def test_the_authority_of_a_join_is_the_same_on_both_sides() -> None:
    first, second = (load_certificate(join_anchor(b"0" * 16)) for _ in range(2))
    assert first.public_key() == second.public_key()
    assert first.public_key() != load_certificate(join_anchor(b"1" * 16)).public_key()


def test_an_authority_below_the_clusters_is_refused(cluster: Pair) -> None:
    key = make_key()
    builder = authority_builder(
        subject_of("below"), key.public_key(), TODAY, TODAY + timedelta(days=1)
    )
    builder._issuer_name = x509.Name(load_certificate(cluster.certificate_pem).subject)
    below = sign(builder, load_key(cluster.key_pem))
    pair = forged(
        Pair(below, dump_key(key)),
        names_for("alpha", UUIDS["alpha"]),
        starts=TODAY - timedelta(days=1),
        ends=TODAY + timedelta(days=1),
    )
    client = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    client.check_hostname = False
    client.load_verify_locations(cadata=cluster.certificate_pem)
    contexts._load_pair(client, Pair(pair.certificate_pem + below, pair.key_pem))
    server = contexts.server_context(make_node(cluster, "beta", now=TODAY), cluster.certificate_pem)
    with pytest.raises(ssl.SSLError):
        shake(client, server)


def test_who_asks_for_a_name_is_shown_what_is_kept_under_it(cluster: Pair) -> None:
    own, caller = (make_node(cluster, name, now=TODAY) for name in ("beta", "alpha"))
    common = make_certless_pair("prod", now=TODAY, lifetime=timedelta(hours=2))
    anchors = cluster.certificate_pem + common.certificate_pem
    server = contexts.server_context(own, anchors, {"common.invalid": common})
    wanted = {"": own, "other.invalid": own, "common.invalid": common}
    for name, shown in wanted.items():
        for pair in (caller, common):
            client, _ = shake(contexts.client_context(pair, anchors), server, name)
            assert client.getpeercert(True) == ssl.PEM_cert_to_DER_cert(shown.certificate_pem)


def test_who_asks_for_a_name_is_not_let_in_by_it(cluster: Pair) -> None:
    own = make_node(cluster, "beta", now=TODAY)
    common = make_certless_pair("prod", now=TODAY, lifetime=timedelta(hours=2))
    anchors = cluster.certificate_pem + common.certificate_pem
    server = contexts.server_context(own, anchors, {"common.invalid": common})
    with pytest.raises(ssl.SSLError):
        shake(contexts.client_context(_foreign(cluster), anchors), server, "common.invalid")
