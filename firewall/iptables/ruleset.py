"""A policy as rules of the legacy tables (pure).

In `filter`, a chain TAG that OUTPUT jumps to first:

    -m owner ! --socket-exists -m connmark --mark M/M -j DROP    what close() left queued
    -p tcp -m owner ! --socket-exists -m conntrack --ctstate NEW -j DROP    the same, unmarked
    -p tcp -m owner ! --socket-exists -m connmark --mark C/C … -j DROP      the same, by SYN cookie
    -m owner ! --uid-owner LOWEST-HIGHEST -j RETURN              everybody else, quickly
    -m owner --uid-owner A-B -m limit … -j LOG                   once a range
    -m owner --uid-owner A-B -j DROP                             once a range

and in `mangle`, which the kernel asks before `filter`, a chain TAG that sets the mark M on the
connection of whatever a range sends, and C on one that a SYN cookie began. The rules are the same
for IPv4 and IPv6. The line with RETURN is left out for a single range, where it would save nothing.
"""

from collections.abc import Iterable
from typing import Final

from attrs import frozen

from firewall.policy import COOKIE_MARK, MARK, LogSettings, Policy, UidPairs

# Each option with its arguments; `!` before them negates it.
Options = tuple[tuple[str, ...], ...]

TABLES: Final = ("mangle", "filter")
HOOK: Final = "OUTPUT"

_MARK: Final = f"{MARK:#x}/{MARK:#x}"


@frozen
class Part:
    """A match or a target: its name and options."""

    name: str
    options: Options = ()

    def words(self) -> list[str]:
        """The options as iptables-save writes them."""
        words = []
        for option, *arguments in self.options:
            is_negated = arguments[:1] == ["!"]
            words += ["!", f"--{option}"] if is_negated else [f"--{option}"]
            words += arguments[is_negated:]
        return words


@frozen
class Rule:
    """One rule of a chain of ours."""

    target: Part
    matches: tuple[Part, ...] = ()
    protocol: str = ""

    def words(self) -> tuple[str, ...]:
        """The rule after `-A CHAIN`, word by word, as iptables-save writes it."""
        words = ["-p", self.protocol] if self.protocol else []
        words += [word for match in self.matches for word in ("-m", match.name, *match.words())]
        return (*words, "-j", self.target.name, *self.target.words())

    def line(self, chain: str) -> str:
        """The rule as iptables-restore reads it."""
        quoted = (f'"{word}"' if " " in word else word for word in self.words())
        return " ".join(["-A", chain, *quoted])


def rules(policy: Policy) -> dict[str, tuple[Rule, ...]]:
    """What the chain TAG holds in each table."""
    return {"mangle": tuple(_mangle(policy.uids)), "filter": tuple(_filter(policy))}


_OWNERLESS: Final = Part("owner", (("socket-exists", "!"),))
_COOKIE: Final = f"{COOKIE_MARK:#x}/{COOKIE_MARK:#x}"
_HAS_COOKIE: Final = Part("connmark", (("mark", _COOKIE),))
_SYN_ACK: Final = ("SYN,ACK", "SYN,ACK")


def _mangle(uids: UidPairs) -> Iterable[Rule]:
    # A SYN cookie's answer has no socket, and nothing tells whose listener it was. So the whole
    # connection is noted, until a packet of it shows an owner (any; the pool's is marked below).
    is_answer = Part("tcp", (("tcp-flags", *_SYN_ACK),))
    note = Part("CONNMARK", (("set-xmark", _COOKIE),))
    yield Rule(note, (_OWNERLESS, is_answer), "tcp")
    has_owner = Part("owner", (("socket-exists",),))
    forget = Part("CONNMARK", (("set-xmark", f"0x0/{COOKIE_MARK:#x}"),))
    yield Rule(forget, (has_owner, _HAS_COOKIE), "tcp")
    yield from _others(uids)
    for pair in uids:
        yield Rule(Part("CONNMARK", (("set-xmark", _MARK),)), (_owner(pair),))


def _filter(policy: Policy) -> Iterable[Rule]:
    # Before anything by owner: an ownerless packet counts as "not of these uids". A packet that
    # has an owner outside the pool is never judged by the mark, see the nftables rule set.
    yield Rule(Part("DROP"), (_OWNERLESS, Part("connmark", (("mark", _MARK),))))
    # The mark of a connection that conntrack first meets in a packet that is dropped is lost with
    # it: one from before the rules has none. TCP without a socket begins no connection of its own,
    # so that "new" is the middle of one that was closed with data queued. (Kernel services have
    # sockets, and resets belong to connections that the other side's packet made known.)
    is_new = Part("conntrack", (("ctstate", "NEW"),))
    yield Rule(Part("DROP"), (_OWNERLESS, is_new), "tcp")
    # A peer that answers a cookie with a window of zero, and opens it after close(), would get
    # all that was written although no packet ever had an owner. What a service of the host loses
    # is its acknowledgements, while it is flooded, of a connection that it hasn't accepted yet.
    is_no_answer = Part("tcp", (("tcp-flags", "!", *_SYN_ACK),))
    yield Rule(Part("DROP"), (_OWNERLESS, _HAS_COOKIE, is_no_answer), "tcp")
    yield from _others(policy.uids)
    limit = Part("limit", (("limit", format_rate(policy.log.per_minute)),))
    for pair in policy.uids:
        yield Rule(_log(policy.log), (_owner(pair), limit))
        yield Rule(Part("DROP"), (_owner(pair),))


def _others(uids: UidPairs) -> Iterable[Rule]:
    """Let uids outside the pool's bounds go, before they are compared with a long list."""
    if len(uids) > 1:
        bounds = f"{uids[0][0]}-{uids[-1][1]}"
        yield Rule(Part("RETURN"), (Part("owner", (("uid-owner", "!", bounds),)),))


def _owner(pair: tuple[int, int]) -> Part:
    first, last = pair
    uids = str(first) if first == last else f"{first}-{last}"
    return Part("owner", (("uid-owner", uids),))


def _log(log: LogSettings) -> Part:
    if log.group is None:
        return Part("LOG", (("log-prefix", log.prefix), ("log-uid",)))
    # Group 0 is the default, which iptables-save leaves out.
    group = (("nflog-group", str(log.group)),) if log.group else ()
    return Part("NFLOG", (("nflog-prefix", log.prefix), *group))


def format_rate(per_minute: int) -> str:
    """The rate as iptables-save prints it: the kernel keeps a period, and the unit is lost.

    After print_rate of iptables' extensions/libxt_limit.c; a period is in 1/10,000 s.
    """
    units = (("day", 864_000_000), ("hour", 36_000_000), ("min", 600_000), ("sec", 10_000))
    period = 600_000 // per_minute
    chosen = units[0]
    for unit in units[1:]:
        if period > unit[1] or unit[1] // period < unit[1] % period:
            break
        chosen = unit
    return f"{chosen[1] // period}/{chosen[0]}"
