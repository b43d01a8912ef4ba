"""Is the chain in the headers the chain of the definition? Decided on values alone.

QEMU is given every `backing` by the command line, so it never follows the name in a header. The
comparison keeps an image from being run over another base than the one it was made for, which
would silently corrupt it, and shows a header that its guest has tampered with.

The name is compared as text and never looked up: QEMU's process can write it, and a lookup by root
of a path of its choice could set off an automount, hang on a dead server, or tell what exists.
A name that leads to the right file through a symbolic link is therefore refused, like links
in the definition itself; `qemu-img rebase -u` writes the real one.
"""

import os
import shlex
from collections.abc import Sequence
from itertools import zip_longest
from pathlib import Path

from attrs import frozen

from hypervisor.foreign_text import escaped
from hypervisor.images.errors import BackingMismatch, HeaderRefused
from hypervisor.images.qcow2 import Qcow2Header
from hypervisor.machine import Disk, ImageFormat


@frozen
class ImageFile:
    """One file of a definition: an absolute path, how to read it, and whether it is only read.

    is_direct: opened for I/O past the node's page cache, as QEMU 10 finds a descriptor only if it
    was; earlier ones switch that on by themselves.
    The format is the definition's word and never probed: a raw disk is its guest's to fill, and
    one filled with a qcow2 header would otherwise name any file of the host.
    """

    path: Path
    format: ImageFormat = "raw"
    readonly: bool = False
    is_direct: bool = False


def chain_of(disk: Disk) -> tuple[ImageFile, ...]:
    """The files that a disk's definition names: its own, then what lies below it."""
    own = ImageFile(disk.path, disk.format, not disk.is_written, disk.is_direct)
    below = (ImageFile(one.path, one.format, True, disk.is_direct) for one in disk.backing)
    return (own, *below)


def check_chain(chain: Sequence[ImageFile], headers: Sequence[Qcow2Header | None]) -> None:
    """Hold each header (None: a raw image) against the definition's next element.

    Raises HeaderRefused or BackingMismatch, for the first image with something wrong.
    """
    for image, header, below in zip_longest(chain, headers, chain[1:]):
        if header is None:
            _check_raw(image, below)
            continue
        if header.refusals:
            raise HeaderRefused(image.path, "; it ".join(header.refusals))
        problem = _problem(image, header, below)
        if problem is not None:
            raise BackingMismatch(image.path, problem, hint=_hint(image, below))


def _check_raw(image: ImageFile, below: ImageFile | None) -> None:
    if below is not None:
        raise BackingMismatch(
            image.path,
            f"is raw and so has no backing file, but the definition gives it {_shown(below.path)}",
            hint='say format = "qcow2" for it, or take its backing files out',
        )


def _problem(image: ImageFile, header: Qcow2Header, below: ImageFile | None) -> str | None:
    name = header.backing_name
    if name is None:
        if below is None:
            return None
        return f"names no backing file, but the definition gives it {_shown(below.path)}"
    shown = escaped(name)
    if name.startswith(b"json:"):
        return f"describes its backing file as JSON ({shown}), which can open anything"
    if (protocol := _protocol(name)) is not None:
        return f"names a backing file behind the protocol {escaped(protocol)!r} ({shown})"
    if below is None:
        return f"names the backing file {shown}, but the definition gives it none"
    if not _is_named(image.path, name, below.path):
        return f"names the backing file {shown}, but the definition gives it {_shown(below.path)}"
    if header.backing_format not in (None, below.format):
        return f"says its backing file is {header.backing_format}, the definition {below.format}"
    return None


def _protocol(name: bytes) -> bytes | None:
    """What QEMU would take for a protocol: anything before a colon before the first slash."""
    head, colon, _ = name.partition(b"/")[0].partition(b":")
    return head if colon else None


def _is_named(image: Path, name: bytes, below: Path) -> bool:
    named = image.parent / os.fsdecode(name)
    return os.path.normpath(named) == os.path.normpath(below)


def _hint(image: ImageFile, below: ImageFile | None) -> str:
    if below is None:
        return "name the whole chain in the definition (backing = […]), if you trust its files"
    return (
        "if the definition is right, write it into the header: "
        + shlex.join(["qemu-img", "rebase", "-u", "-b", _shown(below.path), "-F", below.format])
        + f" {shlex.quote(_shown(image.path))}"
    )


def _shown(path: Path) -> str:
    return escaped(str(path), limit_chars=4096)
