"""Every nftables rule of this namespace, whoever made it, as it concerns one uid.

From the JSON of `nft list ruleset` (libnftables-json(5)).
"""

import json
from collections.abc import Callable, Iterable, Mapping
from typing import Any, Final

from firewall.coverage import Applies, Chain, Listing, Rule, RuleSet, Verdict
from firewall.errors import RulesUnreadable
from firewall.nftables.library import Command, NftFailed, load_library
from firewall.policy import FAMILIES, Family

_OF_TABLE: Final[Mapping[str, tuple[Family, ...]]] = {
    "inet": FAMILIES,
    "ip": ("ipv4",),
    "ip6": ("ipv6",),
}
_VERDICTS: Final[Mapping[str, Verdict]] = {
    "drop": "drop",
    "reject": "drop",
    "accept": "accept",
    "return": "return",
}
# Statements that neither end a packet's way nor decide who goes on.
_HARMLESS: Final = ("counter", "log", "mangle", "notrack", "comment")
_CONDITIONS: Final = ("match", "limit", "set")
_COMPARE: Final[Mapping[str, Callable[[int, int], bool]]] = {
    "<": lambda uid, other: uid < other,
    "<=": lambda uid, other: uid <= other,
    ">": lambda uid, other: uid > other,
    ">=": lambda uid, other: uid >= other,
}


def read_tables() -> Listing:
    """The rules in force, asked of nft. Raises RulesUnreadable."""
    try:
        listed = (load_library() or Command()).list_json("ruleset")
        document = json.loads(listed or '{"nftables": []}')
        parse_ruleset(document, 0)
    except (NftFailed, ValueError, KeyError, TypeError, AttributeError) as error:
        hint = "run as root, with nftables installed"
        raise RulesUnreadable("nftables", str(error), hint=hint) from error
    return lambda uid: parse_ruleset(document, uid)


def parse_ruleset(document: Mapping[str, Any], uid: int) -> list[RuleSet]:
    """The tables of a listing, each once for every family that it serves."""
    entries = document["nftables"]
    tables = [entry["table"] for entry in entries if "table" in entry]
    return [
        RuleSet(
            f"nft table {table['family']} {table['name']}",
            family,
            _chains(entries, table, family, uid),
        )
        for table in tables
        if "dormant" not in table.get("flags", ())
        for family in _OF_TABLE.get(table["family"], ())
    ]


def _chains(
    entries: Iterable[Mapping[str, Any]], table: Mapping[str, Any], family: Family, uid: int
) -> dict[str, Chain]:
    def belongs(one: Mapping[str, Any]) -> bool:
        return bool(one["family"] == table["family"] and one["table"] == table["name"])

    listed = list(entries)
    sets = {
        one["name"]: one.get("elem", [])
        for one in (entry["set"] for entry in listed if "set" in entry)
        if belongs(one)
    }
    rules: dict[str, list[Rule]] = {}
    for one in (entry["rule"] for entry in listed if "rule" in entry):
        if belongs(one):
            rules.setdefault(one["chain"], []).append(_rule(one["expr"], sets, family, uid))
    chains = (entry["chain"] for entry in listed if "chain" in entry)
    return {
        one["name"]: Chain(tuple(rules.get(one["name"], ())), _policy(one))
        for one in chains
        if belongs(one)
    }


def _policy(chain: Mapping[str, Any]) -> Verdict | None:
    if chain.get("hook") != "output":
        return None
    return "drop" if chain.get("policy") == "drop" else "accept"


def _rule(
    expressions: Iterable[Mapping[str, Any]], sets: Mapping[str, Any], family: Family, uid: int
) -> Rule:
    applies: Applies = "always"
    for expression in expressions:
        (kind, content), *_ = expression.items()
        if kind in _VERDICTS:
            return Rule(applies, _VERDICTS[kind])
        if kind in ("jump", "goto"):
            return Rule(applies, "jump" if kind == "jump" else "goto", content["target"])
        if kind in _HARMLESS:
            continue
        if kind not in _CONDITIONS:  # a verdict map, a redirection: it may accept
            return Rule("maybe", "accept")
        found = _match(content, sets, family, uid) if kind == "match" else "maybe"
        if found == "never":
            return Rule("never")
        if found == "maybe":
            applies = "maybe"
    return Rule(applies)


def _match(match: Mapping[str, Any], sets: Mapping[str, Any], family: Family, uid: int) -> Applies:
    left, right, operator = match["left"], match["right"], match.get("op", "==")
    key = left.get("meta", {}).get("key") if isinstance(left, dict) else None
    if key == "nfproto" and operator in ("==", "in") and isinstance(right, str):
        return "always" if right == family else "never"
    if key != "skuid":
        return "maybe"
    if operator in _COMPARE:
        is_met = _COMPARE[operator](uid, right) if isinstance(right, int) else None
    else:
        found = _holds(right, sets, uid)
        is_met = None if found is None else found == (operator != "!=")
    if is_met is None:
        return "maybe"
    return "always" if is_met else "never"


def _holds(value: Any, sets: Mapping[str, Any], uid: int) -> bool | None:
    """Whether a uid is this number, in this range or set; None when that isn't understood."""
    match value:
        case int():
            return value == uid
        case {"range": [int(first), int(last)]}:
            return first <= uid <= last
        case {"prefix": {"addr": int(first), "len": int(length)}}:
            return first <= uid < first + (1 << (32 - length))
        case {"elem": {"val": inner}}:
            return _holds(inner, sets, uid)
        case {"set": elements}:
            return _any(elements if isinstance(elements, list) else [elements], sets, uid)
        case str() if value.startswith("@") and value[1:] in sets:
            return _any(sets[value[1:]], sets, uid)
        case _:
            return None


def _any(elements: Iterable[Any], sets: Mapping[str, Any], uid: int) -> bool | None:
    answers = [_holds(element, sets, uid) for element in elements]
    return True if True in answers else None if None in answers else False
