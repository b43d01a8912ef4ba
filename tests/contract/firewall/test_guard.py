"""The proof by packet, and what a node asks besides: show, verify, switch, remove."""

import errno
import json
import os
from collections.abc import Callable
from typing import Any

import pytest

from firewall.backend import open_backend
from firewall.canary import probe
from firewall.errors import BackendUnavailable, NotProved, PolicyError
from firewall.guard import Firewall
from firewall.policy import FAMILIES, Policy
from kvmsec.linux.children import start_child
from tests.log_group import Line, LogGroup

pytestmark = [pytest.mark.root, pytest.mark.netfilter]

SETTINGS = ("nftables", "iptables")


@pytest.fixture(params=SETTINGS)
def firewall(request: pytest.FixtureRequest) -> Firewall:
    return Firewall(request.param)


def prove(firewall: Firewall, host: Any, policy: Policy | None = None) -> Any:
    return firewall.prove(host.uid, host.uid, policy or host.policy())


def refusal(firewall: Firewall, host: Any) -> NotProved:
    with pytest.raises(NotProved) as caught:
        prove(firewall, host)
    return caught.value


def test_rules_in_force_are_proved_by_one_packet_a_family(host, firewall):
    firewall.apply(host.policy())
    report = prove(firewall, host)
    assert report.is_proof
    assert [attempt.address for attempt in report.attempts] == ["127.0.0.1", "::1"]


def test_a_routed_address_is_tried_where_there_is_a_route(net, firewall):
    firewall.apply(net.policy())
    report = prove(firewall, net)
    beyond = [attempt for attempt in report.attempts if not attempt.is_loopback]
    assert [attempt.family for attempt in beyond] == ["ipv4", "ipv6"]
    assert all(attempt.is_refused for attempt in beyond)
    assert firewall.show()["dropped_packets"] == 4


def test_a_documentation_address_serves_only_where_it_is_not_the_hosts_own(net, firewall):
    net.sh("ip", "addr", "add", "192.0.2.1/24", "dev", "lo")
    net.sh("ip", "route", "add", "default", "via", "10.77.0.2")
    firewall.apply(net.policy())
    assert "198.51.100.1" in [attempt.address for attempt in prove(firewall, net).attempts]


def test_a_link_local_network_counts_as_a_way_out(net, firewall):
    for address in ("10.77.0.1/24", "fd77::1/64"):
        net.sh("ip", "addr", "del", address, "dev", "wire0")
    net.sh("ip", "addr", "add", "fe80::77/64", "dev", "wire0", "nodad")
    firewall.apply(net.policy())
    assert "fe80::1" in [attempt.address for attempt in prove(firewall, net).attempts]


def test_missing_rules_are_mended_before_a_start(host, firewall):
    assert prove(firewall, host).is_proof
    assert firewall.backend.compare(host.policy()) == ()


def test_a_uid_outside_the_policy_is_not_proved(host, firewall):
    firewall.apply(host.policy())
    with pytest.raises(NotProved, match="does not name it"):
        firewall.prove(host.outsider, host.outsider, host.policy())


def test_a_policy_of_another_root_is_refused(host, firewall):
    with pytest.raises(PolicyError):
        firewall.apply(host.policy(tag="kvmsec_0123abcd"))


def _loopback_only(net: Any, *, is_nft: bool) -> None:
    """Rules that look like ours to a loopback canary, counters and all."""
    if is_nft:
        net.sh("nft", "insert rule inet kvmsec output oifname != lo return")
    else:
        for tool in ("iptables-legacy", "ip6tables-legacy"):
            net.sh(tool, "-I", "kvmsec", "!", "-o", "lo", "-j", "RETURN")


def test_a_rule_that_covers_loopback_alone_is_no_proof(net, firewall):
    firewall.apply(net.policy())
    _loopback_only(net, is_nft=firewall.setting == "nftables")
    report = probe(net.uid, net.uid, firewall.backend.dropped)
    assert not report.is_proof
    assert [attempt.address for attempt in report.failures] == ["10.77.0.2", "fd77::2"]
    findings = firewall.verify(net.policy())
    assert {finding.code for finding in findings} == {"rules-changed", "canary-failed"}
    assert all("kvmsec firewall apply" in finding.hint for finding in findings)
    assert prove(firewall, net).is_proof  # Mended on the way.


