"""Who a peer is: one table of answers, those that refuse first."""

from collections.abc import Callable
from datetime import datetime, timedelta
from uuid import UUID

import pytest
from attrs import evolve
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import rsa
from cryptography.x509.oid import ExtendedKeyUsageOID, ObjectIdentifier
from hypothesis import given
from hypothesis import strategies as st

from kvmsec.pki.certificates import (
    Pair,
    anchors_of,
    der_of,
    fingerprint_of,
    make_certless_pair,
)
from kvmsec.pki.issuing import authority_builder, leaf_builder, sign, subject_of
from kvmsec.pki.judgement import (
    PeerRefused,
    Step,
    Trust,
    judge,
    judge_orderer,
    require_node,
)
from kvmsec.pki.keys import KeyKind, dump_key, make_key
from kvmsec.pki.standing import judge_standing
from tests.unit.kvmsec.pki.authorities import (
    NOW,
    UUIDS,
    Town,
    forged,
    make_cluster,
    make_node,
    names_for,
)

ALPHA, BETA, PLAIN = UUIDS["alpha"], UUIDS["beta"], UUIDS["plain"]
Shown = tuple[bytes, Trust, datetime]


@pytest.fixture(scope="module")
def town() -> Town:
    return Town()


def _der(pair: Pair) -> bytes:
    return der_of(pair.certificate_pem)


def _shown(pair: Pair, town: Town, now: datetime = NOW) -> Shown:
    return _der(pair), town.trust(), now


def _named(town: Town, *names: x509.GeneralName) -> Shown:
    return _shown(forged(town.cluster, list(names)), town)


def _candidate(town: Town, **more: object) -> Pair:
    return forged(town.cluster, names_for("alpha", ALPHA), **more)  # type: ignore[arg-type]


def foreign_authority(town: Town) -> Shown:
    return _shown(make_node(make_cluster(), "alpha"), town)


def no_anchor(town: Town) -> Shown:
    return town.der("alpha"), evolve(town.trust(), anchors=()), NOW


def self_signed(town: Town) -> Shown:
    pair = make_cluster()
    return _shown(forged(pair, names_for("alpha", ALPHA)), town)


def the_cluster_itself(town: Town) -> Shown:
    return _shown(town.cluster, town)


def authority_with_a_nodes_names(town: Town) -> Shown:
    builder = authority_builder(
        subject_of("alpha"), make_key().public_key(), NOW, NOW + timedelta(days=1)
    )
    # The issuer that is said there is the subject; it is said anew.
    builder._issuer_name = None
    return _shown(forged(town.cluster, names_for("alpha", ALPHA), builder=builder), town)


def _bare(town: Town, *more: tuple[x509.ExtensionType, bool]) -> Shown:
    """A candidate's certificate with these extensions and its names alone."""
    builder = x509.CertificateBuilder(
        subject_name=subject_of("alpha"),
        public_key=make_key().public_key(),
        serial_number=7,
        not_valid_before=NOW - timedelta(days=1),
        not_valid_after=NOW + timedelta(days=1),
    )
    return _shown(forged(town.cluster, names_for("alpha", ALPHA), *more, builder=builder), town)


BOTH = x509.ExtendedKeyUsage([ExtendedKeyUsageOID.SERVER_AUTH, ExtendedKeyUsageOID.CLIENT_AUTH])


def _usage(**more: bool) -> x509.KeyUsage:
    names = (
        *("digital_signature", "content_commitment", "key_encipherment", "data_encipherment"),
        *("key_agreement", "key_cert_sign", "crl_sign", "encipher_only", "decipher_only"),
    )
    return x509.KeyUsage(**(dict.fromkeys(names, False) | more))


def authority_by_constraint_alone(town: Town) -> Shown:
    return _bare(town, (BOTH, False), (x509.BasicConstraints(True, None), True))


def authority_by_usage_alone(town: Town) -> Shown:
    usage = _usage(digital_signature=True, key_cert_sign=True)
    return _bare(town, (BOTH, False), (usage, True))


def no_signature_usage(town: Town) -> Shown:
    return _bare(town, (BOTH, False), (_usage(key_encipherment=True), True))


def no_purpose(town: Town) -> Shown:
    return _bare(town)


def server_only(town: Town) -> Shown:
    return _bare(town, (x509.ExtendedKeyUsage([ExtendedKeyUsageOID.SERVER_AUTH]), False))


