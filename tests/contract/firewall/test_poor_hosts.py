"""Hosts that lack something: the tools, a part of the kernel, a protocol family, the lock."""

import errno
import fcntl
import os
import shutil
import socket
from pathlib import Path
from typing import Any

import pytest

from firewall.backend import open_backend
from firewall.errors import BackendUnavailable, RulesRefused
from firewall.guard import Firewall
from firewall.iptables import chains
from firewall.nftables import tables
from firewall.nftables.library import Command
from kvmsec.linux import command

pytestmark = [pytest.mark.root, pytest.mark.netfilter]

# x86_64
SOCKET = 41


@pytest.fixture
def only(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Any:
    """Leaves the host no library of nft's and no other programs than those named."""

    def leave(*programs: str) -> None:
        for program in programs:
            (tmp_path / program).symlink_to(shutil.which(program) or "")
        monkeypatch.setitem(command.ENVIRONMENT, "PATH", str(tmp_path))
        monkeypatch.setattr(tables, "load_library", lambda: None)
        chains._tool.cache_clear()

    yield leave
    chains._tool.cache_clear()


LEGACY = [f"{tool}-legacy{verb}" for tool in ("iptables", "ip6tables") for verb in ("", "-save")]
LEGACY += ["iptables-legacy-restore", "ip6tables-legacy-restore", "env"]


def test_without_nft_auto_takes_iptables(host, only):
    only(*LEGACY)
    assert open_backend("auto", "kvmsec").name == "iptables"
    firewall = Firewall("auto")
    firewall.apply(host.policy())
    assert firewall.prove(host.uid, host.uid, host.policy()).is_proof
    assert firewall.show()["backend"] == "iptables"
    assert firewall.verify(host.policy()) == ()
    assert firewall.remove()


def test_without_iptables_auto_takes_nftables_and_nothing_asks_for_more(host, only):
    only("nft")
    firewall = Firewall("auto")
    firewall.apply(host.policy())
    assert firewall.prove(host.uid, host.uid, host.policy()).is_proof
    assert firewall.show()["backend"] == "nftables"
    assert firewall.remove()


def test_without_either_both_packages_are_named(host, only):
    only()
    with pytest.raises(BackendUnavailable) as caught:
        open_backend("auto", "kvmsec")
    assert "nftables: neither libnftables.so.1 nor the nft command" in caught.value.message
    assert "iptables: " in caught.value.message
    assert caught.value.hint == "apt-get install nftables"
    with pytest.raises(BackendUnavailable) as caught:
        open_backend("iptables", "kvmsec")
    assert caught.value.hint == "apt-get install iptables"


def test_iptables_of_the_nft_flavour_is_not_taken_for_the_legacy_one(host, only):
    only("iptables", "ip6tables", "env")
    with pytest.raises(BackendUnavailable, match="missing"):
        open_backend("iptables", "kvmsec")


def test_the_library_and_the_command_write_the_same_rules(host, only):
    Firewall("nftables").apply(host.policy())
    by_library = host.rules()
    Firewall("nftables").remove()
    backend = tables.NftablesBackend("kvmsec", nft=Command())
    backend.apply(host.policy())
    assert host.rules() == by_library


def test_a_kernel_without_nf_tables_is_served_by_iptables(host):
    """NETLINK_NETFILTER is what such a kernel doesn't know."""

    def choose() -> list[str]:
        firewall = Firewall("auto")
        firewall.apply(host.policy())
        report = firewall.prove(host.uid, host.uid, host.policy())
        try:
            open_backend("nftables", "kvmsec")
        except BackendUnavailable as error:
            return [firewall.show()["backend"], str(report.is_proof), error.hint or ""]
        return []

    arguments = {0: socket.AF_NETLINK, 2: 12}
    chosen, is_proof, hint = host.where_refused(SOCKET, arguments, errno.EPROTONOSUPPORT, choose)
    assert (chosen, is_proof) == ("iptables", "True")
    assert hint


def test_a_kernel_without_ipv6_is_proved_under_nftables(host):
    firewall = Firewall("nftables")
    firewall.apply(host.policy())

    def prove() -> list[Any]:
        report = firewall.prove(host.uid, host.uid, host.policy())
        return [report.absent, [attempt.error for attempt in report.attempts]]

    absent, errors = host.where_refused(SOCKET, {0: socket.AF_INET6}, errno.EAFNOSUPPORT, prove)
    assert absent == ["ipv6"]
    assert errors == [errno.EPERM, errno.EAFNOSUPPORT]


def test_iptables_refuses_where_its_ipv6_half_is_impossible(host):
    before = host.rules()

    def attempt() -> str:
        try:
            Firewall("iptables").apply(host.policy())
        except (BackendUnavailable, RulesRefused) as error:
            return f"{error.message} {error.hint}"
        return "applied"

    said = host.where_refused(SOCKET, {0: socket.AF_INET6}, errno.EAFNOSUPPORT, attempt)
    assert "nftables" in said
    assert host.rules() == before


def test_a_lock_that_somebody_keeps_is_named(host, monkeypatch):
    monkeypatch.setattr(chains, "_LOCK_DEADLINE_S", 0.1)
    holder = os.open("/run/xtables.lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        fcntl.flock(holder, fcntl.LOCK_EX)
        with pytest.raises(RulesRefused, match=r"/run/xtables\.lock") as caught:
            Firewall("iptables").apply(host.policy())
    finally:
        os.close(holder)
    assert "another tool" in caught.value.hint
    assert Firewall("iptables").apply(host.policy())
