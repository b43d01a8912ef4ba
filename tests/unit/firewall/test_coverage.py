"""Whether a uid is closed off, told from rules that anybody may have written."""

from typing import Any

import pytest

from firewall.coverage import Chain, Rule, RuleSet, evaluate
from firewall.iptables.listed import parse_tables
from firewall.iptables.saved import parse_save
from firewall.nftables.listed import parse_ruleset

UID = 30005
DROP: dict[str, Any] = {"drop": None}


def skuid(right: Any, op: str = "==") -> dict[str, Any]:
    return {"match": {"op": op, "left": {"meta": {"key": "skuid"}}, "right": right}}


def nft(*rules: list[Any], family: str = "inet", hook: str = "output", **more: Any) -> Any:
    """The families that a table of one chain, and `more` chains, closes to the uid."""
    table: dict[str, Any] = {"family": family, "name": "t", **more.pop("table", {})}
    policy = more.pop("policy", "accept")
    sets = more.pop("sets", {})
    chain = {"family": family, "table": "t", "name": "out", "hook": hook, "policy": policy}
    entries: list[Any] = [{"metainfo": {}}, {"table": table}, {"chain": chain}]
    for name, elements in sets.items():
        entries.append({"set": {"family": family, "table": "t", "name": name, "elem": elements}})
    for name, inner in {"out": rules, **more}.items():
        if name != "out":
            entries.append({"chain": {"family": family, "table": "t", "name": name}})
        for expressions in inner:
            rule = {"family": family, "table": "t", "chain": name, "expr": expressions}
            entries.append({"rule": rule})
    return evaluate(parse_ruleset({"nftables": entries}, UID)).families


BOTH = ("ipv4", "ipv6")


@pytest.mark.parametrize(
    ("value", "op"),
    [
        (UID, "=="),
        ({"set": [1, UID]}, "=="),
        ({"set": [{"range": [30000, 30010]}]}, "=="),
        ({"set": [{"elem": {"val": UID, "comment": "x"}}]}, "in"),
        ({"range": [30000, 30010]}, "=="),
        ("@pool", "=="),
        (1, "!="),
        (30000, ">="),
        (30006, "<"),
    ],
)
def test_every_way_to_name_a_uid_is_understood(value: Any, op: str) -> None:
    sets = {"pool": [{"range": [30000, 30010]}]}

    assert nft([skuid(value, op), {"counter": {"packets": 0, "bytes": 0}}, DROP], sets=sets) == BOTH


@pytest.mark.parametrize(
    ("value", "op"),
    [(1, "=="), ("@pool", "=="), ("@missing", "=="), ("qemu", "=="), (UID, "!="), (UID, ">")],
)
def test_another_uid_or_one_that_is_not_understood_is_open(value: Any, op: str) -> None:
    assert nft([skuid(value, op), DROP], sets={"pool": [1]}) == ()


def test_a_family_s_table_closes_that_family() -> None:
    assert nft([skuid(UID), DROP], family="ip") == ("ipv4",)
    assert nft([skuid(UID), DROP], family="ip6") == ("ipv6",)
    assert nft([skuid(UID), DROP], family="bridge") == ()


def test_a_condition_beside_the_uid_leaves_a_way() -> None:
    out_of_loopback = {"match": {"op": "!=", "left": {"meta": {"key": "oifname"}}, "right": "lo"}}

    assert nft([skuid(UID), out_of_loopback, DROP]) == ()
    assert nft([skuid(UID), {"limit": {"rate": 1, "per": "second"}}, DROP]) == ()


def test_one_family_may_be_named_in_a_rule() -> None:
    ipv6 = {"match": {"op": "==", "left": {"meta": {"key": "nfproto"}}, "right": "ipv6"}}

    assert nft([skuid(UID), ipv6, {"reject": {}}]) == ("ipv6",)


def test_an_accept_before_the_drop_leaves_a_way() -> None:
    dns = {"match": {"op": "==", "left": {"payload": {}}, "right": 53}}

    assert nft([dns, {"accept": None}], [skuid(UID), DROP]) == ()
    assert nft([skuid(1), {"accept": None}], [skuid(UID), DROP]) == BOTH
    assert nft([{"vmap": {}}], [skuid(UID), DROP]) == ()


