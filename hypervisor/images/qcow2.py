"""The header of a qcow2 image, read with bounded effort from bytes that a guest may have written.

Layout and rules are those of QEMU's docs/interop/qcow2.txt; the limits on tables are those that
QEMU's own driver enforces. Nothing here opens a file: bytes come from a function.
"""

import struct
from collections.abc import Callable, Iterator
from typing import Final

from attrs import define, field, frozen

from hypervisor.foreign_text import escaped

ReadAt = Callable[[int, int], bytes]
"""Given an offset and a length: the bytes there, fewer at the end of the image."""

READ_LIMIT_BYTES: Final = 16 * 1024
"""No header makes `parse` read more than this; one that qemu-img writes has about 600 bytes."""

_MAGIC: Final = b"QFI\xfb"
_BASE: Final = struct.Struct(">4sIQIIQIIQQIIQ")
_VERSION_3: Final = struct.Struct(">QQQII")
_EXTENSION: Final = struct.Struct(">II")
_V2_HEADER_BYTES: Final = 72
_V3_HEADER_BYTES: Final = 104
_MAX_HEADER_BYTES: Final = 4096
_MAX_BACKING_NAME_BYTES: Final = 1023
_MAX_BACKING_FORMAT_BYTES: Final = 15
_MAX_EXTENSIONS: Final = 32
_MAX_VIRTUAL_SIZE_BYTES: Final = 2**63 - 2**30

_MAX_L1_BYTES: Final = 32 << 20
_MAX_REFCOUNT_TABLE_BYTES: Final = 8 << 20
_MAX_SNAPSHOTS: Final = 65536
_SNAPSHOT_ENTRY_BYTES: Final = 40

_DIRTY, _CORRUPT, _EXTERNAL_DATA, _COMPRESSION, _EXTENDED_L2 = (1 << bit for bit in range(5))
_KNOWN_FEATURES: Final = _DIRTY | _CORRUPT | _EXTERNAL_DATA | _COMPRESSION | _EXTENDED_L2
_ENCRYPTIONS: Final = {1: "AES", 2: "LUKS"}
_COMPRESSIONS: Final = (0, 1)  # zlib, zstd

_END: Final = 0
_BACKING_FORMAT: Final = 0xE2792ACA
_ENCRYPTION_HEADER: Final = 0x0537BE77
_EXTERNAL_DATA_NAME: Final = 0x44415441


class Malformed(ValueError):
    """The bytes are no header that QEMU could use; the text says what was found."""


@frozen
class Qcow2Header:
    """What a header says, as far as it decides whether and how QEMU may open the image.

    `refusals` holds what is well formed but not allowed here, every finding of it.
    `virtual_bytes` is the size of the disk that the guest sees.
    """

    backing_name: bytes | None
    backing_format: str | None
    refusals: tuple[str, ...]
    virtual_bytes: int
    cluster_bytes: int


@define
class _Source:
    """The image's bytes, handed out until the limit."""

    read_at: ReadAt
    size_bytes: int
    left_bytes: int = field(default=READ_LIMIT_BYTES, init=False)

    def take(self, offset: int, length: int, what: str) -> bytes:
        if length > self.left_bytes:
            raise Malformed(f"has a header of more than {READ_LIMIT_BYTES} bytes")
        self.left_bytes -= length
        data = self.read_at(offset, length) if offset + length <= self.size_bytes else b""
        if len(data) != length:
            raise Malformed(f"is cut short in {what} ({self.size_bytes} bytes in all)")
        return data


@frozen
class _Fields:
    """The fixed fields, in the order of the file; version 2 has the defaults for the last five."""

    magic: bytes
    version: int
    backing_offset: int
    backing_bytes: int
    cluster_bits: int
    virtual_size_bytes: int
    encryption: int
    l1_entries: int
    l1_offset: int
    refcount_offset: int
    refcount_clusters: int
    snapshots: int
    snapshots_offset: int
    incompatible: int = 0
    compatible: int = 0
    autoclear: int = 0
    refcount_order: int = 4
    header_bytes: int = _V2_HEADER_BYTES

    @property
    def cluster_size_bytes(self) -> int:
        return 1 << self.cluster_bits


