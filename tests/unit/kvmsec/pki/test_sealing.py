"""A document that is carried by hand: opened with its passphrase, whole, or not at all."""

import pytest

from kvmsec.pki import sealing
from kvmsec.pki.errors import PassphraseTooShort, SealBroken, WrongPassphrase

DOCUMENT = b"a key and a certificate\n" * 20
PASSPHRASE = "correct horse battery"


@pytest.fixture(scope="module")
def sealed() -> bytes:
    return sealing.seal(DOCUMENT, PASSPHRASE)


def test_what_was_sealed_is_opened(sealed: bytes) -> None:
    assert sealing.open_sealed(sealed, PASSPHRASE) == DOCUMENT
    assert sealing.open_sealed(sealed, f"{PASSPHRASE}\n") == DOCUMENT
    assert b"certificate" not in sealed
    assert sealed.startswith(b"kvmsec sealed 1\n")


def test_two_seals_of_one_document_have_nothing_in_common(sealed: bytes) -> None:
    assert sealing.seal(DOCUMENT, PASSPHRASE)[16:48] != sealed[16:48]


def test_a_wrong_passphrase_is_told_as_such(sealed: bytes) -> None:
    for wrong in ("", "Correct horse battery", "correct horse batter"):
        with pytest.raises(WrongPassphrase):
            sealing.open_sealed(sealed, wrong)


@pytest.mark.parametrize("position", [48, 59, 60, 100, -1])
def test_a_damaged_file_is_told_as_such(position: int, sealed: bytes) -> None:
    damaged = bytearray(sealed)
    damaged[position] ^= 1
    with pytest.raises(SealBroken, match="changed"):
        sealing.open_sealed(bytes(damaged), PASSPHRASE)


def test_what_is_no_sealed_file_costs_nothing_to_refuse(
    sealed: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> None:
        raise AssertionError("the passphrase was stretched")

    monkeypatch.setattr(sealing, "_stretched", refuse)
    later = sealed.replace(b"sealed 1", b"sealed 2", 1)
    for other in (b"", b"words", later, sealed[:50], sealed + b"\0" * (1 << 19)):
        with pytest.raises(SealBroken):
            sealing.open_sealed(other, PASSPHRASE)


def test_a_file_that_is_cut_off_is_told_as_such(sealed: bytes) -> None:
    with pytest.raises(SealBroken):
        sealing.open_sealed(sealed[:-1], PASSPHRASE)


def test_a_passphrase_that_could_be_guessed_is_refused() -> None:
    for short in ("", "12345678901", "           1"):
        with pytest.raises(PassphraseTooShort):
            sealing.seal(DOCUMENT, short)


def test_a_document_has_a_bound() -> None:
    with pytest.raises(ValueError, match="at most"):
        sealing.seal(b"\0" * (sealing.LIMIT_BYTES + 1), PASSPHRASE)


def test_a_made_passphrase_is_long_and_new() -> None:
    first, second = sealing.make_passphrase(), sealing.make_passphrase()
    assert first != second
    assert len(first) == 35
    assert sealing.open_sealed(sealing.seal(b"x", first), first) == b"x"
