"""The uids that are leased, in one small file, so that a draw need not list thousands of leases.

It is a summary, never the truth: it counts only while the directory of the leases still has the
change time that it names. Whoever draws by it creates the lease exclusively, and lists the
directory before calling a pool exhausted, so that a wrong one costs time and nothing else.
"""

import contextlib
import errno
import os
import struct
from array import array
from pathlib import Path
from typing import Final

_LIMIT_BYTES: Final = 16 << 20
_READ: Final = os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC
_WRITE: Final = os.O_WRONLY | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC
_HEADER: Final = struct.Struct("=QQqI")  # The directory's device, inode and change time; uids.


class LeaseIndex:
    """The summary of one directory; hold the lock under which leases change."""

    def __init__(self, path: Path, directory: Path) -> None:
        self._path = path
        self._directory = directory

    def load(self) -> "array[int] | None":
        """The leased uids, sorted; None when the summary is missing, unfinished or out of date."""
        uids = array("I")
        try:
            with open(os.open(self._path, _READ), "rb", buffering=0) as file:
                if os.fstat(file.fileno()).st_size > _LIMIT_BYTES:
                    return None
                header = file.read(_HEADER.size)
                uids.frombytes(file.readall())  # ValueError for what are no whole numbers.
            return uids if header == self._header(uids) else None
        except (OSError, ValueError):
            return None

    def store(self, uids: "array[int]") -> None:
        """Write the summary of what is leased now; one that can't be written is dropped.

        Over the last one, for megabytes of new pages take longer than their content. The header
        comes last: a writer that is killed before leaves one that fits no directory.
        """
        try:
            descriptor = os.open(self._path, _WRITE, 0o600)
            try:
                _write(descriptor, bytes(_HEADER.size), 0)
                _write(descriptor, memoryview(uids).cast("B"), _HEADER.size)
                os.ftruncate(descriptor, _HEADER.size + len(uids) * uids.itemsize)
                _write(descriptor, self._header(uids), 0)
            finally:
                os.close(descriptor)
        except OSError:
            self.drop()

    def drop(self) -> None:
        with contextlib.suppress(OSError):
            self._path.unlink()

    def _header(self, uids: "array[int]") -> bytes:
        status = self._directory.stat()
        return _HEADER.pack(status.st_dev, status.st_ino, status.st_mtime_ns, len(uids))


def _write(descriptor: int, data: bytes | memoryview, place: int) -> None:
    if os.pwrite(descriptor, data, place) != len(data):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
