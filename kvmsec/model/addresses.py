"""Where a node listens: an address of its own and a port."""

import ipaddress
import re
from typing import Final

from attrs import frozen

PORT: Final = 1811
"""Where a node's daemon listens unless told: as Ganeti's does, for which an admin may have rules in
a firewall."""

_BRACKETED: Final = re.compile(r"\[(?P<address>[^\[\]]+)\](?::(?P<port>[0-9]+))?")
_PLAIN: Final = re.compile(r"(?P<address>[0-9.]+)(?::(?P<port>[0-9]+))?")


@frozen
class Bind:
    """An address of this node and a port; an address of version 6 may name its interface (`%`)."""

    address: str
    port: int = PORT

    @property
    def is_v6(self) -> bool:
        return ":" in self.address

    def __str__(self) -> str:
        return f"[{self.address}]:{self.port}" if self.is_v6 else f"{self.address}:{self.port}"


def parse_bind(text: str) -> Bind:
    """`192.0.2.1`, `192.0.2.1:1811`, `2001:db8::1` or `[2001:db8::1]:1811`.

    No host name: what a name service says must not decide where a daemon of root's listens.
    Raises ValueError.
    """
    found = _BRACKETED.fullmatch(text) or _PLAIN.fullmatch(text)
    address, port = (found["address"], found["port"]) if found else (text, None)
    try:
        parsed = ipaddress.ip_address(address)
    except ValueError:
        raise ValueError(f"must be ADDRESS or ADDRESS:PORT, not {_shown(text)}") from None
    number = PORT if port is None else int(port[:6])
    if not 0 < number < 1 << 16:
        raise ValueError("the port must be between 1 and 65535")
    return Bind(str(parsed), number)


def _shown(text: str) -> str:
    return ascii(text) if len(text) <= 60 else f"{text[:60]!a}..."
