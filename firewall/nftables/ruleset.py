"""A policy as nftables commands (pure): nft(8)'s own language, one transaction.

    table inet TAG
        set pool         the uids, as intervals
        set logged       who was logged of late, and how much of the allowance is left
        set listeners4/6 local ends on which a uid of the pool was seen to answer a SYN
        set flows4/6     connections of the pool that conntrack didn't know
        chain output     at the output hook: sends what belongs to the pool to `refuse`
        chain known      what has an owner outside the pool: let go
        chain refuse     marks the connection, logs, counts by family, drops

Nothing accepts: a verdict of ours can only end a packet, never save one from somebody else's rule.
The text form and not JSON: the JSON of nft 1.0.6 can't declare a dynamic set.
"""

from collections.abc import Iterable, Mapping
from typing import Any, Final

from firewall.policy import COOKIE_MARK, LOG_BURST, MARK, Family, LogSettings, Policy, UidPairs

POOL: Final = "pool"
COUNTERS: Final[dict[Family, str]] = {"ipv4": "dropped_ipv4", "ipv6": "dropped_ipv6"}

# `logged` has an element for each uid that was refused within a minute; when it is full, lines
# are lost, not drops. `listeners`: a half-open connection is answered for about 63 s (tcp(7):
# tcp_synack_retries 5), with 32 s between the last two answers, and each answer renews the entry.
# A packet without an owner that comes from such an end is a SYN cookie of the pool's. Where an end
# is missing (a kernel that sends nothing but cookies, a set that somebody filled) that answer goes,
# and no more, see COOKIE_MARK. `flows`: the
# mark of a connection that conntrack first meets in a packet that is dropped is lost with it, so
# that one from before the rules is remembered here; TCP retransmits every 120 s at the rarest.
_SETS: Final = """\
add set inet {table} pool {{ type uid; flags interval; }}
add set inet {table} logged {{ type uid; size 65535; flags dynamic,timeout; timeout 1m; }}
add set inet {table} listeners4 {{ type ipv4_addr . inet_service; size 65535; \
flags dynamic,timeout; timeout 5m; }}
add set inet {table} listeners6 {{ type ipv6_addr . inet_service; size 65535; \
flags dynamic,timeout; timeout 5m; }}
add set inet {table} flows4 {{ type ipv4_addr . inet_service . ipv4_addr . inet_service; \
size 65535; flags dynamic,timeout; timeout 5m; }}
add set inet {table} flows6 {{ type ipv6_addr . inet_service . ipv6_addr . inet_service; \
size 65535; flags dynamic,timeout; timeout 5m; }}
"""

_CHAINS: Final = """\
add chain inet {table} refuse
add chain inet {table} known
add chain inet {table} output {{ type filter hook output priority 0; policy accept; }}
flush chain inet {table} output
flush chain inet {table} known
flush chain inet {table} refuse
flush set inet {table} pool
"""

# Who is refused: the pool's own packets, and ownerless ones of what the pool began. A packet has
# no owner once close() has orphaned its connection, and a SYN cookie's answer has none from the
# start. A packet that does have one, not of the pool, is let go before the mark is looked at: a
# uid that shares a UDP port with a service (SO_REUSEADDR) can put the mark on that service's
# connection, and must not silence it so. Whose a SYN cookie is nothing tells: its connection is
# noted, and gets nothing out but that answer until a packet of it has an owner. A peer that shuts
# the window meanwhile, and opens it after close(), would otherwise get all that was written. What a
# service of the host loses is its acknowledgements, while it is flooded, of a connection that it
# hasn't accepted yet.
_OUTPUT: Final = """\
add rule inet {table} output meta skuid @pool goto refuse
add rule inet {table} output meta skuid >= 0 goto known
add rule inet {table} output ct mark & {mark:#x} == {mark:#x} goto refuse
add rule inet {table} output tcp flags & (syn | ack) == syn | ack \
ip saddr . tcp sport @listeners4 goto refuse
add rule inet {table} output tcp flags & (syn | ack) == syn | ack \
ip6 saddr . tcp sport @listeners6 goto refuse
add rule inet {table} output ip saddr . tcp sport . ip daddr . tcp dport @flows4 goto refuse
add rule inet {table} output ip6 saddr . tcp sport . ip6 daddr . tcp dport @flows6 goto refuse
add rule inet {table} output tcp flags & (syn | ack) == syn | ack ct mark set ct mark | {cookie:#x}
add rule inet {table} output tcp flags & (syn | ack) != syn | ack \
ct mark & {cookie:#x} == {cookie:#x} goto refuse
add rule inet {table} known ct mark & {cookie:#x} == {cookie:#x} ct mark set ct mark & {rest:#x}
"""

