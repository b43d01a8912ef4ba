"""Who a peer is: one table of answers, those that refuse first."""

from collections.abc import Callable
from datetime import datetime, timedelta
from uuid import UUID

import pytest
from attrs import evolve
from cryptography import x509
from hypothesis import given
from hypothesis import strategies as st

from kvmsec.pki.certificates import (
    anchors_of,
    fingerprint_of,
)
from kvmsec.pki.judgement import (
    PeerRefused,
    Step,
    Trust,
    judge,
    judge_orderer,
    require_node,
)
from kvmsec.pki.keys import KeyKind
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
from tests.unit.kvmsec.pki.refused_peers import (
    BOTH,
    REFUSED,
    Shown,
    bare_certificate,
    below,
    common_pair,
    named,
    shown_der,
)

ALPHA, BETA, PLAIN = UUIDS["alpha"], UUIDS["beta"], UUIDS["plain"]


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
    assert judge_orderer(shown_der(pair), trust, NOW).may_order


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
    assert judge_orderer(shown_der(old), trust, NOW).may_order
    assert judge_orderer(shown_der(renewed), trust, NOW).may_order


def test_a_certificate_that_says_no_more_than_it_must_is_taken(town: Town) -> None:
    """Of openssl's making, for one: the cases above are refused for what they say, not lack."""
    der, trust, now = bare_certificate(town, (BOTH, False))
    listed = evolve(trust, candidates={ALPHA: frozenset({fingerprint_of(der)})})
    assert judge_orderer(der, listed, now).may_order
    der, trust, now = below(town, (x509.BasicConstraints(True, None), True))
    listed = evolve(trust, candidates={ALPHA: frozenset({fingerprint_of(der)})})
    assert judge_orderer(der, listed, now).may_order


def test_the_common_certificate_passes_while_it_lasts(town: Town) -> None:
    pair = common_pair()
    certless = fingerprint_of(pair.certificate_pem)
    # The list may be what is broken then.
    trust = evolve(town.trust(), candidates={}, certless=certless)

    for now in (NOW, NOW + timedelta(hours=2)):
        peer = judge_orderer(shown_der(pair), trust, now)
        assert (peer.uuid, peer.fingerprint, peer.may_order) == (None, certless, True)
        assert require_node(shown_der(pair), trust, name="beta", uuid=BETA, now=now).uuid is None


def test_a_certificate_of_a_node_is_no_common_one(town: Town) -> None:
    certless = fingerprint_of(town.pairs["plain"].certificate_pem)
    trust = evolve(town.trust(), certless=certless)

    assert not judge(town.der("plain"), trust, NOW).may_order


def test_a_common_certificate_signs_no_node(town: Town) -> None:
    common = common_pair()
    trust = evolve(
        town.trust(),
        anchors=anchors_of(common.certificate_pem),
        certless=fingerprint_of(common.certificate_pem),
    )
    with pytest.raises(PeerRefused) as caught:
        judge(shown_der(forged(common, names_for("alpha", ALPHA))), trust, NOW)
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
    other = shown_der(make_node(town.cluster, "plain"))

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
    der, trust, now = named(town, x509.DNSName("alpha"), uri)
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
