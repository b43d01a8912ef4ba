"""Descriptors that come over a Unix socket, close-on-exec.

`socket.recv_fds` takes flags for that, and in Python 3.11 it drops them.
"""

import array
import socket


def receive(
    line: socket.socket, limit_bytes: int, most: int, *, flags: int = 0
) -> tuple[bytes, list[int]]:
    """One message and its descriptors, at most so many; none where they have no numbers any more.

    flags: of recvmsg(2), besides MSG_CMSG_CLOEXEC. Raises OSError.
    """
    numbers = array.array("i")
    said, ancillary, _, _ = line.recvmsg(
        limit_bytes, socket.CMSG_LEN(most * numbers.itemsize), flags | socket.MSG_CMSG_CLOEXEC
    )
    for level, kind, data in ancillary:
        if (level, kind) == (socket.SOL_SOCKET, socket.SCM_RIGHTS):
            numbers.frombytes(data[: len(data) - len(data) % numbers.itemsize])
    return said, numbers.tolist()
