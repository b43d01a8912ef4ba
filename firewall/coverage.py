"""Whether the packet rules of a host, whoever made them, drop all that a uid sends.

Told from the structure of the rules: every packet of the uid must meet a drop whatever it looks
like otherwise, and no accept before it in that chain. A rule with a condition that isn't
understood is taken to let packets by. What has lost its owner (see kvmsec's own rules) is not
asked about.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from enum import Enum
from typing import Final, Literal

from attrs import frozen

from firewall.errors import FirewallError
from firewall.policy import FAMILIES, Family

Applies = Literal["always", "maybe", "never"]
Verdict = Literal["drop", "accept", "return", "jump", "goto"]

_DEPTH: Final = 16  # NFT_JUMP_STACK_SIZE, linux/include/net/netfilter/nf_tables.h


@frozen
class Rule:
    """A rule as far as one uid is concerned: for which packets it counts, and what it does."""

    applies: Applies
    verdict: Verdict | None = None
    target: str | None = None


@frozen
class Chain:
    """Rules in their order; `policy` is what becomes of the rest, None but at the output hook."""

    rules: tuple[Rule, ...]
    policy: Verdict | None = None


@frozen
class RuleSet:
    """The chains of one table in one family, and what to call it."""

    title: str
    family: Family
    chains: Mapping[str, Chain]


@frozen
class Coverage:
    """Which families are closed to a uid, and the tables that do it."""

    families: tuple[Family, ...]
    tables: tuple[str, ...]


class _End(Enum):
    DROPPED = "every packet was dropped"
    FELL_THROUGH = "none was accepted, and some may go on"
    ESCAPED = "some may have been accepted"


def evaluate(tables: Iterable[RuleSet]) -> Coverage:
    """Which families a uid can send nothing in, by any table's chain at the output hook."""
    closed: dict[Family, list[str]] = {family: [] for family in FAMILIES}
    for table in tables:
        base = [chain for chain in table.chains.values() if chain.policy is not None]
        if any(_walk(chain, table.chains, 0) is _End.DROPPED for chain in base):
            closed[table.family].append(table.title)
    titles = dict.fromkeys(title for found in closed.values() for title in found)
    return Coverage(tuple(family for family in FAMILIES if closed[family]), tuple(titles))


def _walk(chain: Chain, chains: Mapping[str, Chain], depth: int) -> _End:
    for rule in chain.rules:
        end = _meet(rule, chains, depth)
        if end is not None:
            return end
    return _End.DROPPED if chain.policy == "drop" else _End.FELL_THROUGH


def _meet(rule: Rule, chains: Mapping[str, Chain], depth: int) -> _End | None:
    """How a chain ends at this rule; None when packets may go on to the next one."""
    is_certain = rule.applies == "always"
    if rule.applies == "never" or rule.verdict is None:
        return None
    if rule.verdict == "drop":
        return _End.DROPPED if is_certain else None
    if rule.verdict == "accept":
        return _End.ESCAPED
    if rule.verdict == "return":
        return _End.FELL_THROUGH if is_certain else _End.ESCAPED
    target = chains.get(rule.target or "")
    if target is None or depth >= _DEPTH:
        return _End.ESCAPED
    end = _walk(target, chains, depth + 1)
    if end is _End.ESCAPED or (end is _End.DROPPED and is_certain):
        return end
    if rule.verdict == "goto" and end is _End.FELL_THROUGH:
        return _End.FELL_THROUGH if is_certain else _End.ESCAPED
    return None


Listing = Callable[[int], Sequence[RuleSet]]
"""Rules that were read once, as they concern a uid."""


def read_coverage(uids: Iterable[int]) -> dict[int, Coverage]:
    """Read every rule of the caller's network namespace, once for all uids; changes nothing.

    Raises RulesUnreadable when none can be read.
    """
    from firewall.iptables.listed import read_tools
    from firewall.nftables.listed import read_tables

    listings = _gather((read_tables, read_tools))
    return {uid: evaluate(one for listing in listings for one in listing(uid)) for uid in uids}


def _gather(readers: Sequence[Callable[[], Listing]]) -> list[Listing]:
    """What the readers find; one that this host can't serve is passed over, unless all are."""
    found: list[Listing] = []
    refusals: list[FirewallError] = []
    for read in readers:
        try:
            found.append(read())
        except FirewallError as error:
            refusals.append(error)
    if not found:
        raise refusals[0]
    return found
