"""The first bytes of a connection, before anything is made for it.

A TLS connection costs 256 KiB from its beginning on (`asyncio.sslproto`). One that has not sent a
whole ClientHello yet is left in the kernel, where it costs what has arrived of it.
"""

import asyncio
import socket
from typing import Final

_HEAD_BYTES: Final = 5
"""A record's type, version and length (RFC 8446 5.1)."""
_HANDSHAKE: Final = 22
_MOST_BYTES: Final = 8192
"""Of a ClientHello: with a post-quantum key share it has some 1,700 bytes."""


class NoHello(OSError):
    """What came first is no ClientHello, or its sender has gone."""


async def wait_for_hello(connected: socket.socket) -> None:
    """Return once a whole first record lies there to be read; nothing is read.

    Raises NoHello and OSError. The caller sets the deadline.
    """
    head = await _peek(connected, _HEAD_BYTES)
    length = int.from_bytes(head[3:5], "big")
    if head[0] != _HANDSHAKE or head[1] != 3 or not 0 < length <= _MOST_BYTES:
        raise NoHello("what came is no TLS")
    await _peek(connected, _HEAD_BYTES + length)
    connected.setsockopt(socket.SOL_SOCKET, socket.SO_RCVLOWAT, 1)


async def _peek(connected: socket.socket, wanted: int) -> bytes:
    """That many bytes, left where they are.

    The kernel says nothing before they are all there (socket(7), SO_RCVLOWAT), so that a peer that
    sends them one by one does not keep us busy.
    """
    connected.setsockopt(socket.SOL_SOCKET, socket.SO_RCVLOWAT, wanted)
    loop = asyncio.get_running_loop()
    is_there: asyncio.Future[None] = loop.create_future()

    def tell() -> None:
        if not is_there.done():
            is_there.set_result(None)

    loop.add_reader(connected, tell)
    try:
        await is_there
    finally:
        loop.remove_reader(connected)
    found = connected.recv(wanted, socket.MSG_PEEK)
    if len(found) < wanted:
        raise NoHello("it has gone before it said who it is")
    return found
