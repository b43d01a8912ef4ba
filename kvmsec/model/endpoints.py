"""Where a node's daemon is reached, as people write it: `HOST`, `HOST:PORT`, `[ADDRESS]:PORT`."""

import ipaddress
import re
from typing import Final

from attrs import frozen

from kvmsec.model.addresses import PORT

_BRACKETED: Final = re.compile(r"\[(?P<host>[^\[\]]+)\](?::(?P<port>[0-9]{1,5}))?", re.ASCII)
_PLAIN: Final = re.compile(r"(?P<host>[^\[\]:]+)(?::(?P<port>[0-9]{1,5}))?", re.ASCII)
_HOST: Final = re.compile(r"[A-Za-z0-9][A-Za-z0-9.-]{0,252}", re.ASCII)


@frozen
class Endpoint:
    """A host, by name or address, and a port."""

    host: str
    port: int = PORT

    def __str__(self) -> str:
        return f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}"


def parse_endpoint(text: str) -> Endpoint:
    """Raises ValueError that says what it must be."""
    found = _BRACKETED.fullmatch(text) or _PLAIN.fullmatch(text)
    host, port = (found["host"], found["port"]) if found else (text, None)
    number = PORT if port is None else int(port)
    if not 0 < number < 1 << 16:
        raise ValueError(f"{number} is no port: 1 to 65535")
    try:
        return Endpoint(str(ipaddress.ip_address(host)), number)
    except ValueError:
        if _HOST.fullmatch(host) is None:
            shown = ascii(text) if len(text) <= 60 else f"{text[:60]!a}…"
            raise ValueError(f"{shown} is no HOST, HOST:PORT or [ADDRESS]:PORT") from None
    return Endpoint(host, number)
