"""IPv6 of one interface: on a guest's tap the node has no business speaking it (ip-sysctl.rst)."""

import contextlib
import os
from pathlib import Path
from typing import Final

from attrs import frozen

_LINK_SCOPE: Final = 0x20  # IPV6_ADDR_LINKLOCAL, as /proc/net/if_inet6 shows it
_NO_ADDRESS: Final = 1  # IN6_ADDR_GEN_MODE_NONE


@frozen
class Ipv6:
    """Whether IPv6 is off on an interface, and how it makes its own addresses there."""

    is_disabled: bool
    address_mode: int


def _directory(interface: str) -> Path:
    return Path("/proc/sys/net/ipv6/conf", interface)


def read(interface: str) -> Ipv6 | None:
    """The settings of an interface; None where there is no IPv6 (none in the kernel, small MTU)."""
    directory = _directory(interface)
    try:
        disabled = int((directory / "disable_ipv6").read_text())
        return Ipv6(bool(disabled), int((directory / "addr_gen_mode").read_text()))
    except FileNotFoundError:
        return None


def write(interface: str, settings: Ipv6) -> None:
    """Set them; fine where there is no IPv6. Raises OSError."""
    directory = _directory(interface)
    with contextlib.suppress(FileNotFoundError):
        (directory / "addr_gen_mode").write_text(str(settings.address_mode))
        (directory / "disable_ipv6").write_text(str(int(settings.is_disabled)))


def turn_off(interface: str) -> None:
    """No address, no router solicitation, no neighbour discovery of the node's on it.

    Both switches: either alone is undone when somebody turns the other. Raises OSError.
    """
    write(interface, Ipv6(True, _NO_ADDRESS))


def own_addresses(interface: str) -> list[str]:
    """Addresses that somebody gave an interface: all but the link-local ones, in hexadecimal."""
    with contextlib.suppress(FileNotFoundError):
        # As bytes: an interface's name may hold whatever else ends a word or a line of text.
        lines = Path("/proc/net/if_inet6").read_bytes().splitlines()
        return [
            address.decode()
            for address, _, _, scope, _, name in map(bytes.split, lines)
            if name == os.fsencode(interface) and int(scope, 16) != _LINK_SCOPE
        ]
    return []
