"""What the kernel knows of unix sockets and no system call tells: sock_diag(7).

Numbers and layouts are those of linux/sock_diag.h and linux/unix_diag.h.
"""

import os
import socket
import struct
from collections.abc import Iterator
from typing import Final

from kvmsec.linux import netlink
from kvmsec.linux.relay import RelayedSocket

_NETLINK_SOCK_DIAG: Final = 4
_SOCK_DIAG_BY_FAMILY: Final = 20
_LISTENING: Final = 1 << 10  # the bit of TCP_LISTEN, which unix sockets use as well
_UDIAG_SHOW_VFS: Final = 2
_UDIAG_SHOW_ICONS: Final = 8
_UNIX_DIAG_VFS: Final = 1
_UNIX_DIAG_ICONS: Final = 3
_REQUEST: Final = struct.Struct("=BBHIIIII")  # unix_diag_req
_ANSWER: Final = struct.Struct("=BBBxIII")  # unix_diag_msg: family, type, state, inode, cookie
_ANSWER_BYTES: Final = _ANSWER.size
_VFS: Final = struct.Struct("=II")  # unix_diag_vfs: inode, device
_MINOR_BITS: Final = 20  # linux/kdev_t.h
_TIMEOUT_S: Final = 1.0


def waits_for_accept(client: socket.socket) -> bool | None:
    """Whether a connected stream socket still waits for its listener to accept it.

    None when the kernel can't say (it was built without CONFIG_UNIX_DIAG), or when the listener
    lives in another network namespace.
    """
    relayed = client if isinstance(client, RelayedSocket) else None
    inode = relayed.far_inode if relayed else os.fstat(client.fileno()).st_ino
    try:
        return any(inode in inodes for inodes in _waiting_inodes())
    except OSError:
        return None


def _waiting_inodes() -> Iterator[tuple[int, ...]]:
    """For each listener of this network namespace, the sockets that wait for it."""
    for message in _listeners(_UDIAG_SHOW_ICONS):
        waiting = netlink.attributes(message[_ANSWER_BYTES:]).get(_UNIX_DIAG_ICONS, b"")
        yield struct.unpack(f"={len(waiting) // 4}I", waiting)


def listening_files() -> dict[int, tuple[int, int]]:
    """For each listener of this network namespace that was bound to a path: that file.

    Maps the socket's inode to the device (as in `st_dev`) and the inode of the file, whose number
    the kernel cuts to 32 bits. Raises OSError.
    """
    found = {}
    for message in _listeners(_UDIAG_SHOW_VFS):
        vfs = netlink.attributes(message[_ANSWER_BYTES:]).get(_UNIX_DIAG_VFS, b"")
        if len(vfs) >= _VFS.size:
            inode, device = _VFS.unpack_from(vfs)
            major, minor = device >> _MINOR_BITS, device & ((1 << _MINOR_BITS) - 1)
            found[_ANSWER.unpack_from(message)[3]] = (os.makedev(major, minor), inode)
    return found


def _listeners(show: int) -> Iterator[bytes]:
    request = _REQUEST.pack(socket.AF_UNIX, 0, 0, _LISTENING, 0, show, 0, 0)
    return netlink.dump(_NETLINK_SOCK_DIAG, _SOCK_DIAG_BY_FAMILY, request, timeout_s=_TIMEOUT_S)