# Mark, remember, log, count, drop: only the last two rules end a packet.
_REFUSE: Final = """\
add rule inet {table} refuse ct mark set ct mark | {mark:#x}
add rule inet {table} refuse meta skuid @pool tcp flags & (syn | ack) == syn | ack \
update @listeners4 {{ ip saddr . tcp sport }}
add rule inet {table} refuse meta skuid @pool tcp flags & (syn | ack) == syn | ack \
update @listeners6 {{ ip6 saddr . tcp sport }}
add rule inet {table} refuse ct state new tcp flags & syn != syn \
update @flows4 {{ ip saddr . tcp sport . ip daddr . tcp dport }}
add rule inet {table} refuse ct state new tcp flags & syn != syn \
update @flows6 {{ ip6 saddr . tcp sport . ip6 daddr . tcp dport }}
add rule inet {table} refuse update @logged {{ meta skuid limit rate {rate}/minute \
burst {burst} packets }} {log}
add rule inet {table} refuse meta nfproto ipv4 counter name dropped_ipv4 drop
add rule inet {table} refuse counter name dropped_ipv6 drop
"""


def install(policy: Policy, dropped: Mapping[Family, tuple[int, int]] | None = None) -> str:
    """Commands that make the table hold the policy, whether or not it is there already.

    The rules are flushed and added anew within the transaction, so that no packet meets half of
    them; counters that exist keep their values, and new ones start from `dropped` (packets,
    bytes).
    """
    start = dropped or {}
    values = {
        "table": policy.tag,
        "mark": MARK,
        "cookie": COOKIE_MARK,
        "rest": 0xFFFFFFFF ^ COOKIE_MARK,
        "rate": policy.log.per_minute,
        "burst": LOG_BURST,
        "log": _log(policy.log),
    }
    return "".join(
        [
            f"add table inet {policy.tag}\n",
            _SETS.format_map(values),
            *(_counter(policy.tag, family, start.get(family, (0, 0))) for family in COUNTERS),
            _CHAINS.format_map(values),
            _elements(policy),
            _OUTPUT.format_map(values),
            _REFUSE.format_map(values),
        ]
    )


def remove(table: str) -> str:
    """Commands that delete the table, there or not (`destroy` is unknown to nft 1.0.6)."""
    return f"add table inet {table}\ndelete table inet {table}\n"


def _counter(table: str, family: Family, value: tuple[int, int]) -> str:
    packets, size = value
    return f"add counter inet {table} {COUNTERS[family]} {{ packets {packets} bytes {size} }}\n"


def _elements(policy: Policy) -> str:
    if not policy.uids:
        return ""
    listed = ", ".join(
        str(first) if first == last else f"{first}-{last}" for first, last in policy.uids
    )
    return f"add element inet {policy.tag} {POOL} {{ {listed} }}\n"


def _log(log: LogSettings) -> str:
    """A log group carries the uid by itself (NFULA_UID), and nft refuses flags beside it."""
    if log.group is None:
        return f'log prefix "{log.prefix}" flags skuid'
    return f'log prefix "{log.prefix}" group {log.group}'


def parse_uids(elements: Iterable[Any]) -> UidPairs:
    """The pairs that the elements of a set listed as JSON stand for (libnftables-json(5)).

    Raises ValueError for an element that no version of ours writes.
    """
    pairs = []
    for element in elements:
        match element:
            case int():
                pairs.append((element, element))
            case {"range": [int(first), int(last)]}:
                pairs.append((first, last))
            case {"prefix": {"addr": int(first), "len": int(length)}}:
                pairs.append((first, first + (1 << (32 - length)) - 1))
            case _:
                raise ValueError(f"an element of the set that is no uid: {element!r}")
    return tuple(sorted(pairs))
