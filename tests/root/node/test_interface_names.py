"""Names of interfaces: the kernel takes more in them than Python takes for part of a word."""

from collections.abc import Iterator

import pytest

from firewall.routes import candidates_beyond
from kvmsec.linux import command
from kvmsec.node import ipv6

pytestmark = pytest.mark.root

NAMES = ["br\x1c0", "br\x1f0", "br\u20280", "br\u30000", "br\udcff0"]


@pytest.fixture(params=NAMES, ids=ascii)
def bridge(request: pytest.FixtureRequest) -> Iterator[str]:
    """A bridge that is up and has an address of each family."""

    def run(*arguments: str) -> None:
        command.run(("ip", *arguments), timeout_s=10)

    name = request.param
    run("link", "add", name, "type", "bridge")
    run("link", "set", name, "up")
    run("addr", "add", "198.18.0.9/24", "dev", name)
    run("addr", "add", "fd00:9::9/64", "dev", name, "nodad")
    yield name
    run("link", "del", name)


def test_no_name_is_more_than_one_word(bridge: str) -> None:
    assert ipv6.own_addresses(bridge) == ["fd000009000000000000000000000009"]
    assert ipv6.own_addresses("lo") == ["0" * 31 + "1"]
    found = {target.address for target in candidates_beyond()}
    assert {"198.18.0.1", "198.18.0.2", "fd00:9::1", "fd00:9::2"} <= found
