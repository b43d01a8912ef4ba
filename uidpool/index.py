"""The uids that are leased, in one small file, so that a draw need not list thousands of leases.

It is a summary, never the truth: it counts only while the directory of the leases still has the
change time that it names. Whoever draws by it creates the lease exclusively, and lists the
directory before calling a pool exhausted, so that a wrong one costs time and nothing else.
"""

import contextlib
import os
import struct
import zlib
from array import array
from pathlib import Path
from typing import Final

from kvmsec.linux.files import read_bounded

_LIMIT_BYTES: Final = 16 << 20
_HEADER: Final = struct.Struct("=QQqI")  # device, inode and change time of the directory; checksum


class LeaseIndex:
    """The summary of one directory; hold the lock under which leases change."""

    def __init__(self, path: Path, directory: Path) -> None:
        self._path = path
        self._directory = directory

    def load(self) -> "array[int] | None":
        """The leased uids, sorted; None when the summary is missing, broken or out of date."""
        try:
            data = read_bounded(self._path, _LIMIT_BYTES)
        except (OSError, ValueError):
            return None
        body = data[_HEADER.size :]
        uids = array("I")
        if len(data) < _HEADER.size or len(body) % uids.itemsize:
            return None
        if data[: _HEADER.size] != self._header(body):
            return None
        uids.frombytes(body)
        return uids

    def store(self, uids: "array[int]") -> None:
        """Write the summary of what is leased now; one that can't be written is dropped."""
        body = uids.tobytes()
        flags = os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_NOFOLLOW | os.O_CLOEXEC
        try:
            descriptor = os.open(self._path, flags, 0o600)
            try:
                os.write(descriptor, self._header(body) + body)
            finally:
                os.close(descriptor)
        except OSError:
            self.drop()

    def drop(self) -> None:
        with contextlib.suppress(OSError):
            self._path.unlink()

    def _header(self, body: bytes) -> bytes:
        status = self._directory.stat()
        return _HEADER.pack(status.st_dev, status.st_ino, status.st_mtime_ns, zlib.crc32(body))
