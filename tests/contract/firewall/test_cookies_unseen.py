"""SYN cookies of a uid that was never seen to listen, or that there was no room to remember."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from firewall.backend import Backend, make_backend
from kvmsec.linux import command
from tests.contract.firewall.test_cookies import RawPeer, by_zero_window, each_filter, raw_peer

__all__ = ["raw_peer"]

pytestmark = [pytest.mark.root, pytest.mark.netfilter, pytest.mark.usefixtures("warm")]

COOKIES = Path("/proc/sys/net/ipv4/tcp_syncookies")
ROOM = 65535


@pytest.fixture
def nothing_but_cookies(net: Any) -> Iterator[None]:
    """As with a backlog of none before Linux 6.13: no answer has an owner."""
    before = COOKIES.read_text()
    COOKIES.write_text("2")
    yield
    COOKIES.write_text(before)


@each_filter
@pytest.mark.usefixtures("nothing_but_cookies")
def test_a_listener_that_never_answered_otherwise_gets_nothing_out(
    net: Any, raw_peer: RawPeer, backend: Backend
) -> None:
    backend.apply(net.policy())
    assert by_zero_window(net, raw_peer, net.uid) > 0
    assert raw_peer.data == 0


def fill_the_set_of_listeners() -> None:
    """As an accomplice on the node does in a second: the uid listens, and it dials 127.x.y.z."""
    ends = (f"127.{n >> 16}.{n >> 8 & 255}.{n & 255} . 7000" for n in range(ROOM))
    batch = f"add element inet kvmsec listeners4 {{ {', '.join(ends)} }}\n"
    command.run(["nft", "-f", "-"], input=batch.encode(), timeout_s=60)


def test_a_full_set_of_listeners_lets_nothing_out(net: Any, raw_peer: RawPeer) -> None:
    make_backend("nftables", "kvmsec").apply(net.policy())
    fill_the_set_of_listeners()
    assert by_zero_window(net, raw_peer, net.uid) > 0
    assert raw_peer.data == 0
