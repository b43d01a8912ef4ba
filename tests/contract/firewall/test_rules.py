"""Rules as an administrator meets them: applied, tampered with, shared, removed; each backend."""

import errno
import itertools
from collections.abc import Callable
from typing import Any

import pytest

from firewall.errors import RulesRefused
from firewall.policy import FAMILIES
from kvmsec.linux.children import start_child

pytestmark = [pytest.mark.root, pytest.mark.netfilter, pytest.mark.usefixtures("warm")]


# What is written into a rule is worded before either way to nft is taken.
each_wording = pytest.mark.parametrize("make", ["nftables", "iptables"], indirect=True)


def test_nothing_is_there_before(host, backend):
    assert backend.read() is None
    assert {finding.code for finding in backend.compare(host.policy())} >= {"rules-missing"}
    assert backend.dropped().total == 0
    assert host.rules() == ""


def test_what_was_applied_reads_back(host, backend):
    uids = ((220000, 220005), (220010, 220010))
    assert backend.apply(host.policy(*uids))
    assert backend.compare(host.policy(*uids)) == ()
    installed = backend.read()
    assert installed.uids == uids
    assert installed.families == FAMILIES
    assert not any("accept" in rule.lower() for rule in installed.rules if "policy" not in rule)


def test_applying_twice_changes_nothing(host, backend):
    backend.apply(host.policy())
    before = host.rules()
    assert not backend.apply(host.policy())
    assert host.rules() == before


def test_an_empty_policy_refuses_nobody(net, backend):
    policy = net.policy()
    empty = type(policy)((), policy.log, policy.tag)
    backend.apply(empty)
    assert backend.compare(empty) == ()
    assert net.send(net.uid, "ipv4") is None


def test_a_thousand_ranges_are_held(host, backend):
    uids = tuple((220000 + 10 * n, 220004 + 10 * n) for n in range(1000))
    backend.apply(host.policy(*uids))
    assert backend.compare(host.policy(*uids)) == ()
    assert backend.read().uids == uids


def test_a_smaller_pool_lets_a_uid_go(net, backend):
    backend.apply(net.policy((220000, 220099)))
    backend.apply(net.policy((220000, 220000), (220002, 220099)))
    assert net.send(220001, "ipv4") is None
    assert net.send(220002, "ipv4") == errno.EPERM


def test_counters_outlive_a_change_of_the_pool_and_of_the_log(net, backend):
    backend.apply(net.policy())
    for family in FAMILIES:
        net.send(net.uid, family)
    backend.apply(net.policy((220000, 220050), (220060, 220070), prefix="other: "))
    backend.apply(net.policy((220080, 220090)))
    assert (backend.dropped().ipv4, backend.dropped().ipv6) == (1, 1)


@each_wording
@pytest.mark.parametrize("per_minute", [1, 5, 6, 7, 59, 60, 61, 90, 1000, 1234, 10000])
def test_every_log_rate_reads_back(host, backend, per_minute):
    policy = host.policy(per_minute=per_minute)
    backend.apply(policy)
    assert backend.compare(policy) == ()


@each_wording
@pytest.mark.parametrize("group", [None, 0, 1, 65535])
@pytest.mark.parametrize("prefix", ["x", "kvmsec-drop: ", "a b c!#%&()*+,-./:;<=>?@", "p" * 29])
def test_every_log_setting_reads_back(host, make, group, prefix):
    backend = make()
    policy = host.policy(prefix=prefix, group=group)
    backend.apply(policy)
    assert backend.compare(policy) == ()
    changed = host.policy(prefix="other", group=group)
    assert backend.compare(changed) != ()


def _flush(net: Any, backend: Any) -> None:
    if backend.name == "nftables":
        net.sh("nft", "flush", "chain", "inet", "kvmsec", "output")
    else:
        net.sh("iptables-legacy", "-F")


def _delete_all(net: Any, backend: Any) -> None:
    if backend.name == "nftables":
        net.sh("nft", "flush", "ruleset")
    else:
        net.sh("iptables-legacy", "-F")
        net.sh("iptables-legacy", "-X")


