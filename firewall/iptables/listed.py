"""Every iptables rule of this namespace, whoever made it, as it concerns one uid.

Of the legacy tables, and of those that the nft flavour of the tools has written.
"""

from collections.abc import Mapping
from typing import Final

from firewall.coverage import Applies, Chain, Listing, Rule, RuleSet, Verdict
from firewall.errors import RulesUnreadable
from firewall.iptables.counters import tables_in_use
from firewall.iptables.ruleset import HOOK
from firewall.iptables.saved import Line, Tables, parse_save
from firewall.policy import FAMILIES, Family
from kvmsec.linux import command
from kvmsec.linux.errors import CommandFailed, CommandTimedOut

_DEADLINE_S: Final = 10.0
_COMMANDS: Final[Mapping[Family, str]] = {"ipv4": "iptables", "ipv6": "ip6tables"}
_VERDICTS: Final[Mapping[str, Verdict]] = {
    "DROP": "drop",
    "REJECT": "drop",
    "ACCEPT": "accept",
    "RETURN": "return",
}
_CONTINUES: Final = ("LOG", "NFLOG", "MARK", "CONNMARK")
# What follows these targets says how they do it, and nothing of which packets.
_OF_TARGET: Final = (*_CONTINUES, "REJECT")


def read_tools() -> Listing:
    """The rules in force, both flavours. Raises RulesUnreadable."""
    found: list[tuple[Tables, Family]] = []
    for family in FAMILIES:
        if tables_in_use(family):
            found += _read(f"{_COMMANDS[family]}-legacy-save", family)
        found += _read(f"{_COMMANDS[family]}-nft-save", family)
    return lambda uid: [
        table for tables, family in found for table in parse_tables(tables, family, uid)
    ]


def _read(program: str, family: Family) -> list[tuple[Tables, Family]]:
    try:
        done = command.run([program, "-c"], timeout_s=_DEADLINE_S)
        return [(parse_save(done.stdout.decode(errors="replace")), family)]
    except FileNotFoundError:
        return []
    except (CommandFailed, CommandTimedOut, ValueError, KeyError) as error:
        raise RulesUnreadable("iptables", f"{family}: {error}", hint="run as root") from error


def parse_tables(tables: Tables, family: Family, uid: int) -> list[RuleSet]:
    """The tables of an iptables-save; only a chain OUTPUT is at the hook."""
    return [
        RuleSet(
            f"{_COMMANDS[family]} table {name}",
            family,
            {
                chain: Chain(
                    tuple(_rule(line, uid) for line in lines), "accept" if chain == HOOK else None
                )
                for chain, lines in chains.items()
            },
        )
        for name, chains in tables.items()
    ]


def _rule(line: Line, uid: int) -> Rule:
    applies: Applies = "always"
    words = list(line.words)
    while words:
        word = words.pop(0)
        is_negated = word == "!"
        if is_negated and words:
            word = words.pop(0)
        takes_word = word == "-m" and words[:1] in (["owner"], ["comment"])
        if takes_word or (word == "--comment" and words):
            words.pop(0)
        elif word == "--uid-owner" and words:
            applies = _owner(words.pop(0), is_negated, uid, applies)
        elif word in ("-j", "-g") and words:
            return _target(word, words, applies)
        else:
            applies = "never" if applies == "never" else "maybe"
    return Rule(applies)


def _owner(text: str, is_negated: bool, uid: int, applies: Applies) -> Applies:
    first, _, last = text.partition("-")
    if not (first.isdigit() and (last or first).isdigit()):
        return "maybe"
    is_met = (int(first) <= uid <= int(last or first)) != is_negated
    return applies if is_met else "never"


def _target(word: str, words: list[str], applies: Applies) -> Rule:
    name = words.pop(0)
    if words and name not in _OF_TARGET:
        applies = "never" if applies == "never" else "maybe"
    if name in _VERDICTS:
        return Rule(applies, _VERDICTS[name])
    if name in _CONTINUES:
        return Rule(applies)
    return Rule(applies, "goto" if word == "-g" else "jump", name)