def test_another_hook_a_dormant_table_and_a_chain_without_hook_close_nothing() -> None:
    assert nft([skuid(UID), DROP], hook="input") == ()
    assert nft([skuid(UID), DROP], table={"flags": ["dormant"]}) == ()
    assert nft(unused=[[skuid(UID), DROP]]) == ()


def test_a_policy_of_drop_closes_what_no_rule_lets_through() -> None:
    assert nft(policy="drop") == BOTH
    assert nft([skuid(0), {"accept": None}], policy="drop") == BOTH
    assert nft([{"accept": None}], policy="drop") == ()


def test_jumps_and_gotos_are_followed() -> None:
    refuse = [[{"log": {}}, {"counter": None}, DROP]]

    assert nft([skuid(UID), {"goto": {"target": "refuse"}}], refuse=refuse) == BOTH
    assert nft([skuid(UID), {"jump": {"target": "refuse"}}], refuse=refuse) == BOTH
    assert nft([skuid(1), {"jump": {"target": "refuse"}}], refuse=refuse) == ()
    assert nft([{"jump": {"target": "owners"}}], owners=[[skuid(UID), DROP]]) == BOTH
    back = [[{"return": None}], [DROP]]
    assert nft([skuid(UID), {"jump": {"target": "back"}}], back=back) == ()
    assert nft([skuid(UID), {"goto": {"target": "nothing"}}], [DROP], nothing=[]) == ()


def test_chains_that_call_each_other_without_end_are_open() -> None:
    loop = Rule("always", "jump", "a")
    table = RuleSet("t", "ipv4", {"a": Chain((loop,), "accept")})

    assert evaluate([table]).families == ()


def iptables(*lines: str) -> Any:
    text = "\n".join(["*filter", ":OUTPUT ACCEPT [0:0]", ":X - [0:0]", *lines, "COMMIT"])
    return evaluate(parse_tables(parse_save(text), "ipv4", UID)).families


@pytest.mark.parametrize(
    "lines",
    [
        ["[0:0] -A OUTPUT -m owner --uid-owner 30005 -j DROP"],
        ["[0:0] -A OUTPUT -m owner --uid-owner 30000-30010 -j REJECT --reject-with x"],
        ["[0:0] -A OUTPUT -m owner ! --uid-owner 0 -j DROP"],
        ['[0:0] -A OUTPUT -m owner --uid-owner 30005 -m comment --comment "a b" -j DROP'],
        [
            "[0:0] -A OUTPUT -j X",
            '[0:0] -A X -m owner --uid-owner 30005 -j LOG --log-prefix "p "',
            "[0:0] -A X -m owner --uid-owner 30005 -j DROP",
        ],
        ["[0:0] -A OUTPUT -m owner --uid-owner 30005 -g X", "[0:0] -A X -j DROP"],
    ],
)
def test_an_owner_s_drop_closes(lines: list[str]) -> None:
    assert iptables(*lines) == ("ipv4",)


@pytest.mark.parametrize(
    "lines",
    [
        [],
        ["[0:0] -A OUTPUT -m owner --uid-owner 1 -j DROP"],
        ["[0:0] -A OUTPUT ! -o lo -m owner --uid-owner 30005 -j DROP"],
        ["[0:0] -A OUTPUT -p tcp -m owner --uid-owner 30005 -j DROP"],
        ["[0:0] -A OUTPUT -m owner --uid-owner qemu -j DROP"],
        [
            "[0:0] -A OUTPUT -p udp -j ACCEPT",
            "[0:0] -A OUTPUT -m owner --uid-owner 30005 -j DROP",
        ],
        ["[0:0] -A X -m owner --uid-owner 30005 -j DROP"],
        ["[0:0] -A OUTPUT -j UNHEARD", "[0:0] -A OUTPUT -m owner --uid-owner 30005 -j DROP"],
    ],
)
def test_whatever_leaves_a_way_is_open(lines: list[str]) -> None:
    assert iptables(*lines) == ()


def test_the_tables_that_close_are_named() -> None:
    text = "*filter\n:OUTPUT ACCEPT [0:0]\n[0:0] -A OUTPUT -m owner --uid-owner 30005 -j DROP\n"

    found = evaluate(parse_tables(parse_save(text), "ipv6", UID))
    assert found.tables == ("ip6tables table filter",)
