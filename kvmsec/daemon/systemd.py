"""Readiness and sockets, as systemd hands them to a service (sd_notify(3), sd_listen_fds(3))."""

import contextlib
import os
import socket
import time
from collections.abc import MutableMapping
from typing import Final

from kvmsec.errors import KvmsecError

_FIRST: Final = 3  # SD_LISTEN_FDS_START
_MOST: Final = 64
_VARIABLES: Final = ("LISTEN_PID", "LISTEN_FDS", "LISTEN_FDNAMES")


class BadSockets(KvmsecError):
    """What was handed over as listening sockets can't be served."""

    def __init__(self, problem: str) -> None:
        super().__init__(
            f"the sockets that this daemon was started with can't be used: {problem}",
            hint="mend the socket unit: ListenStream= with addresses and ports, Accept=no",
        )


def notify(state: str, environment: MutableMapping[str, str] | None = None) -> None:
    """Tell whoever supervises this process, where somebody does: `READY=1`, `STOPPING=1`, ….

    Nobody listening is no error.
    """
    path = (os.environ if environment is None else environment).get("NOTIFY_SOCKET", "")
    if not path.startswith(("/", "@")):
        return
    address = f"\0{path[1:]}" if path.startswith("@") else path
    with contextlib.suppress(OSError), socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as told:
        told.setblocking(False)
        told.sendto(state.encode(), address)


def notify_reloading() -> None:
    """`Type=notify-reload` wants to know since when (systemd.service(5))."""
    notify(f"RELOADING=1\nMONOTONIC_USEC={time.monotonic_ns() // 1000}")


def take_sockets(environment: MutableMapping[str, str] | None = None) -> list[socket.socket]:
    """The listening sockets that this process was started with; none where it wasn't.

    The variables are removed, so that no child takes the sockets for its own. Raises BadSockets.
    """
    environment = os.environ if environment is None else environment
    pid, count, _ = (environment.pop(name, "") for name in _VARIABLES)
    if pid != str(os.getpid()):
        return []
    if not count.isdigit() or not 0 < int(count) <= _MOST:
        raise BadSockets(f"LISTEN_FDS is {count[:20]!a}")
    return [_listening(_FIRST + index) for index in range(int(count))]


def _listening(descriptor: int) -> socket.socket:
    try:
        one = socket.socket(fileno=os.dup(descriptor))
        os.close(descriptor)
    except OSError as error:
        raise BadSockets(f"descriptor {descriptor}: {error.strerror}") from error
    one.set_inheritable(False)
    is_stream = one.type & socket.SOCK_STREAM == socket.SOCK_STREAM
    is_listening = one.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN)
    if one.family not in (socket.AF_INET, socket.AF_INET6) or not is_stream or not is_listening:
        one.close()
        raise BadSockets(f"descriptor {descriptor} is no TCP socket that listens")
    return one
