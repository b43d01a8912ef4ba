"""Who may connect, before anything is read: counted by where a connection comes from; pure.

Behind an address may stand a hostile host, and behind many addresses a few of them. So an address
has a share that it can't exceed; and of all connections that have said nothing yet, as of all
handshakes that don't get on, the oldest gives way to a new one, unless it comes from where a member
of the cluster has come from before.
"""

import ipaddress
from collections import Counter
from typing import Final

from attrs import frozen

_MOST_KNOWN: Final = 4096
"""Addresses whose rate is remembered; the one that was seen least lately is forgotten."""


@frozen(kw_only=True)
class Limits:
    """What one server takes on at once; times in seconds, sizes in bytes.

    A connection costs some 280 KiB, of which asyncio's TLS takes 256 for its buffer
    (`asyncio.sslproto.SSLProtocol.max_size`): the connections and handshakes of the defaults are
    below 72 MiB together, of which a node at rest has next to nothing.
    """

    connections: int = 128
    """A master keeps a few to each node, and only candidates have something to ask."""
    connections_per_address: int = 16
    silent: int = 512
    """Accepted ones that have not sent a whole ClientHello: a few KiB each."""
    handshakes: int = 128
    """Unfinished ones; one that gets on takes a few round trips and milliseconds."""
    handshakes_per_s: float = 20.0
    """Per address: some 20 ms of this node's time."""
    handshakes_at_once: int = 40
    """Per address, before the rate holds: a master that comes back opens all it needs."""
    handshake_s: float = 5.0
    """For the first bytes, and again for the rest."""
    head_s: float = 10.0
    """From the end of the handshake to the end of the first request's head."""
    idle_s: float = 75.0
    """From the end of a request to the end of the next one's head; long polls take 60 at most."""
    body_s: float = 30.0
    line_bytes: int = 2048
    """The request's line and each field: ours are shorter than 100."""
    request_bytes: int = 1 << 20
    """As `kvmsec.rpc.wire` has it."""


@frozen
class _Tokens:
    left: float
    at: float


class Gate:
    """Counts the connections of each address, and says which new one may come in."""

    def __init__(self, limits: Limits) -> None:
        self._limits = limits
        self._open: Counter[str] = Counter()
        self._rates: dict[str, _Tokens] = {}

    def why_not(self, origin: str, now: float) -> str | None:
        """Why no connection from there may come in at the time `now` (monotonic); None: it may.

        One that may is counted until `leave`.
        """
        limits = self._limits
        if self._open[origin] >= limits.connections_per_address:
            return f"{limits.connections_per_address} connections from one address"
        if not self._take_token(origin, now):
            return f"{limits.handshakes_per_s:g} handshakes a second from one address"
        self._open[origin] += 1
        return None

    def leave(self, origin: str) -> None:
        """A connection from there has ended."""
        self._open[origin] -= 1
        if self._open[origin] <= 0:
            del self._open[origin]

    def _take_token(self, origin: str, now: float) -> bool:
        limits, known = self._limits, self._rates.pop(origin, None)
        left = float(limits.handshakes_at_once)
        if known is not None:
            left = min(left, known.left + (now - known.at) * limits.handshakes_per_s)
        has_one = left >= 1
        self._rates[origin] = _Tokens(left - has_one, now)  # The last in the order of dict.
        if len(self._rates) > _MOST_KNOWN:
            del self._rates[next(iter(self._rates))]
        return has_one


def origin_of(address: str) -> str:
    """What is counted as one address: of IPv6 the network, since a host has all of a /64."""
    found = ipaddress.ip_address(address.partition("%")[0])
    if isinstance(found, ipaddress.IPv4Address):
        return str(found)
    if found.ipv4_mapped is not None:
        return str(found.ipv4_mapped)
    return str(ipaddress.ip_network((found, 64), strict=False))