def parse(read_at: ReadAt, size_bytes: int) -> Qcow2Header:
    """Read and check the header of an image whose file or device has `size_bytes`.

    Raises Malformed, and nothing else but what `read_at` raises. Calls `read_at` a few dozen times
    for READ_LIMIT_BYTES in all at most.
    """
    source = _Source(read_at, size_bytes)
    fields = _read_fields(source)
    _check_geometry(fields)
    compression = _read_compression(source, fields)
    _check_tables(fields, size_bytes)
    extensions = dict(_extensions(source, fields))
    return Qcow2Header(
        backing_name=_read_backing_name(source, fields),
        backing_format=_backing_format(extensions.get(_BACKING_FORMAT)),
        refusals=tuple(_refusals(fields, compression, extensions)),
        virtual_bytes=fields.virtual_size_bytes,
        cluster_bytes=fields.cluster_size_bytes,
    )


def largest_file_bytes(header: Qcow2Header, file_bytes: int) -> int:
    """How large an image's file may still become, without the guest's disk becoming larger.

    At worst all of the disk is written to clusters that are new at the end of the file: 16 bytes
    of L2 table (extended entries) and 8 of reference counts (64 bits) for each cluster, and as
    much again since tables are copied when they grow. 64 MiB are more than the tables above them
    can have (32 and 8 MiB), and what rounding costs.
    """
    clusters = -(-(file_bytes + header.virtual_bytes) // header.cluster_bytes)
    return file_bytes + header.virtual_bytes + 2 * (16 + 8) * clusters + (64 << 20)


def _read_fields(source: _Source) -> _Fields:
    base = _BASE.unpack(source.take(0, _BASE.size, "its header"))
    magic, version = base[:2]
    if magic != _MAGIC:
        raise Malformed("is not a qcow2 image (its first bytes are others)")
    if version == 2:
        return _Fields(*base)
    if version != 3:
        raise Malformed(f"has qcow2 version {version}; QEMU knows 2 and 3")
    fields = _Fields(
        *base, *_VERSION_3.unpack(source.take(_BASE.size, _VERSION_3.size, "its header"))
    )
    if not _V3_HEADER_BYTES <= fields.header_bytes <= _MAX_HEADER_BYTES or fields.header_bytes % 8:
        raise Malformed(f"gives its header's length as {fields.header_bytes}")
    return fields


def _check_geometry(fields: _Fields) -> None:
    if not 9 <= fields.cluster_bits <= 21:
        raise Malformed(f"has clusters of 2^{fields.cluster_bits} bytes; 2^9 to 2^21 are possible")
    if fields.header_bytes > fields.cluster_size_bytes:
        raise Malformed("has a header that is longer than its first cluster")
    if fields.incompatible & _EXTENDED_L2 and fields.cluster_bits < 14:
        raise Malformed("has extended L2 entries in clusters of less than 16 KiB")
    if fields.refcount_order > 6:
        raise Malformed(f"has reference counts of 2^{fields.refcount_order} bits; 64 is the most")
    if fields.virtual_size_bytes > _MAX_VIRTUAL_SIZE_BYTES:
        raise Malformed(f"claims a size of {fields.virtual_size_bytes} bytes")


def _read_compression(source: _Source, fields: _Fields) -> int:
    if fields.header_bytes <= _V3_HEADER_BYTES:
        return 0
    return source.take(_V3_HEADER_BYTES, 1, "its header")[0]


def _check_tables(fields: _Fields, size_bytes: int) -> None:
    cluster = fields.cluster_size_bytes
    # QEMU takes what lies behind the end of the file, within the last cluster, as zeros.
    end = -(-size_bytes // cluster) * cluster
    tables = (
        ("L1 table", fields.l1_offset, 8 * fields.l1_entries, _MAX_L1_BYTES),
        (
            "reference count table",
            fields.refcount_offset,
            cluster * fields.refcount_clusters,
            _MAX_REFCOUNT_TABLE_BYTES,
        ),
        (
            "snapshot table",
            fields.snapshots_offset,
            _SNAPSHOT_ENTRY_BYTES * fields.snapshots,
            _SNAPSHOT_ENTRY_BYTES * _MAX_SNAPSHOTS,
        ),
    )
    for name, offset, length, limit in tables:
        if length > limit:
            raise Malformed(f"has a {name} of {length} bytes; {limit} is the most")
        if length and (offset < cluster or offset % cluster):
            raise Malformed(f"has its {name} at {offset}, where no table can be")
        if length and offset + length > end:
            raise Malformed(f"has its {name} behind the end of the file (at {offset} of {end})")
    if not fields.refcount_clusters:
        raise Malformed("has no reference count table")
    _check_l1_covers(fields)


def _check_l1_covers(fields: _Fields) -> None:
    entry_bits = 4 if fields.incompatible & _EXTENDED_L2 else 3
    covered_by_one = 1 << (2 * fields.cluster_bits - entry_bits)
    if fields.l1_entries * covered_by_one < fields.virtual_size_bytes:
        raise Malformed(
            f"has an L1 table of {fields.l1_entries} entries, too few for its size of "
            f"{fields.virtual_size_bytes} bytes"
        )


def _extensions(source: _Source, fields: _Fields) -> Iterator[tuple[int, bytes]]:
    """Yield the kind of each header extension, with the content of those that matter here."""
    offset = fields.header_bytes
    end = fields.backing_offset or fields.cluster_size_bytes
    for _ in range(_MAX_EXTENSIONS):
        if offset + _EXTENSION.size > end:
            return
        kind, length = _EXTENSION.unpack(
            source.take(offset, _EXTENSION.size, "its header extensions")
        )
        if kind == _END:
            return
        offset += _EXTENSION.size
        if length > end - offset:
            raise Malformed(f"has a header extension ({kind:#x}) that runs out of its header")
        content = b""
        if kind == _BACKING_FORMAT:
            content = source.take(offset, length, "its header extensions")
        yield kind, content
        offset += -(-length // 8) * 8
    raise Malformed(f"has more than {_MAX_EXTENSIONS} header extensions")


def _read_backing_name(source: _Source, fields: _Fields) -> bytes | None:
    if not fields.backing_offset:
        return None
    if not 1 <= fields.backing_bytes <= _MAX_BACKING_NAME_BYTES:
        raise Malformed(
            f"names a backing file in {fields.backing_bytes} bytes; 1 to 1023 are possible"
        )
    last = fields.cluster_size_bytes - fields.backing_bytes
    if not fields.header_bytes <= fields.backing_offset <= last:
        raise Malformed(f"has its backing file's name at {fields.backing_offset}, out of place")
    name = source.take(fields.backing_offset, fields.backing_bytes, "its backing file's name")
    if b"\0" in name:
        raise Malformed("names a backing file with a zero byte in it")
    return name


def _backing_format(content: bytes | None) -> str | None:
    if content is None:
        return None
    if len(content) > _MAX_BACKING_FORMAT_BYTES:
        raise Malformed(f"names its backing file's format in {len(content)} bytes; 15 is the most")
    return escaped(content)


def _refusals(fields: _Fields, compression: int, extensions: dict[int, bytes]) -> Iterator[str]:
    if fields.incompatible & ~_KNOWN_FEATURES:
        bits = [bit for bit in range(5, 64) if fields.incompatible >> bit & 1]
        yield f"uses features that kvmsec doesn't know (incompatible bits {bits})"
    if fields.incompatible & _CORRUPT:
        yield "is marked as corrupt; `qemu-img check` tells more"
    if fields.incompatible & _EXTERNAL_DATA or _EXTERNAL_DATA_NAME in extensions:
        yield "keeps its data in an external file, which no instance gets"
    if fields.encryption or _ENCRYPTION_HEADER in extensions:
        name = _ENCRYPTIONS.get(fields.encryption, f"method {fields.encryption}")
        yield f"is encrypted ({name}); kvmsec gives QEMU no key"
    uses_other_compression = bool(fields.incompatible & _COMPRESSION)
    if compression not in _COMPRESSIONS or bool(compression) != uses_other_compression:
        yield f"names compression type {compression}, unknown or at odds with its feature bits"
