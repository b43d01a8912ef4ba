"""What the kernel knows of unix sockets and no system call tells: sock_diag(7).

Numbers and layouts are those of linux/sock_diag.h, linux/unix_diag.h and linux/netlink.h.
"""

import os
import socket
import struct
from collections.abc import Iterator
from typing import Final

_NETLINK_SOCK_DIAG: Final = 4
_SOCK_DIAG_BY_FAMILY: Final = 20
_NLM_F_REQUEST_DUMP: Final = 0x001 | 0x300
_NLMSG_ERROR: Final = 2
_NLMSG_DONE: Final = 3
_LISTENING: Final = 1 << 10  # the bit of TCP_LISTEN, which unix sockets use as well
_UDIAG_SHOW_ICONS: Final = 8
_UNIX_DIAG_ICONS: Final = 3
_HEADER: Final = struct.Struct("=IHHII")  # nlmsghdr: length, type, flags, sequence, port
_REQUEST: Final = struct.Struct("=BBHIIIII")  # unix_diag_req
_ANSWER_BYTES: Final = 16  # unix_diag_msg
_ATTRIBUTE: Final = struct.Struct("=HH")  # nlattr: length, type
_TIMEOUT_S: Final = 1.0


def waits_for_accept(client: socket.socket) -> bool | None:
    """Whether a connected stream socket still waits for its listener to accept it.

    None when the kernel can't say (it was built without CONFIG_UNIX_DIAG), or when the listener
    lives in another network namespace.
    """
    inode = os.fstat(client.fileno()).st_ino
    try:
        return any(inode in inodes for inodes in _waiting_inodes())
    except OSError:
        return None


def _waiting_inodes() -> Iterator[tuple[int, ...]]:
    """For each listener of this network namespace, the sockets that wait for it."""
    flags = socket.SOCK_RAW | socket.SOCK_CLOEXEC
    with socket.socket(socket.AF_NETLINK, flags, _NETLINK_SOCK_DIAG) as kernel:
        kernel.settimeout(_TIMEOUT_S)
        request = _REQUEST.pack(socket.AF_UNIX, 0, 0, _LISTENING, 0, _UDIAG_SHOW_ICONS, 0, 0)
        length = _HEADER.size + len(request)
        header = _HEADER.pack(length, _SOCK_DIAG_BY_FAMILY, _NLM_F_REQUEST_DUMP, 1, 0)
        kernel.send(header + request)
        while True:
            for kind, message in _messages(kernel.recv(1 << 16)):
                if kind == _NLMSG_DONE:
                    return
                if kind == _NLMSG_ERROR:
                    (number,) = struct.unpack_from("=i", message)
                    raise OSError(-number, os.strerror(-number))
                yield _inodes_in(message[_ANSWER_BYTES:])


def _messages(data: bytes) -> Iterator[tuple[int, bytes]]:
    offset = 0
    while offset + _HEADER.size <= len(data):
        length, kind, _, _, _ = _HEADER.unpack_from(data, offset)
        yield kind, data[offset + _HEADER.size : offset + length]
        offset += _aligned(max(length, _HEADER.size))


def _inodes_in(attributes: bytes) -> tuple[int, ...]:
    offset = 0
    while offset + _ATTRIBUTE.size <= len(attributes):
        length, kind = _ATTRIBUTE.unpack_from(attributes, offset)
        if kind == _UNIX_DIAG_ICONS:
            value = attributes[offset + _ATTRIBUTE.size : offset + length]
            return struct.unpack(f"={len(value) // 4}I", value)
        offset += _aligned(max(length, _ATTRIBUTE.size))
    return ()


def _aligned(length: int) -> int:
    return (length + 3) & ~3
