"""Where a node is reached, as people write it."""

import pytest

from kvmsec.model.endpoints import Endpoint, parse_endpoint


@pytest.mark.parametrize(
    ("text", "host", "port"),
    [
        ("node2", "node2", 1811),
        ("Node2.example.org:7", "Node2.example.org", 7),
        ("192.0.2.1", "192.0.2.1", 1811),
        ("192.0.2.1:65535", "192.0.2.1", 65535),
        ("2001:db8::1", "2001:db8::1", 1811),
        ("[2001:db8::1]:7", "2001:db8::1", 7),
        ("fe80::1%eth0", "fe80::1%eth0", 1811),
    ],
)
def test_a_host_and_a_port_are_read(text: str, host: str, port: int) -> None:
    assert parse_endpoint(text) == Endpoint(host, port)
    assert parse_endpoint(str(Endpoint(host, port))) == Endpoint(host, port)


@pytest.mark.parametrize(
    "text",
    [
        "",
        ":7",
        "node2:",
        "node2:0",
        "node2:65536",
        "node2:\u0667",
        "a b",
        "-x",
        "[::1",
        "::1:x",
        "a/b",
    ],
)
def test_what_is_none_is_refused(text: str) -> None:
    with pytest.raises(ValueError):
        parse_endpoint(text)
