"""Connections to a port of this host, from as many addresses as there can be, that never get on.

usage: python -m tests.root.daemon.handshakes PORT COUNT (nothing|a hello)
"""

import contextlib
import resource
import socket
import ssl
import sys
import time
from typing import Final

_HELD: Final = 4000
"""What the server has ended long ago makes room."""
_AT_ONCE: Final = 50
_PAUSE_S: Final = 0.05


def main() -> None:
    port, count = int(sys.argv[1]), int(sys.argv[2])
    said = b"" if sys.argv[3] == "nothing" else _hello()
    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    held: list[socket.socket] = []
    for number in range(count):
        one = socket.socket()
        one.bind((f"127.{1 + number // 62_500}.{number // 250 % 250}.{1 + number % 250}", 0))
        one.setblocking(False)
        with contextlib.suppress(BlockingIOError):
            one.connect(("127.0.0.1", port))
        held.append(one)
        if number % _AT_ONCE == 0:
            time.sleep(_PAUSE_S)
            for earlier in held[-_AT_ONCE:]:
                with contextlib.suppress(OSError):
                    earlier.send(said)
        while len(held) > _HELD:
            held.pop(0).close()


def _hello() -> bytes:
    """What a client says first, all of it."""
    outgoing = ssl.MemoryBIO()
    client = ssl.create_default_context().wrap_bio(
        ssl.MemoryBIO(), outgoing, server_hostname="here"
    )
    with contextlib.suppress(ssl.SSLWantReadError):
        client.do_handshake()
    return outgoing.read()


if __name__ == "__main__":
    main()