def _below(town: Town, *more: tuple[x509.ExtensionType, bool]) -> Shown:
    """A node of an anchor that has these extensions alone."""
    key = make_key()
    subject = subject_of("an anchor")
    builder = x509.CertificateBuilder(
        issuer_name=subject,
        subject_name=subject,
        public_key=key.public_key(),
        serial_number=7,
        not_valid_before=NOW - timedelta(days=1),
        not_valid_after=NOW + timedelta(days=1),
    )
    for extension, is_critical in more:
        builder = builder.add_extension(extension, critical=is_critical)
    anchor = Pair(sign(builder, key), dump_key(key))
    pair = forged(anchor, names_for("alpha", ALPHA))
    return _der(pair), evolve(town.trust(), anchors=anchors_of(anchor.certificate_pem)), NOW


def anchor_without_constraint(town: Town) -> Shown:
    return _below(town, (_usage(key_cert_sign=True), True))


def anchor_without_usage_to_sign(town: Town) -> Shown:
    usage = _usage(digital_signature=True)
    return _below(town, (x509.BasicConstraints(True, 0), True), (usage, True))


def anchor_with_a_weak_key(town: Town) -> Shown:
    key = rsa.generate_private_key(65537, 2048)
    subject = subject_of("an anchor")
    builder = authority_builder(
        subject, key.public_key(), NOW - timedelta(days=1), NOW + timedelta(days=1)
    )
    anchor = builder.sign(key, hashes.SHA256())
    leaf = leaf_builder(
        subject_of("alpha"),
        make_key().public_key(),
        NOW - timedelta(days=1),
        NOW + timedelta(days=1),
    )
    names = x509.SubjectAlternativeName(names_for("alpha", ALPHA))
    signed = leaf.issuer_name(subject).add_extension(names, critical=False)
    der = serialization.Encoding.DER
    anchors = (anchor.public_bytes(der),)
    shown = signed.sign(key, hashes.SHA256()).public_bytes(der)
    return shown, evolve(town.trust(), anchors=anchors), NOW


def signed_by_a_node(town: Town) -> Shown:
    return _shown(forged(town.pairs["beta"], names_for("alpha", ALPHA)), town)


def node_as_anchor(town: Town) -> Shown:
    pair = forged(town.pairs["beta"], names_for("alpha", ALPHA))
    anchors = anchors_of(town.pairs["beta"].certificate_pem)
    return _der(pair), evolve(town.trust(), anchors=anchors), NOW


def changed_after_signing(town: Town) -> Shown:
    der = bytearray(town.der("alpha"))
    der[-1] ^= 1
    return bytes(der), town.trust(), NOW


def client_only(town: Town) -> Shown:
    return _bare(town, (x509.ExtendedKeyUsage([ExtendedKeyUsageOID.CLIENT_AUTH]), False))


def unknown_critical_extension(town: Town) -> Shown:
    odd = x509.UnrecognizedExtension(ObjectIdentifier("1.2.3.4"), b"\x05\x00")
    return _shown(forged(town.cluster, names_for("alpha", ALPHA), (odd, True)), town)


def expired(town: Town) -> Shown:
    return town.der("alpha"), town.trust(), NOW + timedelta(days=10, seconds=151)


def not_yet_valid(town: Town) -> Shown:
    return town.der("alpha"), town.trust(), NOW - timedelta(minutes=5, seconds=151)


def expired_anchor(town: Town) -> Shown:
    cluster = make_cluster(days=1)
    pair = forged(cluster, names_for("alpha", ALPHA), ends=NOW + timedelta(days=9))
    trust = Town(cluster).trust()
    return _der(pair), trust, NOW + timedelta(days=2)


def not_on_the_list(town: Town) -> Shown:
    return _shown(make_node(town.cluster, "alpha"), town)


def listed_under_another(town: Town) -> Shown:
    return town.der("alpha"), town.trust(alpha="beta", beta="alpha"), NOW


def plain_listed_under_another(town: Town) -> Shown:
    return town.der("plain"), town.trust(alpha="plain"), NOW


def empty_list(town: Town) -> Shown:
    return town.der("alpha"), evolve(town.trust(), candidates={}), NOW


def empty_fingerprints(town: Town) -> Shown:
    return town.der("alpha"), evolve(town.trust(), candidates={ALPHA: frozenset()}), NOW


def demoted(town: Town) -> Shown:
    return town.der("alpha"), town.trust(beta="beta"), NOW


def never_a_candidate(town: Town) -> Shown:
    return town.der("plain"), town.trust(), NOW


def name_of_another_member(town: Town) -> Shown:
    return _named(town, *names_for("beta", ALPHA))


def name_in_other_letters(town: Town) -> Shown:
    return _named(town, *names_for("Alpha", ALPHA))