def test_another_firewalls_refusal_is_no_proof(host, firewall):
    host.sh("nft", "add table inet admin")
    host.sh("nft", "add chain inet admin output { type filter hook output priority -300; }")
    host.sh("nft", "add rule inet admin output meta skuid 220000-220099 drop")
    firewall.apply(host.policy())
    error = refusal(firewall, host)
    assert "counter" in error.message
    assert "another firewall" in error.hint
    assert error.report.attempts[0].is_refused
    assert [finding.code for finding in firewall.verify(host.policy())] == ["canary-failed"]


def test_two_roots_that_forbid_the_same_uid_both_prove_it(host):
    """Whoever's rules see the packet first count it; the other's must read back right."""
    first, second = Firewall("nftables"), Firewall("iptables", "kvmsec_0123abcd")
    third = Firewall("nftables", "kvmsec_89abcdef")
    for firewall in (first, second, third):
        policy = host.policy(tag=firewall.tag)
        firewall.apply(policy)
        firewall.prove(host.uid, host.uid, policy)
    for firewall in (first, second, third):
        policy = host.policy(tag=firewall.tag)
        firewall.prove(host.uid, host.uid, policy)
        assert firewall.verify(policy) == ()


def test_a_host_without_ipv6_is_proved_while_the_rules_read_back_right(host, firewall):
    host.sh("sysctl", "-qw", "net.ipv6.conf.all.disable_ipv6=1")
    firewall.apply(host.policy())
    report = prove(firewall, host)
    assert report.absent == ("ipv6",)
    assert report.attempts[1].error == errno.EADDRNOTAVAIL
    assert firewall.verify(host.policy()) == ()


def test_a_family_that_is_absent_has_its_rules_mended(host, firewall):
    host.sh("sysctl", "-qw", "net.ipv6.conf.all.disable_ipv6=1")
    firewall.apply(host.policy())
    if firewall.setting == "nftables":
        host.sh("nft", "insert rule inet kvmsec output meta nfproto ipv6 return")
    else:
        host.sh("ip6tables-legacy", "-F", "OUTPUT")
    prove(firewall, host)
    assert firewall.backend.compare(host.policy()) == ()


def test_loopback_down_refuses_and_says_what_to_do(bare_host, firewall):
    firewall.apply(bare_host.policy())
    error = refusal(firewall, bare_host)
    assert "ENETUNREACH" in error.message or "EADDRNOTAVAIL" in error.message
    assert "ip link set lo up" in error.hint


def test_a_uid_that_still_gets_out_refuses_and_names_the_address(host, firewall, monkeypatch):
    monkeypatch.setattr(Firewall, "apply", lambda *_: False)
    error = refusal(firewall, host)
    assert "127.0.0.1 was sent" in error.message
    assert error.uid == host.uid


def test_a_switch_removes_the_other_backends_rules(net):
    before = net.rules()
    for setting in ("nftables", "iptables", "nftables", "auto", "iptables", "auto"):
        firewall = Firewall(setting)
        firewall.apply(net.policy())
        expected = "nftables" if setting == "auto" else setting
        assert firewall.show()["backend"] == expected
        assert firewall.verify(net.policy()) == ()
        assert ("-A kvmsec" in net.rules()) == (expected == "iptables")
        assert ("table inet kvmsec" in net.rules()) == (expected == "nftables")
        assert net.send(net.uid, "ipv4") == errno.EPERM
    assert Firewall("auto").remove()
    assert net.rules() == before


def test_rules_of_the_other_backend_are_a_finding(host):
    Firewall("iptables").apply(host.policy())
    nftables = Firewall("nftables")
    nftables.backend.apply(host.policy())
    assert "other-backend" in {finding.code for finding in nftables.verify(host.policy())}


