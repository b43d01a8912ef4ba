"""Foreign words are one printable line."""

from hypothesis import given
from hypothesis import strategies as st

from hypervisor.foreign_text import escaped


@given(st.text() | st.binary(), st.integers(1, 50))
def test_what_is_shown_is_printable_and_bounded(text: str | bytes, limit_chars: int) -> None:
    shown = escaped(text, limit_chars=limit_chars)

    assert shown.isprintable()
    assert len(shown) <= 10 * limit_chars + 40


def test_plain_words_stay_what_they_are() -> None:
    assert escaped("Grüße, 世界") == "Grüße, 世界"


def test_terminal_tricks_are_spelled_out() -> None:
    assert escaped("\x1b[2Ja\nb\u202ec\x00") == r"\x1b[2Ja\nb\u202ec\x00"
    assert escaped(b"\xff\xfe!") == r"\xff\xfe!"


def test_what_is_cut_says_so() -> None:
    assert escaped("a" * 1000, limit_chars=3) == "aaa… (and 997 more)"