def _accept_in_front(net: Any, backend: Any) -> None:
    if backend.name == "nftables":
        net.sh("nft", "insert", "rule", "inet", "kvmsec", "output", "accept")
    else:
        net.sh("iptables-legacy", "-I", "OUTPUT", "-j", "ACCEPT")


def _accept_inside(net: Any, backend: Any) -> None:
    if backend.name == "nftables":
        net.sh(
            "nft", "insert", "rule", "inet", "kvmsec", "refuse", "udp", "dport", "5000", "accept"
        )
    else:
        net.sh("iptables-legacy", "-I", "kvmsec", "-p", "udp", "-j", "ACCEPT")


def _let_a_uid_go(net: Any, backend: Any) -> None:
    if backend.name == "nftables":
        net.sh("nft", "flush", "set", "inet", "kvmsec", "pool")
    else:
        net.sh("iptables-legacy", "-D", "kvmsec", "5")


def _switch_off(net: Any, backend: Any) -> None:
    """What a listing shows as before."""
    if backend.name == "nftables":
        net.sh("nft", "add table inet kvmsec { flags dormant; }")
    else:
        net.sh("iptables-legacy", "-D", "OUTPUT", "-j", "kvmsec")


@pytest.mark.parametrize(
    "tamper",
    [_flush, _delete_all, _accept_in_front, _accept_inside, _let_a_uid_go, _switch_off],
)
def test_tampering_is_found_and_put_right(net, make, tamper: Callable[[Any, Any], None]):
    backend = make()
    policy = net.policy()
    backend.apply(policy)
    pristine = net.rules()
    tamper(net, backend)
    assert net.send(net.uid, "ipv4") is None  # The tampering does open a hole.
    findings = backend.compare(policy)
    assert findings
    assert all(finding.hint for finding in findings)
    assert backend.apply(policy)
    assert backend.compare(policy) == ()
    assert net.send(net.uid, "ipv4") == errno.EPERM
    net_rules = [line for line in net.rules().splitlines() if line != "-A OUTPUT -j ACCEPT"]
    assert net_rules == pristine.splitlines()


def test_a_foreign_thing_under_our_name_is_replaced(net, backend):
    if backend.name == "nftables":
        net.sh("nft", "add", "table", "inet", "kvmsec")
        net.sh("nft", "add set inet kvmsec pool { type ipv4_addr; elements = { 10.0.0.1 } ; }")
        net.sh("nft", "add chain inet kvmsec output { type nat hook prerouting priority -100; }")
        net.sh("nft", "add chain inet kvmsec other { type filter hook output priority -5; }")
    else:
        net.sh("iptables-legacy", "-N", "kvmsec")
        net.sh("iptables-legacy", "-A", "kvmsec", "-p", "icmp", "-j", "ACCEPT")
        net.sh("iptables-legacy", "-A", "OUTPUT", "-p", "icmp", "-j", "kvmsec")
    backend.apply(net.policy())
    assert backend.compare(net.policy()) == ()
    assert [net.send(net.uid, family) for family in FAMILIES] == [errno.EPERM] * 2
    backend.remove()
    assert net.rules() == ""


def test_a_rebuilt_table_keeps_its_counters_and_leaves_no_stand_in(net, backend):
    backend.apply(net.policy())
    net.send(net.uid, "ipv4")
    if backend.name == "nftables":
        net.sh("nft", "add chain inet kvmsec other { type filter hook output priority -5; }")
    else:
        net.sh("iptables-legacy", "-A", "kvmsec", "-p", "udp", "-j", "RETURN")
    assert backend.compare(net.policy())
    backend.apply(net.policy())
    assert backend.dropped().ipv4 == 1
    assert "mend" not in net.rules()


FOREIGN = [
    ("nft", "add table inet admin"),
    ("nft", "add chain inet admin output { type filter hook output priority 0; policy accept; }"),
    ("nft", "add rule inet admin output meta skuid 1234 counter accept"),
    ("nft", "add table inet kvmsecx"),
    ("iptables-legacy", "-A", "OUTPUT", "-p", "tcp", "--dport", "25", "-j", "REJECT"),
    ("iptables-legacy", "-N", "kvmsecx"),
    ("iptables-legacy", "-A", "kvmsecx", "-m", "comment", "--comment", 'say "hi"', "-j", "ACCEPT"),
    ("ip6tables-legacy", "-t", "mangle", "-A", "OUTPUT", "-j", "MARK", "--set-mark", "1"),
]