def test_both_backends_serve_this_host(host):
    assert [open_backend(name, "kvmsec").name for name in SETTINGS] == list(SETTINGS)
    assert open_backend("auto", "kvmsec").name == "nftables"
    assert host.rules() == ""


def test_without_privilege_no_backend_serves_and_both_reasons_are_said(host):
    def attempt() -> list[str]:
        try:
            open_backend("auto", "kvmsec")
        except BackendUnavailable as error:
            return [error.message, error.hint or ""]
        return []

    message, hint = host.as_uid(host.outsider, attempt)
    assert "nftables: " in message
    assert "iptables: " in message
    assert "root" in hint


def test_listing_makes_no_table_in_the_kernel(host):
    for firewall in (Firewall("auto"), Firewall("iptables")):
        firewall.show()
        firewall.verify(host.policy())
        firewall.remove()
    with open("/proc/thread-self/net/ip_tables_names") as names:
        assert names.read() == ""


def test_show_is_plain_data_with_and_without_rules(net, firewall):
    assert firewall.show()["backend"] is None
    firewall.apply(net.policy((220000, 220005), (220007, 220007), prefix="seen: "))
    net.send(220007, "ipv6")
    shown = json.loads(json.dumps(firewall.show()))
    assert shown["backend"] == firewall.setting
    assert shown["uids"] == "220000-220005,220007"
    assert shown["families"] == ["ipv4", "ipv6"]
    assert shown["dropped_packets"] == 1
    assert shown["dropped"] == {"ipv4": 0, "ipv6": 1}
    assert shown["log"] == {"prefix": "seen: ", "group": None}
    assert shown["rules"]


def test_show_names_the_log_group(host, firewall):
    firewall.apply(host.policy(group=7))
    shown = firewall.show()
    assert shown["log"] == {"prefix": "kvmsec-drop: ", "group": 7}
    assert "log group 7" in shown["last_drops_note"]


def test_show_says_which_families_are_open(host):
    firewall = Firewall("iptables")
    firewall.apply(host.policy())
    host.sh("iptables-legacy", "-F", "OUTPUT")
    assert firewall.show()["families"] == ["ipv6"]


def test_show_says_that_a_dormant_table_holds_nothing(host):
    firewall = Firewall("nftables")
    firewall.apply(host.policy())
    host.sh("nft", "add table inet kvmsec { flags dormant; }")
    assert firewall.show()["families"] == []


@pytest.mark.parametrize("family", FAMILIES)
def test_a_log_group_gets_the_prefix_and_the_uid(net, firewall, family):
    with LogGroup(7) as log:
        firewall.apply(net.policy(prefix="refused by us: ", group=7))
        net.send(net.uid, family)
        assert log.receive() == [Line("refused by us: ", net.uid)]


def test_the_log_is_limited_for_each_uid(net, firewall):
    """One range holds both uids: only nftables can tell them apart."""
    with LogGroup(7) as log:
        firewall.apply(net.policy(group=7, per_minute=1))
        for _ in range(20):
            net.send(220001, "ipv4")
        net.send(220002, "ipv4")
        uids = [line.uid for line in log.receive_all()]
    assert 5 <= uids.count(220001) <= 6
    assert uids.count(220002) == (1 if firewall.setting == "nftables" else 0)


def test_two_starts_at_once_prove_their_uids(host, firewall):
    firewall.apply(host.policy())

    def start(uid: int) -> Callable[[], bool]:
        return lambda: firewall.prove(uid, uid, host.policy()).is_proof

    children = [start_child(start(uid), what="a start") for uid in range(220001, 220009)]
    assert all(child.collect(30) for child in children)


def test_the_canary_leaves_no_child_and_no_descriptor(host, firewall):
    firewall.apply(host.policy())
    prove(firewall, host)
    before = len(os.listdir("/proc/self/fd"))
    for _ in range(5):
        prove(firewall, host)
    assert len(os.listdir("/proc/self/fd")) == before
    with pytest.raises(ChildProcessError):
        os.waitpid(-1, os.WNOHANG)
