"""The join token, and what only those who know it can show."""

import base64
import secrets
import ssl
from datetime import timedelta

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvmsec.errors import BadName
from kvmsec.pki import contexts, joining
from kvmsec.pki.certificates import fingerprint_of
from kvmsec.pki.errors import BadLifetime, BadToken
from kvmsec.pki.join_certificates import join_anchor, make_joining_pair
from kvmsec.pki.joining import Invitation, JoinRole
from tests.unit.kvmsec.pki.authorities import NOW, Town, make_cluster, shake
from tests.unit.kvmsec.pki.joiners import joining_client_context, joining_server_context

ANCHOR = fingerprint_of(make_cluster().certificate_pem)
SECRET = b"0123456789abcdef"


@pytest.fixture
def invitation() -> Invitation:
    return joining.invite("node-2.example.org", ANCHOR, now=NOW)


def test_a_token_is_one_line_and_says_what_the_invitation_does(invitation: Invitation) -> None:
    token = joining.format_token(invitation)

    assert token.isascii()
    assert token.isprintable()
    assert " " not in token
    assert joining.parse_token(token) == invitation
    assert joining.parse_token(f"  {token}\n") == invitation


def test_two_invitations_have_nothing_secret_in_common() -> None:
    first, second = (joining.invite("node2", ANCHOR, now=NOW) for _ in range(2))
    assert first.secret != second.secret
    assert len(first.secret) == 16


def test_a_secret_is_not_shown(invitation: Invitation) -> None:
    assert str(invitation.secret) not in repr(invitation)
    assert "secret" not in repr(invitation)


@given(position=st.integers(0, 1000), letter=st.sampled_from("AZaz09-_"))
def test_a_mistyped_letter_is_told_as_such(position: int, letter: str) -> None:
    token = joining.format_token(
        Invitation(
            secret=SECRET,
            anchor_fingerprint=ANCHOR,
            node_name="node2",
            expires_at=NOW + timedelta(hours=1),
        )
    )
    position %= len(token)
    typed = token[:position] + letter + token[position + 1 :]
    if typed == token:
        return
    with pytest.raises(BadToken) as caught:
        joining.parse_token(typed)
    assert "node invite" in str(caught.value.hint)


def _letters(body: bytes) -> str:
    encoded = base64.urlsafe_b64encode(body + joining._checksum(body)).decode().rstrip("=")
    return f"kvmsec-join-1-{encoded}"


@pytest.mark.parametrize(
    "token",
    [
        "",
        "hunter2",
        "kvmsec-join-1-",
        "kvmsec-join-1-A",
        "kvmsec-join-1-AAAA",
        "kvmsec-join-2-AAAA",
        "kvmsec-join-1-AA AA",
        "kvmsec-join-1-" + "A" * 5000,
        _letters(b""),
        _letters(b"\0" * 53),
        _letters(b"\0" * 53 + b"a_b"),
        _letters(b"\0" * 53 + b"\xff"),
        _letters(b"\0" * 48 + b"\xff" * 5 + b"node2"),
    ],
)
def test_what_is_no_token_is_refused_and_not_repeated(token: str) -> None:
    with pytest.raises(BadToken) as caught:
        joining.parse_token(token)
    assert len(caught.value.message) < 200


def test_a_token_that_is_cut_off_is_told_as_such(invitation: Invitation) -> None:
    token = joining.format_token(invitation)
    for length in range(20, len(token)):
        with pytest.raises(BadToken):
            joining.parse_token(token[:length])


def test_an_invitation_ends(invitation: Invitation) -> None:
    assert joining.require_current(invitation, NOW + timedelta(minutes=59)) is invitation
    with pytest.raises(BadToken, match="over"):
        joining.require_current(invitation, NOW + timedelta(hours=1))


