"""The nftables commands, word for word."""

import pytest

from firewall.nftables import ruleset
from firewall.policy import LogSettings, Policy

GOLDEN = """\
add table inet kvmsec
add set inet kvmsec pool { type uid; flags interval; }
add set inet kvmsec logged { type uid; size 65535; flags dynamic,timeout; timeout 1m; }
add set inet kvmsec listeners4 { type ipv4_addr . inet_service; size 65535; \
flags dynamic,timeout; timeout 5m; }
add set inet kvmsec listeners6 { type ipv6_addr . inet_service; size 65535; \
flags dynamic,timeout; timeout 5m; }
add set inet kvmsec flows4 { type ipv4_addr . inet_service . ipv4_addr . inet_service; \
size 65535; flags dynamic,timeout; timeout 5m; }
add set inet kvmsec flows6 { type ipv6_addr . inet_service . ipv6_addr . inet_service; \
size 65535; flags dynamic,timeout; timeout 5m; }
add counter inet kvmsec dropped_ipv4 { packets 3 bytes 4 }
add counter inet kvmsec dropped_ipv6 { packets 0 bytes 0 }
add chain inet kvmsec refuse
add chain inet kvmsec known
add chain inet kvmsec output { type filter hook output priority 0; policy accept; }
flush chain inet kvmsec output
flush chain inet kvmsec known
flush chain inet kvmsec refuse
flush set inet kvmsec pool
add element inet kvmsec pool { 1000-5000, 8000 }
add rule inet kvmsec output meta skuid @pool goto refuse
add rule inet kvmsec output meta skuid >= 0 goto known
add rule inet kvmsec output ct mark & 0x6b760000 == 0x6b760000 goto refuse
add rule inet kvmsec output tcp flags & (syn | ack) == syn | ack \
ip saddr . tcp sport @listeners4 goto refuse
add rule inet kvmsec output tcp flags & (syn | ack) == syn | ack \
ip6 saddr . tcp sport @listeners6 goto refuse
add rule inet kvmsec output ip saddr . tcp sport . ip daddr . tcp dport @flows4 goto refuse
add rule inet kvmsec output ip6 saddr . tcp sport . ip6 daddr . tcp dport @flows6 goto refuse
add rule inet kvmsec output tcp flags & (syn | ack) == syn | ack ct mark set ct mark | 0x80000000
add rule inet kvmsec output tcp flags & (syn | ack) != syn | ack \
ct mark & 0x80000000 == 0x80000000 goto refuse
add rule inet kvmsec known ct mark & 0x80000000 == 0x80000000 ct mark set ct mark & 0x7fffffff
add rule inet kvmsec refuse ct mark set ct mark | 0x6b760000
add rule inet kvmsec refuse meta skuid @pool tcp flags & (syn | ack) == syn | ack \
update @listeners4 { ip saddr . tcp sport }
add rule inet kvmsec refuse meta skuid @pool tcp flags & (syn | ack) == syn | ack \
update @listeners6 { ip6 saddr . tcp sport }
add rule inet kvmsec refuse ct state new tcp flags & syn != syn \
update @flows4 { ip saddr . tcp sport . ip daddr . tcp dport }
add rule inet kvmsec refuse ct state new tcp flags & syn != syn \
update @flows6 { ip6 saddr . tcp sport . ip6 daddr . tcp dport }
add rule inet kvmsec refuse update @logged { meta skuid limit rate 6/minute burst 5 packets } \
log prefix "kvmsec-drop: " flags skuid
add rule inet kvmsec refuse meta nfproto ipv4 counter name dropped_ipv4 drop
add rule inet kvmsec refuse counter name dropped_ipv6 drop
"""


def test_a_policy_becomes_one_transaction():
    policy = Policy(((8000, 8000), (1000, 5000)))
    assert ruleset.install(policy, {"ipv4": (3, 4)}) == GOLDEN


def test_an_empty_pool_adds_no_element():
    assert "add element" not in ruleset.install(Policy(()))


def test_a_log_group_takes_the_place_of_the_kernels_log():
    text = ruleset.install(Policy((), LogSettings("seen: ", group=7, per_minute=60)))
    assert 'limit rate 60/minute burst 5 packets } log prefix "seen: " group 7\n' in text
    assert "flags skuid" not in text


def test_every_command_is_about_the_tags_own_table():
    for line in ruleset.install(Policy(((1, 2),), tag="kvmsec_0123abcd")).splitlines():
        words = line.split()
        assert "kvmsec_0123abcd" in words[2:4]
        assert words[words.index("inet") + 1] == "kvmsec_0123abcd"


def test_removal_works_with_and_without_a_table():
    assert ruleset.remove("kvmsec") == "add table inet kvmsec\ndelete table inet kvmsec\n"


def test_elements_are_read_in_every_form_that_nft_lists():
    elements = [8000, {"range": [1000, 5000]}, {"prefix": {"addr": 65536, "len": 24}}]
    assert ruleset.parse_uids(elements) == ((1000, 5000), (8000, 8000), (65536, 65791))


@pytest.mark.parametrize("element", ["10.0.0.1", {"range": ["a", "b"]}, {"elem": 5}, None])
def test_an_element_that_is_no_uid_is_an_error(element):
    with pytest.raises(ValueError, match="no uid"):
        ruleset.parse_uids([element])
