"""The change of the legacy tables itself, by python-iptables: run it in a child process only.

Where python-iptables doesn't fit the installed iptables, `restore_text` is the same change for
iptables-restore.

python-iptables keeps table handles for the life of a process, bound to the network namespace it
had; it is not safe with threads; a few hundred bad parameters make it unusable, and some crash
it. A forked child of a process that has not used it has none of these, and a crash there is an
error here. It costs the import (0.4 s), which only a change of the rules pays.
"""

import ctypes
import os
import struct
from collections.abc import Callable, Sequence
from typing import Any, Final

from attrs import frozen

from firewall.iptables.counters import read_counters
from firewall.iptables.ruleset import HOOK, Part, Rule
from firewall.iptables.saved import NO_COUNTERS, Counters, Line
from firewall.policy import PREFIX_LIMIT_BYTES, Family

# struct xt_nflog_info of linux/netfilter/xt_NFLOG.h: the prefix follows a u32 and four u16 ...
_NFLOG_PREFIX_OFFSET: Final = 12
# ... and takes 64 bytes, the last ones of the rule.
_NFLOG_INFO_BYTES: Final = 80
# struct xt_entry_match of linux/netfilter/x_tables.h, which comes before a match's own data; the
# data of `owner` begins with the lowest and the highest uid (linux/netfilter/xt_owner.h).
_MATCH_HEADER_BYTES: Final = 32


@frozen
class TableChange:
    """What our chain is to hold in one table of one family, and the jump to it.

    `rules` come with the places of present rules whose counters each goes on from.
    """

    family: Family
    table: str
    chain: str
    rules: tuple[tuple[Rule, tuple[int, ...]], ...]
    # How many rules of OUTPUT jump to the chain now; None leaves them alone.
    misplaced_jumps: int | None


def commit(changes: Sequence[TableChange]) -> None:
    """Carry the changes out, table by table; each commit is atomic, all of them are not.

    The caller holds the xtables lock. Raises what python-iptables raises. Every table is opened
    and every rule made before the first commit, so that a family that the kernel doesn't have
    fails before anything has changed, and so that little time passes between the reading of the
    counters and the commit: packets in between are dropped, but not counted.
    """
    _silence()
    import iptc

    # The library asks every table in ALL whether a target's name is a chain of it, and asking
    # makes the kernel create the table (nat among them, for every packet of the host).
    iptc.Table.ALL = iptc.Table6.ALL = sorted({change.table for change in changes})
    prepared = [_prepare(iptc, change) for change in changes]
    for edit in prepared:
        edit()


def restore_text(change: TableChange, present: Sequence[Line]) -> str:
    """The change as iptables-restore --noflush --counters takes it, in one commit as well.

    `present`: the lines of the chain now, from which counters go on.
    """
    # Named again, a chain is emptied.
    lines = [f"*{change.table}", f":{change.chain} - [0:0]"]
    if change.misplaced_jumps is not None:
        lines += [f"-D {HOOK} -j {change.chain}"] * change.misplaced_jumps
        lines.append(f"-I {HOOK} 1 -j {change.chain}")
    for rule, places in change.rules:
        packets, size = _sum([present[place].counters for place in places])
        lines.append(f"[{packets}:{size}] {rule.line(change.chain)}")
    return "\n".join([*lines, "COMMIT", ""])


def _sum(counters: Sequence[Counters]) -> Counters:
    packets, size = (sum(values) for values in zip(NO_COUNTERS, *counters, strict=True))
    return packets, size


def _silence() -> None:
    """libxtables prints warnings to standard error; what counts comes back as an exception."""
    sink = os.open(os.devnull, os.O_WRONLY | os.O_CLOEXEC)
    os.dup2(sink, 1)
    os.dup2(sink, 2)


