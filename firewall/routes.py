"""An address beyond this host that a packet would really be routed to, found without sending."""

import contextlib
import ipaddress
import os
import socket
from binascii import unhexlify
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Final

from attrs import frozen

from firewall.policy import FAMILIES, Family

# RFC 863, discard: whoever did receive an empty datagram there would throw it away.
DISCARD_PORT: Final = 9

# Prefixes that no host on the Internet has (RFC 5737, RFC 3849, RFC 9637). A lab may still use
# them, this host's own network included, so that each is asked for like any other.
_DOCUMENTATION: Final[dict[Family, tuple[str, ...]]] = {
    "ipv4": ("192.0.2.1", "198.51.100.1", "203.0.113.1"),
    "ipv6": ("2001:db8::1", "3fff::1"),
}
_KINDS: Final[dict[Family, socket.AddressFamily]] = {
    "ipv4": socket.AF_INET,
    "ipv6": socket.AF_INET6,
}
_IPV4_ROUTES: Final = Path("/proc/thread-self/net/route")
_IPV6_ROUTES: Final = Path("/proc/thread-self/net/ipv6_route")
_ROUTES_READ: Final = 1 << 18

# linux/route.h, linux/ipv6_route.h
_RTF_UP: Final = 0x0001
_RTF_REJECT: Final = 0x0200
_RTF_ANYCAST: Final = 0x00100000
_RTF_LOCAL: Final = 0x80000000


@frozen
class Target:
    """An address and, for a link-local one, the index of its interface (else 0)."""

    family: Family
    address: str
    scope: int = 0

    @property
    def socket_family(self) -> socket.AddressFamily:
        return _KINDS[self.family]

    @property
    def socket_address(self) -> tuple[str, int] | tuple[str, int, int, int]:
        if self.family == "ipv4":
            return (self.address, DISCARD_PORT)
        return (self.address, DISCARD_PORT, 0, self.scope)


LOOPBACK: Final = (Target("ipv4", "127.0.0.1"), Target("ipv6", "::1"))


def candidates_beyond() -> tuple[Target, ...]:
    """Addresses that may be beyond this host, of both families, the ones to be preferred first.

    A documentation address serves where a default route takes it; else an address inside a
    network that an interface of the caller's namespace is connected to, link-local ones included.
    """
    return tuple(
        target
        for family in FAMILIES
        for target in (
            *(Target(family, address) for address in _DOCUMENTATION[family]),
            *_connected(family),
        )
    )


def find_routed_target(family: Family, candidates: Iterable[Target]) -> Target | None:
    """The first of the family that is not this host's and that the caller has a route to.

    Looks at the caller's network namespace with the caller's uid, which routing rules may ask for.
    """
    for target in candidates:
        if target.family == family and _is_routed(target):
            return target
    return None


def _is_routed(target: Target) -> bool:
    """Whether the kernel would send to the target over an interface (connect(2) only asks)."""
    try:
        with socket.socket(target.socket_family, socket.SOCK_DGRAM) as probe:
            probe.connect(target.socket_address)
            source = probe.getsockname()[0].partition("%")[0]
    except OSError:
        return False
    # To an address of its own a host speaks from that address, over loopback.
    return source != target.address and not ipaddress.ip_address(source).is_loopback


def _connected(family: Family) -> Iterator[Target]:
    with contextlib.suppress(FileNotFoundError):
        if family == "ipv4":
            yield from ipv4_neighbours(_read(_IPV4_ROUTES))
        else:
            yield from ipv6_neighbours(_read(_IPV6_ROUTES))


def _read(path: Path) -> list[bytes]:
    """The lines as bytes: an interface's name may hold whatever else ends a word of text."""
    with path.open("rb") as file:
        return file.read(_ROUTES_READ).splitlines()


def ipv4_neighbours(lines: Iterable[bytes]) -> Iterator[Target]:
    """Two addresses inside each network of /proc/net/route (one of them may be the host's)."""
    for line in list(lines)[1:]:
        fields = line.split()
        if len(fields) < 8 or not int(fields[3], 16) & _RTF_UP or int(fields[3], 16) & _RTF_REJECT:
            continue
        # Hexadecimal, in the byte order of the machine.
        first = int.from_bytes(unhexlify(fields[1])[::-1], "big")
        mask = int.from_bytes(unhexlify(fields[7])[::-1], "big")
        size = (mask ^ 0xFFFFFFFF) + 1
        offsets = (0,) if size == 1 else (0, 1) if size == 2 else (1, 2)
        if mask:
            for offset in offsets:
                yield Target("ipv4", str(ipaddress.IPv4Address(first + offset)))


def ipv6_neighbours(lines: Iterable[bytes]) -> Iterator[Target]:
    """Two addresses inside each unicast network of /proc/net/ipv6_route."""
    for line in lines:
        fields = line.split()
        if len(fields) < 10 or fields[9] == b"lo":
            continue
        flags, length = int(fields[8], 16), int(fields[1], 16)
        network = ipaddress.IPv6Address(unhexlify(fields[0]))
        if not flags & _RTF_UP or flags & (_RTF_REJECT | _RTF_LOCAL | _RTF_ANYCAST):
            continue
        if network.is_multicast or length == 0:
            continue
        scope = _interface_index(os.fsdecode(fields[9])) if network.is_link_local else 0
        for offset in (0,) if length == 128 else (1, 2):
            yield Target("ipv6", str(network + offset), scope)


def _interface_index(name: str) -> int:
    try:
        return socket.if_nametoindex(name)
    except OSError:
        return 0