def test_foreign_rules_are_left_alone_and_ours_leave_nothing(host, backend):
    for argv in FOREIGN:
        host.sh(*argv)
    before = host.rules()
    backend.apply(host.policy())
    assert host.rules() != before
    backend.apply(host.policy((220000, 220001), (220005, 220009)))
    assert backend.remove()
    assert host.rules() == before
    assert not backend.remove()
    assert backend.read() is None


def test_two_roots_do_not_touch_each_others_rules(net, make):
    first, second = make("kvmsec"), make("kvmsec_0123abcd")
    ours = net.policy((220000, 220009))
    theirs = net.policy((220005, 220019), tag="kvmsec_0123abcd")
    first.apply(ours)
    alone = net.rules()
    second.apply(theirs)
    # Whoever came last may stand first; neither finds fault with that.
    assert first.compare(ours) == ()
    assert second.compare(theirs) == ()
    assert not first.apply(ours)
    assert [net.send(uid, "ipv4") for uid in (220001, 220007, 220019)] == [errno.EPERM] * 3
    assert first.dropped(of_all_tags=True).ipv4 == 3
    assert first.dropped().ipv4 + second.dropped().ipv4 == 3
    second.remove()
    assert net.rules() == alone
    assert net.send(220019, "ipv4") is None
    assert net.send(220001, "ipv4") == errno.EPERM


def test_rival_applies_leave_one_whole_policy(host, backend):
    rivals = [host.policy((220000 + n, 220000 + n), (221000, 221009)) for n in range(4)]
    children = [
        start_child(lambda policy=policy: backend.apply(policy), what="a rival")
        for policy in rivals
    ]
    for child in children:
        assert child.collect(60) is True
    assert sum(backend.compare(policy) == () for policy in rivals) == 1


def test_without_privilege_nothing_works_and_the_hint_says_so(host, backend):
    backend.apply(host.policy())

    def attempt() -> list[str]:
        said = []
        for act in (backend.read, lambda: backend.apply(host.policy((1, 1))), backend.remove):
            try:
                act()
            except Exception as error:
                said.append(f"{type(error).__name__}: {error} {getattr(error, 'hint', '')}")
        return said

    said = host.as_uid(host.outsider, attempt)
    assert len(said) == 3
    assert all(line.startswith("Rules") for line in said)
    assert all("root" in line or "lock" in line for line in said)


# x86_64: sendmsg carries every nftables transaction, setsockopt(IPPROTO_IPV6, IP6T_SO_SET_REPLACE)
# the commit of an IPv6 table, which comes after those of IPv4.
REFUSED = {"nftables": (46, {}), "iptables": (54, {1: 41, 2: 64})}


def test_a_refusal_half_way_leaves_what_was_in_force(host, backend):
    first, second = host.policy((220000, 220009)), host.policy((221000, 221009))
    call, arguments = REFUSED[backend.name]

    def apply() -> str:
        try:
            backend.apply(second)
        except RulesRefused as error:
            return error.hint or "no hint"
        return "applied"

    def refused() -> bool:
        said = host.where_refused(call, arguments, errno.ENOMEM, apply)
        return "kernel needs" in said

    backend.apply(first)
    assert backend.compare(first) == ()
    before = host.rules()
    assert refused()
    assert host.rules() == before
    assert backend.compare(first) == ()
    backend.remove()
    assert refused()
    assert host.rules() == ""


def test_every_pair_of_tampering_is_put_right(host, backend):
    """Two at once: a state that no single repair was made for."""
    policy = host.policy()
    for first, second in itertools.permutations([_accept_in_front, _accept_inside, _switch_off], 2):
        backend.apply(policy)
        first(host, backend)
        second(host, backend)
        backend.apply(policy)
        assert backend.compare(policy) == ()