def _prepare(iptc: Any, change: TableChange) -> Callable[[], None]:
    """Open the table and make the rules; the edit and its commit are what is returned."""
    table_type, rule_type = (
        (iptc.Table, iptc.Rule) if change.family == "ipv4" else (iptc.Table6, iptc.Rule6)
    )
    # With autocommit on, the library swallows a commit that failed.
    table = table_type(change.table, autocommit=False)
    encoder = _Encoder(rule_type)
    entries = [encoder.encode(rule) for rule, _ in change.rules]

    def edit() -> None:
        old = read_counters(change.family, change.table, change.chain)
        if table.is_chain(change.chain):
            iptc.Chain(table, change.chain).flush()
        else:
            table.create_chain(change.chain)
        for entry, (_, places) in zip(entries, change.rules, strict=True):
            encoder.set_counters(entry, [old[place] for place in places])
            table.append_entry(change.chain, entry)
        if change.misplaced_jumps is not None:
            _put_jump_first(iptc, table, rule_type, change.chain, change.misplaced_jumps)
        table.commit()

    return edit


def _put_jump_first(iptc: Any, table: Any, rule_type: Any, chain: str, misplaced: int) -> None:
    hook = iptc.Chain(table, HOOK)
    # A target is a chain by name only once the table has it.
    jump = _build(rule_type, Rule(Part(chain)))
    for _ in range(misplaced):
        hook.delete_rule(jump)
    hook.insert_rule(jump, 0)


def _build(rule_type: Any, rule: Rule) -> Any:
    built = rule_type()
    if rule.protocol:
        built.protocol = rule.protocol
    for part in rule.matches:
        match = built.create_match(part.name)
        for option, *arguments in part.options:
            match.set_parameter(option, arguments)
    target = built.create_target(rule.target.name)
    for option, *arguments in rule.target.options:
        if option != "nflog-prefix":
            target.set_parameter(option, arguments)
    return built


class _Encoder:
    """Rules as the kernel's bytes; python-iptables makes one of a kind, in 0.2 ms.

    The others of the kind differ in the uids and counters only, which are written into a copy:
    a pool of a thousand ranges has twelve thousand rules.
    """

    def __init__(self, rule_type: Any) -> None:
        self._rule_type = rule_type
        self._made: dict[Rule, Any] = {}
        header = type(rule_type().entry)
        self._counters_at = header.counters.offset
        self._uids_at = ctypes.sizeof(header) + _MATCH_HEADER_BYTES

    def encode(self, rule: Rule) -> Any:
        kind, uids = _without_uids(rule)
        if kind not in self._made:
            self._made[kind] = self._make(rule)
        made = self._made[kind]
        entry = type(made).from_buffer_copy(made)
        if uids is not None:
            struct.pack_into("=II", entry, self._uids_at, *uids)
        return entry

    def set_counters(self, entry: Any, counters: Sequence[Counters]) -> None:
        """Let the entry start from the sum of the counters."""
        struct.pack_into("=QQ", entry, self._counters_at, *_sum(counters))

    def _make(self, rule: Rule) -> Any:
        built = _build(self._rule_type, rule)
        built.final_check()
        entry = built.rule
        for option, *arguments in rule.target.options:
            if option == "nflog-prefix":
                _write_nflog_prefix(entry, *arguments)
        return entry


def _without_uids(rule: Rule) -> tuple[Rule, tuple[int, int] | None]:
    """The kind of a rule (itself with no uids in its first match) and the uids."""
    first, *others = rule.matches
    match first.options:
        case (("uid-owner", *sign, text),):
            lowest, _, highest = text.partition("-")
            kind = Rule(rule.target, (Part(first.name, (("uid-owner", *sign),)), *others))
            return kind, (int(lowest), int(highest or lowest))
    return rule, None


def _write_nflog_prefix(entry: Any, prefix: str) -> None:
    """Put the prefix into the finished rule: setting it as a parameter crashes the library."""
    data = prefix.encode("ascii")
    if len(data) > PREFIX_LIMIT_BYTES:
        raise ValueError(f"a prefix of {len(data)} bytes")
    start = len(entry) - _NFLOG_INFO_BYTES + _NFLOG_PREFIX_OFFSET
    struct.pack_into(f"={PREFIX_LIMIT_BYTES}s", entry, start, data)
