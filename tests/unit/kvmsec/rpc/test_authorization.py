"""Who may make which call; the certificates themselves are judged in the tests of `kvmsec.pki`."""

from datetime import UTC, datetime, timedelta
from uuid import UUID

import pytest
from attrs import evolve

from kvmsec.pki.certificates import (
    anchors_of,
    der_of,
    fingerprint_of,
    make_cluster_pair,
    make_request,
    sign_request,
)
from kvmsec.pki.errors import PeerRefused
from kvmsec.pki.judgement import judge_orderer
from kvmsec.pki.standing import Peer, Trust
from kvmsec.rpc import errors
from kvmsec.rpc.authorization import Judgements, authorize, authorize_again, refusal
from kvmsec.rpc.calls import CALLS, Right
from kvmsec.rpc.wire import Caller

NOW = datetime(2026, 1, 2, tzinfo=UTC)
NODE = UUID(int=1)
CLUSTER = make_cluster_pair("trial", UUID(int=9), now=NOW)
DER = der_of(
    sign_request(
        CLUSTER,
        make_request("node1", NODE).request_pem,
        node_name="node1",
        node_uuid=NODE,
        now=NOW,
    )
)
PRINT = fingerprint_of(DER)
TRUST = Trust(
    anchors=anchors_of(CLUSTER.certificate_pem),
    members={NODE: "node1"},
    candidates={NODE: frozenset({PRINT})},
)
DEMOTED = evolve(TRUST, candidates={UUID(int=2): frozenset({"a" * 64})})
CALLER = Caller(fingerprint=PRINT, name="node1", uuid=NODE)
STRANGER = Caller(fingerprint=PRINT)

CANDIDATES = CALLS["instance.start"]
JOINERS = CALLS["join.admit"]
LOCAL = evolve(CANDIDATES, right=Right.LOCAL)


@pytest.mark.parametrize(
    ("call", "trust", "expected"),
    [
        (CANDIDATES, TRUST, CALLER),
        (CANDIDATES, DEMOTED, "role"),
        (CANDIDATES, evolve(TRUST, members={}), "name"),
        (CANDIDATES, evolve(TRUST, anchors=()), "chain"),
        (CANDIDATES, None, "role"),
        (JOINERS, None, STRANGER),
        (JOINERS, TRUST, "role"),
        (LOCAL, TRUST, "role"),
        (LOCAL, None, "role"),
    ],
)
def test_who_may_make_a_call_over_the_network(
    call: object, trust: Trust | None, expected: object
) -> None:
    if isinstance(expected, Caller):
        assert authorize(call, DER, trust, NOW, Judgements()) == expected  # type: ignore[arg-type]
        return
    with pytest.raises(errors.Refused) as caught:
        authorize(call, DER, trust, NOW, Judgements())  # type: ignore[arg-type]
    assert caught.value.evidence == {"step": expected}


@pytest.mark.parametrize(("node", "whose"), [(None, "unusable"), ("node2", "unusable here")])
def test_without_a_list_nobody_is_let_in_and_it_is_said_whose_list_that_is(
    node: str | None, whose: str
) -> None:
    with pytest.raises(PeerRefused) as caught:
        judge_orderer(DER, evolve(TRUST, candidates={}), NOW)
    told = refusal(caught.value, node)
    assert told.evidence == {"step": "fingerprint", "list": whose}
    assert "restart its daemon" in (told.hint or "")


@pytest.mark.parametrize(
    ("call", "caller", "trust", "is_let_in"),
    [
        (CANDIDATES, None, TRUST, True),
        (CANDIDATES, None, None, True),
        (LOCAL, None, TRUST, True),
        (CANDIDATES, CALLER, TRUST, True),
        (CANDIDATES, CALLER, DEMOTED, False),
        (CANDIDATES, CALLER, None, False),
        (CANDIDATES, STRANGER, TRUST, False),
        (CANDIDATES, Caller(fingerprint="b" * 64, name="node1", uuid=NODE), TRUST, False),
        (CANDIDATES, Caller(fingerprint=PRINT, name="node2", uuid=NODE), TRUST, False),
        (CANDIDATES, Caller(fingerprint=PRINT, name="node1"), TRUST, False),
        (LOCAL, CALLER, TRUST, False),
        (JOINERS, STRANGER, None, True),
        (JOINERS, CALLER, TRUST, False),
        (JOINERS, STRANGER, TRUST, False),
    ],
)
def test_who_may_make_a_call_by_what_the_front_says(
    call: object, caller: Caller | None, trust: Trust | None, is_let_in: bool
) -> None:
    if is_let_in:
        authorize_again(call, caller, trust)  # type: ignore[arg-type]
        return
    with pytest.raises(errors.Refused):
        authorize_again(call, caller, trust)  # type: ignore[arg-type]


def test_every_call_of_the_table_but_these_is_for_candidates() -> None:
    others = {name: call.right for name, call in CALLS.items() if call.right != Right.CANDIDATE}
    assert others == {
        "join.hello": Right.JOINER,
        "join.admit": Right.JOINER,
        "rules.remove": Right.LOCAL,
    }


# What is remembered ----------------------------------------------------------------------------


def test_a_good_judgement_holds_for_a_while_and_for_the_same_trust() -> None:
    known = Judgements()
    authorize(CANDIDATES, DER, TRUST, NOW, known)
    broken = evolve(TRUST)  # Equal, but handed out anew: judged anew.
    object.__setattr__(broken, "anchors", ())

    assert authorize(CANDIDATES, DER, TRUST, NOW, known) == CALLER
    for trust in (DEMOTED, broken):
        with pytest.raises(errors.Refused):
            authorize(CANDIDATES, DER, trust, NOW, known)


def test_a_certificate_that_has_expired_meanwhile_is_refused() -> None:
    known = Judgements()
    authorize(CANDIDATES, DER, TRUST, NOW, known)
    with pytest.raises(errors.Refused) as caught:
        authorize(CANDIDATES, DER, TRUST, NOW + timedelta(days=9999), known)
    assert caught.value.evidence == {"step": "validity"}


@pytest.mark.parametrize(
    ("uuid", "away", "is_anew"),
    [
        (UUID(int=7), timedelta(seconds=14), False),
        (UUID(int=7), timedelta(seconds=15), True),
        (UUID(int=7), timedelta(seconds=-1), True),
        pytest.param(None, timedelta(seconds=1), True, id="the common one ends at its time"),
    ],
)
def test_a_judgement_is_made_anew_after_a_while_or_when_the_clock_was_set_back(
    uuid: UUID | None, away: timedelta, is_anew: bool
) -> None:
    asked = []
    known = Judgements()

    def judge() -> Peer:
        asked.append(True)
        return Peer(name="node", uuid=uuid, fingerprint="f", may_order=True)

    known.of("a", TRUST, NOW, judge)
    known.of("a", TRUST, NOW, judge)
    assert len(asked) == 1
    known.of("a", TRUST, NOW + away, judge)
    assert len(asked) == 1 + is_anew


def test_what_is_remembered_of_judgements_is_bounded() -> None:
    known = Judgements()
    for number in range(2_000):
        known.of(number, TRUST, NOW, object)  # type: ignore[arg-type]
    assert len(known._known) <= 256
