"""Which file an image is, whatever path it was opened by."""

import os
import re
import stat
from typing import Final, Literal, Self

from attrs import frozen

Kind = Literal["file", "block"]

_TEXT: Final = re.compile(
    r"file ([0-9]{1,10}):([0-9]{1,10}) ([0-9]{1,20})|block ([0-9]{1,10}):([0-9]{1,10})", re.ASCII
)


@frozen
class ImageIdentity:
    """A regular file by device and inode, or a block device by its number.

    `str()` is made for records and `parse` reads it back. Device numbers hold until the next boot
    only, so a record must carry the boot id beside it.
    """

    kind: Kind
    device: int
    inode: int = 0

    @classmethod
    def of(cls, status: os.stat_result) -> Self:
        """The identity of what was opened; ValueError when it is neither file nor block device."""
        if stat.S_ISREG(status.st_mode):
            return cls("file", status.st_dev, status.st_ino)
        if stat.S_ISBLK(status.st_mode):
            return cls("block", status.st_rdev)
        raise ValueError("neither a regular file nor a block device")

    @classmethod
    def parse(cls, text: str) -> Self:
        """Read what `str()` wrote; raises ValueError."""
        matched = _TEXT.fullmatch(text)
        if matched is None:
            raise ValueError(f"{text!r} is not the identity of an image")
        major, minor, inode, block_major, block_minor = matched.groups()
        if block_major is not None:
            return cls("block", _device(block_major, block_minor))
        return cls("file", _device(major, minor), int(inode))

    def __str__(self) -> str:
        device = f"{os.major(self.device)}:{os.minor(self.device)}"
        return f"file {device} {self.inode}" if self.kind == "file" else f"block {device}"


def _device(major: str, minor: str) -> int:
    try:
        return os.makedev(int(major), int(minor))
    except OverflowError as error:
        raise ValueError(f"no device has the number {major}:{minor}") from error
