"""Commands that would make QEMU start a program.

Under the seccomp filter that kvmsec sets (`spawn=deny`) a fork ends QEMU on the spot, and with it
the guest; without the filter it would be a program of the instance's on the node. So they are
refused before anything is sent.
"""

from collections.abc import Mapping
from typing import Any, Final

_MIGRATIONS: Final = ("migrate", "migrate-incoming")
_REASON: Final = "an exec: migration starts a program, which kills the guest in its sandbox"


def reason_against(command: str, arguments: Mapping[str, Any]) -> str | None:
    """Why a command must not be sent; None when it may."""
    if command in _MIGRATIONS and (
        _is_exec_uri(arguments.get("uri")) or _has_exec_channel(arguments.get("channels"))
    ):
        return _REASON
    if command == "human-monitor-command" and "exec:" in str(arguments.get("command-line")):
        return _REASON
    return None


def _is_exec_uri(uri: object) -> bool:
    return str(uri).partition(":")[0].strip().lower() == "exec"


def _has_exec_channel(channels: object) -> bool:
    """Whether one of QEMU 8.2's migration channels has the transport `exec`."""
    if not isinstance(channels, list | tuple):
        return False
    addresses = [c.get("addr") for c in channels if isinstance(c, Mapping)]
    return any(isinstance(a, Mapping) and a.get("transport") == "exec" for a in addresses)
