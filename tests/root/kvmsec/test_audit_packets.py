"""Foreign packet rules in force: their structure promises no more than a packet meets."""

import subprocess
from collections.abc import Iterator
from typing import Any

import pytest

from kvmsec.audit.facts import Credentials, Facts
from kvmsec.audit.packets import cover, try_rules

pytestmark = [pytest.mark.root, pytest.mark.netfilter]

UID = 247200
NFT = """
table inet foreign {{
    set uids {{ type uid; flags interval; elements = {{ 5, 247190-247210 }} }}
    chain known {{ {known} }}
    chain out {{ type filter hook output priority 0; policy accept; {out} }}
}}
"""
BOTH, IPV4, NONE = (True, True), (True, False), (False, False)


def process(*uids: int) -> Facts:
    uids = uids or (UID,)
    who = Credentials(
        uids=uids,
        gids=uids,
        groups=(),
        capabilities=(0, 0, 0, 0, 0),
        no_new_privs=True,
        seccomp=2,
        seccomp_filters=2,
    )
    return Facts(pid=1, start_ticks=0, comm="x", credentials=who)


@pytest.fixture(autouse=True)
def no_rules() -> Iterator[None]:
    yield
    run("nft", "flush ruleset")
    for tool in ("iptables", "ip6tables"):
        run(f"{tool}-legacy", "-F")


def run(tool: str, arguments: str) -> None:
    subprocess.run([tool, *arguments.split()], check=True)


def closed(uid: int = UID) -> tuple[bool, bool]:
    """What the structure says of IPv4 and IPv6; a packet must not know better."""
    (facts,) = cover([process(uid)])
    assert facts.unread == {}
    assert facts.coverage is not None
    tried = try_rules(facts).canary
    assert tried is not None
    sent = " ".join(tried.sent)
    assert not (facts.coverage.ipv4 and "127.0.0.1" in sent), sent
    assert not (facts.coverage.ipv6 and "::1" in sent), sent
    return facts.coverage.ipv4, facts.coverage.ipv6


@pytest.mark.parametrize(
    ("out", "known", "expected"),
    [
        ("meta skuid 247200 drop;", "", BOTH),
        ("meta skuid @uids counter drop;", "", BOTH),
        ("meta skuid { 7, 247200 } reject;", "", BOTH),
        ("meta skuid != 0 drop;", "", BOTH),
        ("meta skuid 247200 goto known;", "log; drop;", BOTH),
        ("jump known;", "meta skuid >= 247000 drop;", BOTH),
        ("meta nfproto ipv4 meta skuid 247200 drop;", "", IPV4),
        ('meta skuid 247200 oifname != "lo" drop;', "", NONE),
        ("meta skuid 247200 tcp dport 22 drop;", "", NONE),
        ("meta skuid 247200 limit rate 1/second drop;", "", NONE),
        ('oifname "lo" accept; meta skuid 247200 drop;', "", NONE),
        ("meta skuid 5 drop;", "", NONE),
        ("meta skuid vmap { 247200 : accept }; meta skuid 247200 drop;", "", NONE),
        ("", "", NONE),
    ],
)
def test_nftables(out: str, known: str, expected: tuple[bool, bool]) -> None:
    text = NFT.format(out=out, known=known)
    subprocess.run(["nft", "-f", "-"], input=text, text=True, check=True)

    assert closed() == expected


@pytest.mark.parametrize("flavour", ["legacy", "nft"])
@pytest.mark.parametrize(
    ("rules", "expected"),
    [
        (["-A OUTPUT -m owner --uid-owner 247200 -j DROP"], True),
        (["-A OUTPUT -m owner --uid-owner 247000-248000 -j REJECT"], True),
        (["-A OUTPUT -o lo -m owner --uid-owner 247200 -j DROP"], False),
        (["-A OUTPUT -p udp -j ACCEPT", "-A OUTPUT -m owner --uid-owner 247200 -j DROP"], False),
    ],
)
def test_iptables_of_either_flavour(flavour: str, rules: list[str], expected: bool) -> None:
    for tool in ("iptables", "ip6tables"):
        for rule in rules:
            run(f"{tool}-{flavour}", rule)

    assert closed() == (expected, expected)


def test_several_uids_are_told_apart() -> None:
    run("iptables-legacy", f"-A OUTPUT -m owner --uid-owner {UID} -j DROP")

    found: Any = cover([process(UID), process(UID + 1)])

    assert [one.coverage.ipv4 for one in found] == [True, False]
    assert found[0].coverage.rules == ("iptables table filter",)


def test_each_uid_of_a_process_counts() -> None:
    """It may send as any of them."""
    for tool in ("iptables", "ip6tables"):
        run(f"{tool}-legacy", f"-A OUTPUT -m owner --uid-owner {UID} -j DROP")

    found: Any = cover([process(UID, UID + 1), process(UID)])

    assert [one.coverage.ipv4 for one in found] == [False, True]
    mixed, closed = (try_rules(one).canary for one in found)
    assert mixed is not None and closed is not None
    assert mixed.sent and mixed.refused
    assert closed.refused and not closed.sent


def test_a_process_with_too_many_uids_is_unread_and_spoils_no_other() -> None:
    many, one = cover([process(*range(UID, UID + 9)), process(UID)])

    assert many.coverage is None
    assert "more than 8 uids" in many.unread["coverage"]
    assert "more than 8 uids" in try_rules(many).unread["canary"]
    assert one.coverage is not None


def test_root_s_packets_can_be_tried_too() -> None:
    tried = try_rules(process(0)).canary

    assert tried is not None
    assert tried.sent
    assert tried.refused == ()