def test_an_invitation_is_for_a_node_and_a_time() -> None:
    with pytest.raises(BadName):
        joining.invite("a_b", ANCHOR, now=NOW)
    for lifetime in (timedelta(0), timedelta(days=8)):
        with pytest.raises(BadLifetime):
            joining.invite("node2", ANCHOR, now=NOW, lifetime=lifetime)


def _proof(**changed: object) -> str:
    values: dict[str, object] = {
        "secret": SECRET,
        "role": JoinRole.MASTER_HELLO,
        "master_fingerprint": "1" * 64,
        "node_fingerprint": "2" * 64,
        "anchor_fingerprint": "3" * 64,
        "said": b"words",
    }
    return joining.proof(**(values | changed))  # type: ignore[arg-type]


def test_a_proof_is_bound_to_all_that_it_is_about() -> None:
    others = [
        _proof(secret=b"0123456789abcdeF"),
        _proof(role=JoinRole.NODE_HELLO),
        _proof(role=JoinRole.MASTER_ADMIT),
        _proof(master_fingerprint="4" * 64),
        _proof(node_fingerprint="4" * 64),
        _proof(anchor_fingerprint="4" * 64),
        _proof(master_fingerprint="2" * 64, node_fingerprint="1" * 64),
        _proof(said=b""),
        _proof(anchor_fingerprint="3" * 63, said=b"3words"),
    ]
    assert len({_proof(), *others}) == 1 + len(others)
    assert len(_proof()) == 64


def test_a_proof_is_taken_or_refused() -> None:
    about = {
        "role": JoinRole.NODE_HELLO,
        "master_fingerprint": "1" * 64,
        "node_fingerprint": "2" * 64,
        "anchor_fingerprint": "3" * 64,
    }
    shown = joining.proof(SECRET, **about)  # type: ignore[arg-type]
    joining.check_proof(shown, SECRET, **about)  # type: ignore[arg-type]
    for wrong in ("", shown[:-1], "0" * 64, "é" * 64, shown.upper()):
        with pytest.raises(BadToken, match="not the one"):
            joining.check_proof(wrong, SECRET, **about)  # type: ignore[arg-type]


def test_a_secret_of_another_length_gives_nothing() -> None:
    for secret in (b"", SECRET[:-1], SECRET + b"0"):
        with pytest.raises(ValueError, match="16 bytes"):
            joining.derived(secret, joining.Purpose.PROOF)


def test_both_sides_of_a_join_meet_by_the_secret_alone_and_see_each_others_certificate() -> None:
    client, server = shake(joining_client_context(SECRET), joining_server_context(SECRET))
    seen = client.getpeercert(True), server.getpeercert(True)
    assert None not in seen
    assert seen[0] != seen[1]
    assert client.version() == "TLSv1.3"


def test_a_stranger_gets_through_no_handshake_of_a_join() -> None:
    town, other = Town(), secrets.token_bytes(16)
    anchors = town.cluster.certificate_pem
    strangers = [
        joining_client_context(other),
        contexts.client_context(make_joining_pair(other), join_anchor(SECRET)),
        contexts.client_context(town.pairs["alpha"], join_anchor(SECRET)),
        contexts.client_context(town.pairs["alpha"], anchors),
    ]
    for stranger in strangers:
        with pytest.raises(ssl.SSLError):
            shake(stranger, joining_server_context(SECRET))


def test_the_master_calls_no_node_that_does_not_know_the_secret() -> None:
    town = Town()
    for stranger in (
        joining_server_context(secrets.token_bytes(16)),
        contexts.server_context(town.pairs["alpha"], join_anchor(SECRET)),
    ):
        with pytest.raises(ssl.SSLError):
            shake(joining_client_context(SECRET), stranger)


def test_who_joins_is_no_member_of_the_cluster() -> None:
    town = Town()
    server = contexts.server_context(town.pairs["alpha"], town.cluster.certificate_pem)
    with pytest.raises(ssl.SSLError):
        shake(joining_client_context(SECRET), server)
