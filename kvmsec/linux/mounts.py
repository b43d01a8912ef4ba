"""What is mounted where, for the caller and for another process (proc_pid_mountinfo(5))."""

import errno
import os
import re
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Final

from attrs import frozen

_MOUNTINFO: Final = "/proc/self/mountinfo"
_ESCAPE: Final = re.compile(rb"\\([0-7]{3})")
_ESCAPED: Final = re.compile(rb"[ \t\n\\]")  # By the kernel: fs/proc_namespace.c, mangle().


@frozen
class Mount:
    """One mount: `device` is its filesystem's number, `kind` what sort of filesystem that is.

    number: what the kernel calls the mount itself.
    """

    number: int
    device: str
    path: str
    options: frozenset[str]
    kind: str
    super_options: frozenset[str]


def read_mount_points(below: Collection[str]) -> frozenset[str]:
    """Where below some directories something is mounted. Raises OSError.

    A draw asks on its way, and each instance of the node has a mount: only lines that may be meant
    are taken apart.
    """
    return mount_points(Path(_MOUNTINFO).read_bytes(), below)


def mount_points(mountinfo: bytes, below: Collection[str]) -> frozenset[str]:
    """The same in the text of a mountinfo, where each line has the path as its fifth field."""
    places = b"|".join(re.escape(_encoded(place)) for place in below)
    if not places:
        return frozenset()
    meant = re.compile(rb"^(?:[^ \n]+ ){4}((?:%b)/[^ \n]*)" % places, re.MULTILINE)
    return frozenset(map(_decoded, meant.findall(mountinfo)))


def read_mounts() -> list[Mount]:
    """Every mount that the caller can see, in the kernel's order. Raises OSError."""
    return list(parse_mounts(Path(_MOUNTINFO).read_bytes()))


def read_mounts_of(pid: int) -> list[Mount]:
    """Every mount that a process can see, by its own paths, in the kernel's order.

    Raises ProcessLookupError and FileNotFoundError where it is gone, and OSError.
    """
    path = f"/proc/{pid}/mountinfo"
    try:
        return list(parse_mounts(Path(path).read_bytes()))
    except OSError as error:
        # One that has ended is in no mount namespace (mounts_open_common, fs/proc_namespace.c).
        if error.errno == errno.EINVAL:
            raise ProcessLookupError(errno.ESRCH, os.strerror(errno.ESRCH), path) from error
        raise


def parse_mounts(mountinfo: bytes) -> Iterator[Mount]:
    """The mounts in the text of a mountinfo; blanks and newlines in a path are octal there.

    A carriage return is not: `splitlines` would take it for the end of a line.
    """
    for line in filter(None, mountinfo.split(b"\n")):
        mount, _, filesystem = line.partition(b" - ")
        number, _, device, _, path, options = mount.split(b" ", 6)[:6]
        kind, _, super_options = filesystem.split(b" ", 2)
        yield Mount(
            int(number),
            os.fsdecode(device),
            _decoded(path),
            frozenset(os.fsdecode(options).split(",")),
            os.fsdecode(kind),
            frozenset(os.fsdecode(super_options).split(",")),
        )


def _decoded(path: bytes) -> str:
    if b"\\" in path:
        path = _ESCAPE.sub(lambda match: bytes([int(match[1], 8)]), path)
    return os.fsdecode(path)


def _encoded(path: str) -> bytes:
    return _ESCAPED.sub(lambda match: b"\\%03o" % match[0][0], os.fsencode(path))
