"""Peers that are refused, each with the step that it fails at: the table of `test_judgement`."""

from collections.abc import Callable
from datetime import datetime, timedelta

from attrs import evolve
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import rsa
from cryptography.x509.oid import ExtendedKeyUsageOID, ObjectIdentifier

from kvmsec.pki.certificates import (
    Pair,
    anchors_of,
    der_of,
    fingerprint_of,
    make_certless_pair,
)
from kvmsec.pki.issuing import authority_builder, leaf_builder, sign, subject_of
from kvmsec.pki.judgement import (
    Step,
    Trust,
)
from kvmsec.pki.keys import dump_key, make_key
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


def shown_der(pair: Pair) -> bytes:
    return der_of(pair.certificate_pem)


def _shown(pair: Pair, town: Town, now: datetime = NOW) -> Shown:
    return shown_der(pair), town.trust(), now


def named(town: Town, *names: x509.GeneralName) -> Shown:
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


def bare_certificate(town: Town, *more: tuple[x509.ExtensionType, bool]) -> Shown:
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
    return bare_certificate(town, (BOTH, False), (x509.BasicConstraints(True, None), True))


def authority_by_usage_alone(town: Town) -> Shown:
    usage = _usage(digital_signature=True, key_cert_sign=True)
    return bare_certificate(town, (BOTH, False), (usage, True))


def no_signature_usage(town: Town) -> Shown:
    return bare_certificate(town, (BOTH, False), (_usage(key_encipherment=True), True))


def no_purpose(town: Town) -> Shown:
    return bare_certificate(town)


def server_only(town: Town) -> Shown:
    return bare_certificate(town, (x509.ExtendedKeyUsage([ExtendedKeyUsageOID.SERVER_AUTH]), False))


def below(town: Town, *more: tuple[x509.ExtensionType, bool]) -> Shown:
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
    return shown_der(pair), evolve(town.trust(), anchors=anchors_of(anchor.certificate_pem)), NOW


def anchor_without_constraint(town: Town) -> Shown:
    return below(town, (_usage(key_cert_sign=True), True))


def anchor_without_usage_to_sign(town: Town) -> Shown:
    usage = _usage(digital_signature=True)
    return below(town, (x509.BasicConstraints(True, 0), True), (usage, True))


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
    return shown_der(pair), evolve(town.trust(), anchors=anchors), NOW


def changed_after_signing(town: Town) -> Shown:
    der = bytearray(town.der("alpha"))
    der[-1] ^= 1
    return bytes(der), town.trust(), NOW


def client_only(town: Town) -> Shown:
    return bare_certificate(town, (x509.ExtendedKeyUsage([ExtendedKeyUsageOID.CLIENT_AUTH]), False))


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
    return shown_der(pair), trust, NOW + timedelta(days=2)


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
    return named(town, *names_for("beta", ALPHA))


def name_in_other_letters(town: Town) -> Shown:
    return named(town, *names_for("Alpha", ALPHA))


def removed_member(town: Town) -> Shown:
    trust = town.trust()
    return town.der("alpha"), evolve(trust, members={BETA: "beta"}), NOW


def no_names(town: Town) -> Shown:
    return _shown(forged(town.cluster, None), town)


def name_only(town: Town) -> Shown:
    return named(town, x509.DNSName("alpha"))


def uuid_only(town: Town) -> Shown:
    return named(town, x509.UniformResourceIdentifier(ALPHA.urn))


def names_of_two(town: Town) -> Shown:
    return named(town, *names_for("alpha", ALPHA), *names_for("beta", BETA))


def a_name_more(town: Town) -> Shown:
    return named(town, *names_for("alpha", ALPHA), x509.RFC822Name("root@example.org"))


def a_wildcard(town: Town) -> Shown:
    return named(town, *names_for("*", ALPHA))


def uuid_without_hyphens(town: Town) -> Shown:
    uri = x509.UniformResourceIdentifier(f"urn:uuid:{ALPHA.hex}")
    return named(town, x509.DNSName("alpha"), uri)


def another_uri(town: Town) -> Shown:
    return named(town, x509.DNSName("alpha"), x509.UniformResourceIdentifier("https://a"))


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


def common_pair(now: datetime = NOW) -> Pair:
    return make_certless_pair("prod", now=now, lifetime=timedelta(hours=2))


def common_where_there_is_none(town: Town) -> Shown:
    return _shown(common_pair(), town)


def another_common(town: Town) -> Shown:
    trust = evolve(town.trust(), certless=fingerprint_of(common_pair().certificate_pem))
    return shown_der(common_pair()), trust, NOW


def common_after_its_end(town: Town) -> Shown:
    pair = common_pair()
    trust = evolve(town.trust(), certless=fingerprint_of(pair.certificate_pem))
    return shown_der(pair), trust, NOW + timedelta(hours=2, seconds=1)


def common_signed_by_the_cluster(town: Town) -> Shown:
    pair = forged(town.cluster, [x509.UniformResourceIdentifier("kvmsec:certless")])
    trust = evolve(town.trust(), certless=fingerprint_of(pair.certificate_pem))
    return shown_der(pair), trust, NOW


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
