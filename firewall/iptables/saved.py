"""What the legacy tables hold, as iptables-save writes it, against what they should (pure)."""

import itertools
import re
from collections.abc import Mapping, Sequence
from typing import Final

from attrs import frozen

from firewall.backend import Dropped, Finding
from firewall.iptables.ruleset import HOOK, TABLES, Rule, rules
from firewall.policy import TAG_PATTERN, Family, Policy, UidPairs

Counters = tuple[int, int]

NO_COUNTERS: Final = (0, 0)
_MEND_HINT: Final = "run `kvmsec firewall apply` to put the rules back"

# A quote inside a quoted word is only met in a foreign rule, whose words are not compared. (shlex
# takes 60 us a line, and a scattered pool has thousands.)
_WORD: Final = re.compile(r'"[^"]*"|\S+')


@frozen
class Line:
    """A rule as iptables-save wrote it: its text after `-A CHAIN`, its words, its counters."""

    text: str
    words: tuple[str, ...]
    counters: Counters = NO_COUNTERS

    @classmethod
    def parse(cls, text: str, counters: Counters = NO_COUNTERS) -> "Line":
        words = tuple(word.strip('"') for word in _WORD.findall(text))
        return cls(text, words, counters)


Chains = Mapping[str, Sequence[Line]]
Tables = Mapping[str, Chains]


def parse_save(text: str) -> Tables:
    """The tables in the output of `iptables-save -c`. Raises ValueError for a line unknown."""
    tables: dict[str, dict[str, list[Line]]] = {}
    chains: dict[str, list[Line]] = {}
    # Only that ends a line: a rule's comment may hold what `splitlines` takes for the end of one.
    for line in text.split("\n"):
        if not line or line.startswith("#") or line == "COMMIT":
            continue
        if line.startswith("*"):
            chains = tables.setdefault(line[1:], {})
        elif line.startswith(":"):
            chains[line[1:].split(" ", 1)[0]] = []
        elif line.startswith("[") and " -A " in line:
            counters, _, rule = line.partition(" -A ")
            chain, _, rest = rule.partition(" ")
            packets, _, size = counters.strip("[]").partition(":")
            chains[chain].append(Line.parse(rest, (int(packets), int(size))))
        else:
            raise ValueError(f"iptables-save said {line[:80]!r}")
    return tables


def chain_of(tables: Tables, table: str, chain: str) -> Sequence[Line] | None:
    """The chain's lines, None when the table or the chain is not there."""
    return tables.get(table, {}).get(chain)


def compare(policy: Policy, tables: Tables, family: Family) -> tuple[Finding, ...]:
    """How one family's tables differ from the policy."""
    return tuple(
        finding
        for table, wanted in rules(policy).items()
        for finding in compare_table(wanted, tables, table, policy.tag, family)
    )


def compare_table(
    wanted: Sequence[Rule], tables: Tables, table: str, tag: str, family: Family
) -> list[Finding]:
    """How one table differs from the rules that our chain is to hold in it."""
    lines = chain_of(tables, table, tag)
    problems = []
    if lines is None:
        problems.append(("rules-missing", f"there is no chain {tag}"))
    elif [line.words for line in lines] != [rule.words() for rule in wanted]:
        changes = _difference(wanted, lines)
        problems.append(("rules-changed", f"the chain {tag} was changed: {changes}"))
    if problem := jump_problem(tables, table, tag):
        problems.append(("rules-bypassed", problem))
    return [
        Finding(code, f"{family} {table}: {problem}", _MEND_HINT, (family,))
        for code, problem in problems
    ]


def _difference(wanted: Sequence[Rule], lines: Sequence[Line]) -> str:
    there = {line.words for line in lines}
    expected = {rule.words() for rule in wanted}
    lost = [f"- {' '.join(rule.words())}" for rule in wanted if rule.words() not in there]
    gained = [f"+ {line.text}" for line in lines if line.words not in expected]
    return "; ".join([*lost[:3], *gained[:3]]) or "the order of the rules"