def removed_member(town: Town) -> Shown:
    trust = town.trust()
    return town.der("alpha"), evolve(trust, members={BETA: "beta"}), NOW


def no_names(town: Town) -> Shown:
    return _shown(forged(town.cluster, None), town)


def name_only(town: Town) -> Shown:
    return _named(town, x509.DNSName("alpha"))


def uuid_only(town: Town) -> Shown:
    return _named(town, x509.UniformResourceIdentifier(ALPHA.urn))


def names_of_two(town: Town) -> Shown:
    return _named(town, *names_for("alpha", ALPHA), *names_for("beta", BETA))


def a_name_more(town: Town) -> Shown:
    return _named(town, *names_for("alpha", ALPHA), x509.RFC822Name("root@example.org"))


def a_wildcard(town: Town) -> Shown:
    return _named(town, *names_for("*", ALPHA))


def uuid_without_hyphens(town: Town) -> Shown:
    uri = x509.UniformResourceIdentifier(f"urn:uuid:{ALPHA.hex}")
    return _named(town, x509.DNSName("alpha"), uri)


def another_uri(town: Town) -> Shown:
    return _named(town, x509.DNSName("alpha"), x509.UniformResourceIdentifier("https://a"))


def nothing_shown(town: Town) -> Shown:
    return b"", town.trust(), NOW


def garbage(town: Town) -> Shown:
    return b"\x30\x82\x01\x00garbage", town.trust(), NOW


def cut_off(town: Town) -> Shown:
    return town.der("alpha")[:-20], town.trust(), NOW


def something_behind(town: Town) -> Shown:
    return town.der("alpha") + b"\0", town.trust(), NOW


def huge(town: Town) -> Shown:
    return b"\x30" * (1 << 20), town.trust(), NOW


def _common(now: datetime = NOW) -> Pair:
    return make_certless_pair("prod", now=now, lifetime=timedelta(hours=2))


def common_where_there_is_none(town: Town) -> Shown:
    return _shown(_common(), town)


def another_common(town: Town) -> Shown:
    trust = evolve(town.trust(), certless=fingerprint_of(_common().certificate_pem))
    return _der(_common()), trust, NOW


def common_after_its_end(town: Town) -> Shown:
    pair = _common()
    trust = evolve(town.trust(), certless=fingerprint_of(pair.certificate_pem))
    return _der(pair), trust, NOW + timedelta(hours=2, seconds=1)


def common_signed_by_the_cluster(town: Town) -> Shown:
    pair = forged(town.cluster, [x509.UniformResourceIdentifier("kvmsec:certless")])
    trust = evolve(town.trust(), certless=fingerprint_of(pair.certificate_pem))
    return _der(pair), trust, NOW


REFUSED: list[tuple[Callable[[Town], Shown], Step]] = [
    (nothing_shown, Step.NAME),
    (garbage, Step.NAME),
    (cut_off, Step.NAME),
    (something_behind, Step.NAME),
    (huge, Step.NAME),
    (no_names, Step.NAME),
    (name_only, Step.NAME),
    (uuid_only, Step.NAME),
    (names_of_two, Step.NAME),
    (a_name_more, Step.NAME),
    (a_wildcard, Step.NAME),
    (uuid_without_hyphens, Step.NAME),
    (another_uri, Step.NAME),
    (the_cluster_itself, Step.NAME),
    (name_of_another_member, Step.NAME),
    (name_in_other_letters, Step.NAME),
    (removed_member, Step.NAME),
    (foreign_authority, Step.CHAIN),
    (no_anchor, Step.CHAIN),
    (self_signed, Step.CHAIN),
    (authority_with_a_nodes_names, Step.CHAIN),
    (signed_by_a_node, Step.CHAIN),
    (node_as_anchor, Step.CHAIN),
    (changed_after_signing, Step.CHAIN),
    (client_only, Step.CHAIN),
    (server_only, Step.CHAIN),
    (no_purpose, Step.CHAIN),
    (no_signature_usage, Step.CHAIN),
    (authority_by_constraint_alone, Step.CHAIN),
    (authority_by_usage_alone, Step.CHAIN),
    (anchor_without_constraint, Step.CHAIN),
    (anchor_without_usage_to_sign, Step.CHAIN),
    (anchor_with_a_weak_key, Step.CHAIN),
    (unknown_critical_extension, Step.CHAIN),
    (common_signed_by_the_cluster, Step.CHAIN),
    (expired, Step.VALIDITY),
    (not_yet_valid, Step.VALIDITY),
    (expired_anchor, Step.VALIDITY),
    (common_after_its_end, Step.VALIDITY),
    (not_on_the_list, Step.FINGERPRINT),
    (listed_under_another, Step.FINGERPRINT),
    (plain_listed_under_another, Step.FINGERPRINT),
    (empty_list, Step.FINGERPRINT),
    (empty_fingerprints, Step.FINGERPRINT),
    (common_where_there_is_none, Step.FINGERPRINT),
    (another_common, Step.FINGERPRINT),
    (demoted, Step.ROLE),
    (never_a_candidate, Step.ROLE),
]


