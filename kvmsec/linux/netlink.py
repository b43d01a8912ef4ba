"""Dumps over netlink (netlink(7)): one question, and every message of the kernel's answer."""

import errno
import os
import socket
import struct
from collections.abc import Iterator
from typing import Final

_BUFFER_BYTES: Final = 1 << 18

# linux/netlink.h
_REQUEST_DUMP: Final = 0x001 | 0x300
_DUMP_INTERRUPTED: Final = 0x10
_ERROR: Final = 2
_DONE: Final = 3
_TYPE_MASK: Final = 0x3FFF
_HEADER: Final = struct.Struct("=IHHII")  # nlmsghdr: length, type, flags, sequence, port
_ATTRIBUTE: Final = struct.Struct("=HH")  # nlattr: length, type
_ERROR_NUMBER: Final = struct.Struct("=i")


class DumpInterrupted(OSError):
    """What is dumped changed meanwhile: ask again."""

    def __init__(self) -> None:
        super().__init__(errno.EINTR, "what was asked for changed meanwhile")


def dump(protocol: int, kind: int, request: bytes, *, timeout_s: float) -> Iterator[bytes]:
    """Send a request of a message type, and yield what comes behind each answer's header.

    The socket belongs to the caller's network namespace. Raises OSError, DumpInterrupted among it;
    TimeoutError when the kernel says nothing for `timeout_s` seconds.
    """
    flags = socket.SOCK_RAW | socket.SOCK_CLOEXEC
    with socket.socket(socket.AF_NETLINK, flags, protocol) as kernel:
        kernel.settimeout(timeout_s)
        kernel.send(_HEADER.pack(_HEADER.size + len(request), kind, _REQUEST_DUMP, 1, 0) + request)
        while True:
            for answer, message in _messages(kernel.recv(_BUFFER_BYTES)):
                if answer == _DONE:
                    return
                yield message


def _messages(data: bytes) -> Iterator[tuple[int, bytes]]:
    start = 0
    while start + _HEADER.size <= len(data):
        length, kind, flags, _, _ = _HEADER.unpack_from(data, start)
        message = data[start + _HEADER.size : start + length]
        if flags & _DUMP_INTERRUPTED:
            raise DumpInterrupted
        if kind == _ERROR:
            number = -_ERROR_NUMBER.unpack_from(message)[0]
            raise OSError(number, os.strerror(number))
        yield kind, message
        start += max(_aligned(length), _HEADER.size)


def attributes(data: bytes) -> dict[int, bytes]:
    """The attributes in the rest of a message, by type."""
    found = {}
    start = 0
    while start + _ATTRIBUTE.size <= len(data):
        length, kind = _ATTRIBUTE.unpack_from(data, start)
        found[kind & _TYPE_MASK] = data[start + _ATTRIBUTE.size : start + length]
        start += max(_aligned(length), _ATTRIBUTE.size)
    return found


def _aligned(length: int) -> int:
    return (length + 3) & ~3
