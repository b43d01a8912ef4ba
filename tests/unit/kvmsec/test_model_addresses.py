"""Where a node listens: numbers only, in the three ways that people write them."""

import pytest

from kvmsec.model.addresses import PORT, Bind, parse_bind


@pytest.mark.parametrize(
    ("text", "bind"),
    [
        ("192.0.2.1", Bind("192.0.2.1", PORT)),
        ("192.0.2.1:1812", Bind("192.0.2.1", 1812)),
        ("::", Bind("::", PORT)),
        ("2001:DB8:0::1", Bind("2001:db8::1", PORT)),
        ("[2001:db8::1]", Bind("2001:db8::1", PORT)),
        ("[2001:db8::1]:9", Bind("2001:db8::1", 9)),
        ("fe80::1%eth0", Bind("fe80::1%eth0", PORT)),
    ],
)
def test_an_address_is_read_and_shown_so_that_it_is_read_again(text: str, bind: Bind) -> None:
    assert parse_bind(text) == bind
    assert parse_bind(str(bind)) == bind


@pytest.mark.parametrize(
    "text",
    [
        *("", "node1", "node1:1811", "192.0.2.1:", "192.0.2.256", "[::1", "[::1]x", ":1811"),
        *("192.0.2.1:0", "192.0.2.1:65536", "192.0.2.1:99999999999", "192.0.2.1:\u0661"),
    ],
)
def test_what_is_no_address_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="must be"):
        parse_bind(text)
