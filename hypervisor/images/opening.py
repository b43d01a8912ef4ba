"""Open the files of a machine's disks as root, and nothing but what the definition names.

A path is first opened as a mere reference (O_PATH: no link anywhere, no driver is asked, a FIFO
can't block), then looked at, then opened for reading through that reference, so that no swap in
between matters. The unprivileged child that reads headers gets these descriptors, which can't
write; the ones for QEMU are opened once all headers are found good.
"""

import errno
import fcntl
import os
import stat
import struct
from collections.abc import Iterable, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Final

from attrs import evolve, field, frozen

from hypervisor.images.backing import ImageFile, check_chain
from hypervisor.images.errors import ImageNotOpened, ImageUsedTwice, NotAnImage
from hypervisor.images.identity import ImageIdentity, Kind
from hypervisor.images.inspection import read_headers
from hypervisor.images.qcow2 import Qcow2Header, largest_file_bytes
from hypervisor.machine import ImageFormat
from kvmsec.linux.credentials import Credentials
from kvmsec.linux.files import open_without_links

INSPECTION_TIMEOUT_S: Final = 5.0

_BLKGETSIZE64: Final = 0x80081272  # _IOR(0x12, 114, size_t), linux/fs.h
_KINDS: Final = {
    stat.S_IFDIR: "a directory",
    stat.S_IFIFO: "a FIFO",
    stat.S_IFCHR: "a character device",
    stat.S_IFSOCK: "a socket",
}


@frozen
class OpenImage:
    """An image that was checked and opened; `fd` is the caller's to hand over and to close.

    Close it once QEMU has it: locks live in the open file description, and whoever keeps a copy
    keeps the image locked. `largest_bytes`: how large it may become as QEMU writes to it.
    """

    fd: int
    path: Path
    format: ImageFormat
    readonly: bool
    identity: ImageIdentity
    largest_bytes: int

    @property
    def kind(self) -> Kind:
        """`file` wants QEMU's driver `file`, `block` wants `host_device`."""
        return self.identity.kind

    def close(self) -> None:
        os.close(self.fd)


@frozen
class _Candidate:
    """An image that is open for reading only, its header not yet looked at."""

    image: ImageFile
    fd: int
    identity: ImageIdentity
    size_bytes: int = field(kw_only=True)


def open_chains(
    chains: Sequence[Sequence[ImageFile]],
    *,
    inspector: Credentials,
    timeout_s: float = INSPECTION_TIMEOUT_S,
) -> tuple[tuple[OpenImage, ...], ...]:
    """Open every disk of a machine: each its own file first, then its backing files in order.

    The first of a chain is opened as its definition says, those behind it only ever for reading.
    Headers of qcow2 images are read within `timeout_s` seconds by a child that becomes
    `inspector`, an unprivileged uid that owns nothing. Whether another instance uses a file
    is for the caller to decide from `identity`. Nothing stays open when this raises.

    Raises the children of ImageError: ImageNotOpened, NotAnImage, ImageUsedTwice, HeaderRefused,
    BackingMismatch, InspectionFailed.
    """
    with ExitStack() as reading:
        candidates = [
            [_reach(reading, _as_base(image) if place else image) for place, image in enumerate(c)]
            for c in chains
        ]
        _refuse_twice(candidates)
        return _open_checked(candidates, inspector, timeout_s)


def _open_checked(
    chains: Sequence[Sequence[_Candidate]], inspector: Credentials, timeout_s: float
) -> tuple[tuple[OpenImage, ...], ...]:
    qcow2 = [c for chain in chains for c in chain if c.image.format == "qcow2"]
    read = read_headers([(c.image.path, c.fd, c.size_bytes) for c in qcow2], inspector, timeout_s)
    headers = dict(zip((c.fd for c in qcow2), read, strict=True))
    for chain in chains:
        check_chain([c.image for c in chain], [headers.get(c.fd) for c in chain])
    with ExitStack() as undo:
        opened = []
        for chain in chains:
            images = []
            for candidate in chain:
                images.append(_open_for_qemu(candidate, headers.get(candidate.fd)))
                undo.callback(images[-1].close)
            opened.append(tuple(images))
        undo.pop_all()
        return tuple(opened)