def jump_problem(tables: Tables, table: str, tag: str) -> str | None:
    """Why packets may not reach our chain. Only chains of kvmsec's, which accept nothing, may
    stand before the jump: two roots of one host share OUTPUT."""
    for line in chain_of(tables, table, HOOK) or ():
        if line.words == ("-j", tag):
            return None
        is_sibling = line.words[:1] == ("-j",) and TAG_PATTERN.fullmatch(" ".join(line.words[1:]))
        if not is_sibling:
            return f"{HOOK} asks `{line.text}` before {tag}"
    return f"{HOOK} does not jump to {tag}"


def jumps(tables: Tables, table: str, tag: str) -> list[tuple[str, int, Line]]:
    """Every rule that leads to our chain: the chain it is in, its place from 1, itself."""
    return [
        (chain, place, line)
        for chain, lines in tables.get(table, {}).items()
        for place, line in enumerate(lines, 1)
        if any(pair in (("-j", tag), ("-g", tag)) for pair in itertools.pairwise(line.words))
    ]


def dropped(tables: Tables, tag: str) -> int:
    """Packets that the chain has dropped."""
    lines = chain_of(tables, "filter", tag) or ()
    return sum(line.counters[0] for line in lines if _drops(line.words))


def _drops(words: tuple[str, ...]) -> bool:
    return words[-2:] == ("-j", "DROP")


def uids(tables: Tables, tag: str) -> UidPairs:
    """The uids that the chain drops."""
    pairs = []
    for line in chain_of(tables, "filter", tag) or ():
        match line.words:
            case ("-m", "owner", "--uid-owner", text, "-j", "DROP"):
                first, _, last = text.partition("-")
                pairs.append((int(first), int(last or first)))
            case _:
                pass
    return tuple(sorted(pairs))


def heirs(wanted: Sequence[Rule], lines: Sequence[Line]) -> list[tuple[int, ...]]:
    """For each wanted rule, the places of the present lines whose counters it goes on from.

    A rule that stays keeps its own; what rules that go had dropped is added to the first one, so
    that no total falls.
    """
    left: dict[tuple[str, ...], list[int]] = {}
    for place, line in enumerate(lines):
        left.setdefault(line.words, []).append(place)
    inherited: list[tuple[int, ...]] = []
    for rule in wanted:
        same = left.get(rule.words())
        inherited.append((same.pop(0),) if same else ())
    gone = [place for words, places in left.items() if _drops(words) for place in places]
    if inherited:
        inherited[0] += tuple(gone)
    return inherited


def restore_script(now: Tables, before: Tables, tag: str) -> str:
    """What iptables-restore --noflush --counters needs to make our part what it was `before`.

    Foreign rules are not touched; with an empty `before`, nothing of ours is left.
    """
    return "".join(_restore_table(now, before, table, tag) for table in TABLES)


def _restore_table(now: Tables, before: Tables, table: str, tag: str) -> str:
    there, wanted = chain_of(now, table, tag), chain_of(before, table, tag)
    if there is None and wanted is None:
        return ""
    lines = [f"*{table}", f":{tag} - [0:0]"]
    lines += [f"-D {chain} {line.text}" for chain, _, line in jumps(now, table, tag)]
    if wanted is None:
        lines += [f"-F {tag}", f"-X {tag}"]
    else:
        lines += [
            f"-I {chain} {place} {line.text}" for chain, place, line in jumps(before, table, tag)
        ]
        lines += [
            f"[{line.counters[0]}:{line.counters[1]}] -A {tag} {line.text}" for line in wanted
        ]
    return "\n".join([*lines, "COMMIT", ""])


def dropped_by_family(tables: Mapping[Family, Tables], tag: str) -> Dropped:
    """The drop counters of both families."""
    return Dropped(*(dropped(tables[family], tag) for family in ("ipv4", "ipv6")))
