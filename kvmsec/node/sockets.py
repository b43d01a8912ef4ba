"""Unix sockets that QEMU listens on: bound by the launcher, so that QEMU needs no path."""

import os
import socket
from pathlib import Path


def listen(path: Path) -> socket.socket:
    """Bind a listening socket that only root can connect to, from the moment it is there.

    The path may be longer than the 108 bytes that a socket's address holds. Raises OSError.
    """
    directory = os.open(path.parent, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    before = os.umask(0o177)
    try:
        listener.bind(f"/proc/self/fd/{directory}/{path.name}")
        listener.listen(1)
    except BaseException as error:
        listener.close()
        if isinstance(error, OSError):  # bind(2) fails without naming the path
            raise OSError(error.errno, error.strerror, str(path)) from error
        raise
    finally:
        os.umask(before)
        os.close(directory)
    return listener


def connect(path: Path) -> socket.socket:
    """Connect to such a socket. Raises OSError."""
    directory = os.open(path.parent, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    client = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        client.connect(f"/proc/self/fd/{directory}/{path.name}")
    except BaseException:
        client.close()
        raise
    finally:
        os.close(directory)
    return client