def _as_base(image: ImageFile) -> ImageFile:
    return evolve(image, readonly=True)


def _reach(reading: ExitStack, image: ImageFile) -> _Candidate:
    path = image.path
    if not path.is_absolute() or "\0" in str(path):
        raise ImageNotOpened(path, errno.EINVAL, "is not an absolute path")
    try:
        reference = open_without_links(path, os.O_PATH)
    except OSError as error:
        raise _not_opened(path, error) from error
    try:
        status = os.fstat(reference)
        _require_image(path, status)
        fd = _open_reference(path, reference, os.O_RDONLY)
    finally:
        os.close(reference)
    reading.callback(os.close, fd)
    identity = ImageIdentity.of(status)
    size = _device_size(path, fd) if identity.kind == "block" else status.st_size
    return _Candidate(image, fd, identity, size_bytes=size)


def _open_for_qemu(candidate: _Candidate, header: Qcow2Header | None) -> OpenImage:
    image, largest_bytes = candidate.image, candidate.size_bytes
    mode = os.O_RDONLY if image.readonly else os.O_RDWR
    mode |= os.O_DIRECT if image.is_direct else 0
    if header is not None and not image.readonly:
        largest_bytes = largest_file_bytes(header, largest_bytes)
    return OpenImage(
        fd=_open_reference(image.path, candidate.fd, mode),
        path=image.path,
        format=image.format,
        readonly=image.readonly,
        identity=candidate.identity,
        largest_bytes=largest_bytes,
    )


def _open_reference(path: Path, reference: int, mode: int) -> int:
    """Open anew what `reference` stands for, as a file description that nobody else holds."""
    try:
        # Not to block: whoever owns the file may hold a lease on it (fcntl(2), F_SETLEASE).
        fd = os.open(f"/proc/self/fd/{reference}", mode | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError as error:
        raise _not_opened(path, error, mode) from error
    os.set_blocking(fd, True)
    return fd


def _require_image(path: Path, status: os.stat_result) -> None:
    kind = stat.S_IFMT(status.st_mode)
    if kind not in (stat.S_IFREG, stat.S_IFBLK):
        what = _KINDS.get(kind, "of an unknown kind")
        raise NotAnImage(
            path,
            f"is {what}, neither a regular file nor a block device",
            hint="name an image's file or a block device (`lsblk` shows them)",
        )


def _device_size(path: Path, fd: int) -> int:
    try:
        answer = fcntl.ioctl(fd, _BLKGETSIZE64, bytes(8))
    except OSError as error:
        raise _not_opened(path, error) from error
    return int(struct.unpack("=Q", answer)[0])


def _not_opened(path: Path, error: OSError, mode: int = 0) -> ImageNotOpened:
    number = error.errno or 0
    if number == errno.ELOOP:
        return ImageNotOpened(
            path,
            number,
            "has a symbolic link in its path",
            hint="name the real path (`realpath` shows it); links can be swapped by others",
        )
    if number == errno.EINVAL and mode & os.O_DIRECT:
        finding = "lies on a filesystem without direct I/O"
        return ImageNotOpened(path, number, finding, hint="say cache = writeback for the disk")
    hints = {
        errno.ENOENT: "make it (qemu-img create), or mend the definition",
        errno.ENXIO: "the device has no medium or no driver",
        errno.EROFS: "the filesystem is read-only; say readonly = true for the disk",
        errno.EWOULDBLOCK: "another process holds a lease on the file",
    }
    finding = f"can't be opened: {os.strerror(number)}"
    return ImageNotOpened(path, number, finding, hint=hints.get(number))


def _refuse_twice(chains: Iterable[Iterable[_Candidate]]) -> None:
    """Refuse a file that comes up twice, but for a base that several disks only read."""
    seen: dict[ImageIdentity, tuple[ImageFile, int]] = {}
    for number, chain in enumerate(chains):
        for candidate in chain:
            if candidate.identity not in seen:
                seen[candidate.identity] = (candidate.image, number)
                continue
            first, where = seen[candidate.identity]
            if where == number or not (first.readonly and candidate.image.readonly):
                raise ImageUsedTwice(candidate.image.path, first.path)