@pytest.mark.parametrize(("shown", "step"), REFUSED, ids=lambda one: getattr(one, "__name__", one))
def test_an_order_is_refused_by_the_first_step_that_fails(
    shown: Callable[[Town], Shown], step: Step, town: Town
) -> None:
    der, trust, now = shown(town)
    with pytest.raises(PeerRefused) as caught:
        judge_orderer(der, trust, now)
    assert caught.value.step is step
    assert caught.value.hint
    assert "\n" not in caught.value.message


@pytest.mark.parametrize(("shown", "step"), REFUSED, ids=lambda one: getattr(one, "__name__", one))
def test_a_node_that_is_called_is_held_to_all_but_the_role(
    shown: Callable[[Town], Shown], step: Step, town: Town
) -> None:
    der, trust, now = shown(town)
    if step is Step.ROLE:
        assert not judge(der, trust, now).may_order
        return
    with pytest.raises(PeerRefused):
        judge(der, trust, now)
    with pytest.raises(PeerRefused):
        require_node(der, trust, name="alpha", uuid=ALPHA, now=now)


@pytest.mark.parametrize("name", ["alpha", "beta"])
def test_a_candidate_may_order(name: str, town: Town) -> None:
    peer = judge_orderer(town.der(name), town.trust(), NOW)

    assert (peer.name, peer.uuid, peer.may_order) == (name, UUIDS[name], True)
    assert peer.fingerprint == fingerprint_of(town.pairs[name].certificate_pem)


def test_a_member_that_is_no_candidate_is_known_and_may_not_order(town: Town) -> None:
    peer = judge(town.der("plain"), town.trust(), NOW)

    assert (peer.name, peer.uuid, peer.may_order) == ("plain", PLAIN, False)


@pytest.mark.parametrize(
    "now",
    [NOW - timedelta(minutes=5, seconds=150), NOW + timedelta(days=10, seconds=150)],
)
def test_a_clock_may_be_150_seconds_off(now: datetime, town: Town) -> None:
    assert judge_orderer(town.der("alpha"), town.trust(), now).name == "alpha"


@pytest.mark.parametrize("kind", KeyKind)
@pytest.mark.parametrize("cluster_kind", KeyKind)
def test_each_kind_of_key_is_judged_under_each(kind: KeyKind, cluster_kind: KeyKind) -> None:
    cluster = make_cluster(cluster_kind)
    pair = make_node(cluster, "alpha", kind=kind)
    trust = Trust(
        anchors=anchors_of(cluster.certificate_pem),
        members={ALPHA: "alpha"},
        candidates={ALPHA: frozenset({fingerprint_of(pair.certificate_pem)})},
    )
    assert judge_orderer(_der(pair), trust, NOW).may_order


def test_during_a_renewal_both_anchors_and_both_certificates_count(town: Town) -> None:
    new = make_cluster()
    renewed = make_node(new, "alpha")
    old = town.pairs["alpha"]
    both = frozenset(fingerprint_of(pair.certificate_pem) for pair in (old, renewed))
    trust = evolve(
        town.trust(),
        anchors=anchors_of(town.cluster.certificate_pem + new.certificate_pem),
        candidates={ALPHA: both},
    )
    assert judge_orderer(_der(old), trust, NOW).may_order
    assert judge_orderer(_der(renewed), trust, NOW).may_order


def test_a_certificate_that_says_no_more_than_it_must_is_taken(town: Town) -> None:
    """Of openssl's making, for one: the cases above are refused for what they say, not lack."""
    der, trust, now = _bare(town, (BOTH, False))
    listed = evolve(trust, candidates={ALPHA: frozenset({fingerprint_of(der)})})
    assert judge_orderer(der, listed, now).may_order
    der, trust, now = _below(town, (x509.BasicConstraints(True, None), True))
    listed = evolve(trust, candidates={ALPHA: frozenset({fingerprint_of(der)})})
    assert judge_orderer(der, listed, now).may_order


