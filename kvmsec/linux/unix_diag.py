"""What the kernel knows of unix sockets and no system call tells: sock_diag(7).

Numbers and layouts are those of linux/sock_diag.h and linux/unix_diag.h.
"""

import os
import socket
import struct
from collections.abc import Iterator
from typing import Final

from kvmsec.linux import netlink

_NETLINK_SOCK_DIAG: Final = 4
_SOCK_DIAG_BY_FAMILY: Final = 20
_LISTENING: Final = 1 << 10  # the bit of TCP_LISTEN, which unix sockets use as well
_UDIAG_SHOW_ICONS: Final = 8
_UNIX_DIAG_ICONS: Final = 3
_REQUEST: Final = struct.Struct("=BBHIIIII")  # unix_diag_req
_ANSWER_BYTES: Final = 16  # unix_diag_msg
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
    request = _REQUEST.pack(socket.AF_UNIX, 0, 0, _LISTENING, 0, _UDIAG_SHOW_ICONS, 0, 0)
    for message in netlink.dump(
        _NETLINK_SOCK_DIAG, _SOCK_DIAG_BY_FAMILY, request, timeout_s=_TIMEOUT_S
    ):
        waiting = netlink.attributes(message[_ANSWER_BYTES:]).get(_UNIX_DIAG_ICONS, b"")
        yield struct.unpack(f"={len(waiting) // 4}I", waiting)
