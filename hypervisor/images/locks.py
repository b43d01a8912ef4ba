"""QEMU's locks of an image, taken for it: by its conventions, before it has the file.

Other programs (qemu-img, another QEMU) know by them that an image is in use. QEMU itself gets no
lock at all under `hypervisor.seccomp`: the kernel keeps locks in memory that it charges to nobody,
as many as there are bytes in a file, so that one instance could take all of the node's. They live
in the open file description, and go with its last descriptor (fcntl(2), open file description
locks).
"""

import errno
import fcntl
import os
import struct
from typing import Final

from hypervisor.images.errors import ImageLocked, ImageNotOpened
from hypervisor.images.opening import OpenImage

# QEMU's block/file-posix.c: a byte for each permission (block/block-common.h, BLK_PERM_*) that is
# used, and one for each that nobody else may use.
_USED: Final = 100
_REFUSED: Final = 200
_READ, _WRITE, _RESIZE = 0, 1, 3
_FLOCK: Final = struct.Struct("@hhqqi4x")  # fcntl(2), struct flock
_DENIED: Final = (errno.EAGAIN, errno.EACCES)


def lock(image: OpenImage) -> None:
    """Lock an image as a QEMU would that has it for itself, or reads it as others do.

    Raises ImageLocked while another program uses it otherwise, and ImageNotOpened where its
    filesystem has no locks.
    """
    used = (_READ,) if image.readonly else (_READ, _WRITE, _RESIZE)
    refused = (_WRITE, _RESIZE)
    try:
        # As QEMU does it: first one's own, then the look at others', so that one of two sees it.
        for byte in (*(_USED + one for one in used), *(_REFUSED + one for one in refused)):
            _ask(image.fd, fcntl.F_OFD_SETLK, fcntl.F_RDLCK, byte)
        for byte in (*(_REFUSED + one for one in used), *(_USED + one for one in refused)):
            if _ask(image.fd, fcntl.F_OFD_GETLK, fcntl.F_WRLCK, byte) != fcntl.F_UNLCK:
                raise ImageLocked(image.path)
    except OSError as error:
        if error.errno in _DENIED:
            raise ImageLocked(image.path) from error
        what = f"can't be locked: {error.strerror}"
        raise ImageNotOpened(image.path, error.errno or 0, what) from error


def _ask(descriptor: int, command: int, kind: int, byte: int) -> int:
    """Set or test the lock of one byte; the kind of lock that is in the way, where it is a test."""
    asked = _FLOCK.pack(kind, os.SEEK_SET, byte, 1, 0)
    found: int = _FLOCK.unpack(fcntl.fcntl(descriptor, command, asked))[0]
    return found