def test_the_common_certificate_passes_while_it_lasts(town: Town) -> None:
    pair = _common()
    certless = fingerprint_of(pair.certificate_pem)
    # The list may be what is broken then.
    trust = evolve(town.trust(), candidates={}, certless=certless)

    for now in (NOW, NOW + timedelta(hours=2)):
        peer = judge_orderer(_der(pair), trust, now)
        assert (peer.uuid, peer.fingerprint, peer.may_order) == (None, certless, True)
        assert require_node(_der(pair), trust, name="beta", uuid=BETA, now=now).uuid is None


def test_a_certificate_of_a_node_is_no_common_one(town: Town) -> None:
    certless = fingerprint_of(town.pairs["plain"].certificate_pem)
    trust = evolve(town.trust(), certless=certless)

    assert not judge(town.der("plain"), trust, NOW).may_order


def test_a_common_certificate_signs_no_node(town: Town) -> None:
    common = _common()
    trust = evolve(
        town.trust(),
        anchors=anchors_of(common.certificate_pem),
        certless=fingerprint_of(common.certificate_pem),
    )
    with pytest.raises(PeerRefused) as caught:
        judge(_der(forged(common, names_for("alpha", ALPHA))), trust, NOW)
    assert caught.value.step is Step.CHAIN


def test_the_node_that_was_meant_is_taken(town: Town) -> None:
    peer = require_node(town.der("plain"), town.trust(), name="plain", uuid=PLAIN, now=NOW)
    assert peer.name == "plain"


@pytest.mark.parametrize(("name", "uuid"), [("beta", BETA), ("alpha", BETA), ("beta", ALPHA)])
def test_another_node_that_answers_is_refused(name: str, uuid: UUID, town: Town) -> None:
    with pytest.raises(PeerRefused) as caught:
        require_node(town.der("alpha"), town.trust(), name=name, uuid=uuid, now=NOW)
    assert caught.value.step is Step.NAME


def test_a_plain_node_is_known_by_the_certificate_that_the_state_has_for_it(town: Town) -> None:
    known = {PLAIN: frozenset({fingerprint_of(town.pairs["plain"].certificate_pem)})}
    trust = evolve(town.trust(), certificates=known)
    # A key that was stolen before a renewal, or one that a demoted candidate has signed itself.
    other = _der(make_node(town.cluster, "plain"))

    require_node(town.der("plain"), trust, name="plain", uuid=PLAIN, now=NOW)
    with pytest.raises(PeerRefused) as caught:
        require_node(other, trust, name="plain", uuid=PLAIN, now=NOW)
    assert caught.value.step is Step.FINGERPRINT


def test_a_name_and_a_fingerprint_are_judged_again_without_the_certificate(town: Town) -> None:
    peer = judge_orderer(town.der("alpha"), town.trust(), NOW)

    assert judge_standing("alpha", ALPHA, peer.fingerprint, town.trust()) == peer
    for name, uuid, step in [
        ("alpha", BETA, Step.NAME),
        ("beta", BETA, Step.FINGERPRINT),
        ("plain", PLAIN, Step.FINGERPRINT),
        ("anything", None, Step.FINGERPRINT),
    ]:
        with pytest.raises(PeerRefused) as caught:
            judge_standing(name, uuid, peer.fingerprint, town.trust())
        assert caught.value.step is step


def test_what_a_peer_chose_is_shown_escaped(town: Town) -> None:
    uri = x509.UniformResourceIdentifier("urn:\x1b[2J\n" + "x" * 5000)
    der, trust, now = _named(town, x509.DNSName("alpha"), uri)
    with pytest.raises(PeerRefused) as caught:
        judge(der, trust, now)
    assert caught.value.message.isprintable()
    assert len(caught.value.message) < 1000


@pytest.mark.filterwarnings("ignore:Parsed a serial number")
def test_no_certificate_with_a_bit_turned_orders(town: Town) -> None:
    good, trust = town.der("alpha"), town.trust()
    for position in range(8 * len(good)):
        der = bytearray(good)
        der[position // 8] ^= 1 << position % 8
        with pytest.raises(PeerRefused):
            judge_orderer(bytes(der), trust, NOW)


@pytest.mark.filterwarnings("ignore:Parsed a serial number")
@given(der=st.binary(max_size=60), at=st.integers(0, 400))
def test_no_certificate_with_other_bytes_in_it_orders(der: bytes, at: int, town: Town) -> None:
    good = town.der("alpha")
    changed = good[:at] + der + good[at + len(der) :]
    if changed == good:
        return
    with pytest.raises(PeerRefused):
        judge_orderer(changed, town.trust(), NOW)


@given(der=st.binary(max_size=300))
def test_garbage_is_refused_and_nothing_else_happens(der: bytes, town: Town) -> None:
    with pytest.raises(PeerRefused):
        judge(der, town.trust(), NOW)
