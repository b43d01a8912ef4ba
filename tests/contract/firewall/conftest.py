"""A node and a peer of the test's own, and the backends under test."""

import warnings
from collections.abc import Callable, Iterator

import pytest

from firewall.backend import Backend, BackendName, make_backend
from firewall.iptables import chains
from firewall.nftables.library import Command
from firewall.nftables.tables import NftablesBackend
from tests.cable import Host, Net, cabled, new_namespace


@pytest.fixture
def bare_host() -> Iterator[Host]:
    """A network namespace with nothing up."""
    with new_namespace():
        yield Host()


@pytest.fixture
def host(bare_host: Host) -> Host:
    """A network namespace with `lo` up and nothing else."""
    bare_host.sh("ip", "link", "set", "lo", "up")
    return bare_host


@pytest.fixture
def net(host: Host) -> Iterator[Net]:
    with cabled() as cable:
        yield cable


Make = Callable[..., Backend]


def _do_not_fit(changes: object) -> None:
    raise AttributeError("b'owner': no such parameter b'socket-exists'")


@pytest.fixture(params=["nftables", "nft-command", "iptables", "iptables-restore"])
def make(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Make:
    """Makes the backend under test for a tag; each by both of its ways."""
    if request.param == "iptables-restore":
        # As python-iptables ends with an iptables that it doesn't fit.
        monkeypatch.setattr(chains, "commit", _do_not_fit)

    def build(tag: str = "kvmsec") -> Backend:
        if request.param == "nft-command":
            return NftablesBackend(tag, nft=Command())
        name: BackendName = "nftables" if request.param == "nftables" else "iptables"
        return make_backend(name, tag)

    return build


@pytest.fixture
def backend(make: Make) -> Backend:
    return make()


@pytest.fixture(scope="module")
def warm() -> None:
    """Import python-iptables here, so that the children that change rules need not: a process
    that has imported it and made no table is as good as one that hasn't. The tests of the guard
    leave it to the children, as the command line does."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        import iptc  # noqa: F401
