"""What is to hold: which uids may send nothing, how attempts are logged, whose rules they are.

Pure values. A policy is the same for every backend.
"""

import re
from bisect import bisect_right
from collections.abc import Iterable
from typing import Final, Literal

from attrs import field, frozen

from firewall.errors import PolicyError

Family = Literal["ipv4", "ipv6"]
FAMILIES: Final[tuple[Family, ...]] = ("ipv4", "ipv6")

UidPairs = tuple[tuple[int, int], ...]

DEFAULT_TAG: Final = "kvmsec"
TAG_PATTERN: Final = re.compile(r"kvmsec(_[0-9a-f]{8})?")

# The bits that kvmsec sets in the connection mark of whatever an instance's uid sends: a packet
# that has lost its owner (what close() left queued) is known by them. These and the one below are
# all that it sets or compares; others keep theirs. They are ten bits at once, in the upper half,
# since container networks live in single low bits (kube-proxy 0x4000 and 0x8000, Cilium 0x0f00)
# or in short runs of the upper half (Tailscale 0xff0000, Calico from 0x10000 upwards): a foreign
# mark that holds all ten is a coincidence. They are the letters "kv" in ASCII.
MARK: Final = 0x6B760000
# One bit more: a connection that a SYN cookie began, until a packet of it has had an owner.
COOKIE_MARK: Final = 0x80000000

# LOG of iptables keeps 29 bytes and a zero, and cuts the rest without a word
# (linux/netfilter_ipv4/ipt_LOG.h: char prefix[30]).
PREFIX_LIMIT_BYTES: Final = 29
GROUP_LIMIT: Final = 65535
LOG_BURST: Final = 5
# The limit's unit in the kernel, and the most that iptables takes.
LOG_RATE_LIMIT: Final = 10_000

_LAST_UID: Final = 2**32 - 2


@frozen
class LogSettings:
    """How refused packets are logged.

    `prefix` opens each line: 1 to 29 printable ASCII characters, without those that quote or
    expand (quotes, backslash, dollar). `group` sends lines to that NFLOG group (0..65535)
    rather than to the kernel log. `per_minute` bounds the lines of one uid (of one range of uids
    under iptables, which has no match that counts by uid), so that an instance can't roll the
    kernel's log over. Raises PolicyError.
    """

    prefix: str = "kvmsec-drop: "
    group: int | None = None
    per_minute: int = 6

    def __attrs_post_init__(self) -> None:
        problems = [*_prefix_problems(self.prefix)]
        if self.group is not None and not 0 <= self.group <= GROUP_LIMIT:
            problems.append(f"the log group {self.group} is not in 0..{GROUP_LIMIT}")
        if not 1 <= self.per_minute <= LOG_RATE_LIMIT:
            problems.append(f"the log rate {self.per_minute} is not in 1..{LOG_RATE_LIMIT}")
        if problems:
            raise PolicyError(problems, hint="correct the log settings of the firewall")


def _prefix_problems(prefix: str) -> Iterable[str]:
    if not prefix.strip():
        yield "the log prefix is empty"
    if (size := len(prefix.encode(errors="replace"))) > PREFIX_LIMIT_BYTES:
        yield f"the log prefix has {size} bytes, the kernel keeps {PREFIX_LIMIT_BYTES}"
    if any(not " " <= letter <= "~" or letter in "\"'\\$" for letter in prefix):
        yield f"the log prefix {prefix!a} is not printable ASCII without quotes, \\ and $"


def _merge(pairs: Iterable[tuple[int, int]]) -> UidPairs:
    """Sorted, disjoint and never touching, as interval sets and short rule lists want them."""
    merged: list[tuple[int, int]] = []
    for first, last in sorted(pairs):
        if merged and first <= merged[-1][1] + 1:
            merged[-1] = (merged[-1][0], max(merged[-1][1], last))
        else:
            merged.append((first, last))
    return tuple(merged)


@frozen
class Policy:
    """The uids (inclusive pairs, in any order) that may send nothing over IPv4 or IPv6.

    `tag` names the nft table or the iptables chains: `kvmsec`, or `kvmsec_` and eight hex digits
    for another root on the same host. Raises PolicyError: uid 0 and 4294967295 are no instance's.
    """

    uids: UidPairs = field(converter=_merge)
    log: LogSettings = field(factory=LogSettings)
    tag: str = DEFAULT_TAG

    def __attrs_post_init__(self) -> None:
        problems = [
            f"{first}-{last} is not a range of uids in 1..{_LAST_UID}"
            for first, last in self.uids
            if not 1 <= first <= last <= _LAST_UID
        ]
        if not TAG_PATTERN.fullmatch(self.tag):
            problems.append(f"{self.tag!a} does not name a rule set of kvmsec")
        if problems:
            raise PolicyError(problems)

    def covers(self, uid: int) -> bool:
        """Whether the policy forbids this uid to send."""
        position = bisect_right(self.uids, (uid, _LAST_UID + 1)) - 1
        return position >= 0 and self.uids[position][0] <= uid <= self.uids[position][1]


def format_uids(uids: UidPairs) -> str:
    """The pairs as people write them: `1000-5000,8000`."""
    return ",".join(str(first) if first == last else f"{first}-{last}" for first, last in uids)
