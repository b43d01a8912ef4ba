"""A qcow2 header is read within bounds, and whatever is wrong with it is said."""

import re
import struct
from collections.abc import Callable

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hypervisor.images.qcow2 import (
    READ_LIMIT_BYTES,
    Malformed,
    Qcow2Header,
    largest_file_bytes,
    parse,
)

CLUSTER = 65536
SIZE = 1 << 30
EXTERNAL_DATA_NAME = 0x44415441
ENCRYPTION_HEADER = 0x0537BE77
BACKING_FORMAT = 0xE2792ACA
FEATURE_NAMES = 0x6803F857

FIELDS = {
    "magic": (0, ">4s"),
    "version": (4, ">I"),
    "backing_offset": (8, ">Q"),
    "backing_bytes": (16, ">I"),
    "cluster_bits": (20, ">I"),
    "virtual_size": (24, ">Q"),
    "encryption": (32, ">I"),
    "l1_entries": (36, ">I"),
    "l1_offset": (40, ">Q"),
    "refcount_offset": (48, ">Q"),
    "refcount_clusters": (56, ">I"),
    "snapshots": (60, ">I"),
    "snapshots_offset": (64, ">Q"),
    "incompatible": (72, ">Q"),
    "refcount_order": (96, ">I"),
    "header_bytes": (100, ">I"),
    "compression": (104, ">B"),
}
GOOD = {
    "magic": b"QFI\xfb",
    "version": 3,
    "cluster_bits": 16,
    "virtual_size": SIZE,
    "l1_entries": 2,
    "l1_offset": 3 * CLUSTER,
    "refcount_offset": CLUSTER,
    "refcount_clusters": 1,
    "refcount_order": 4,
    "header_bytes": 112,
}


def image(
    *extensions: tuple[int, bytes],
    backing: bytes | None = None,
    size_bytes: int = 4 * CLUSTER,
    **changes: int | bytes,
) -> bytes:
    """An image as qemu-img makes one, with some fields changed."""
    data = bytearray(size_bytes)
    fields = GOOD | changes
    offset = 112 if fields["version"] == 3 else 72
    for kind, content in extensions:
        struct.pack_into(">II", data, offset, kind, len(content))
        data[offset + 8 : offset + 8 + len(content)] = content
        offset += 8 + -(-len(content) // 8) * 8
    if backing is not None:
        data[offset + 8 : offset + 8 + len(backing)] = backing
        fields = {"backing_offset": offset + 8, "backing_bytes": len(backing)} | fields
    for name, value in fields.items():
        if fields["version"] == 3 or FIELDS[name][0] < 72:
            struct.pack_into(FIELDS[name][1], data, FIELDS[name][0], value)
    return bytes(data)


def reader(data: bytes) -> Callable[[int, int], bytes]:
    return lambda offset, length: data[offset : offset + length]


def read(data: bytes) -> Qcow2Header:
    return parse(reader(data), len(data))


def test_a_plain_image_is_read() -> None:
    assert read(image()) == Qcow2Header(
        backing_name=None,
        backing_format=None,
        refusals=(),
        virtual_bytes=SIZE,
        cluster_bytes=1 << 16,
    )


def test_version_2_has_no_features() -> None:
    header = read(image(version=2, backing=b"base.img"))

    assert header.backing_name == b"base.img"
    assert header.refusals == ()


def test_backing_name_and_format_are_read_past_other_extensions() -> None:
    extensions = (FEATURE_NAMES, bytes(48)), (BACKING_FORMAT, b"qcow2")

    header = read(image(*extensions, backing=b"/vm/base.qcow2"))

    assert (header.backing_name, header.backing_format) == (b"/vm/base.qcow2", "qcow2")


def test_what_qemu_repairs_by_itself_is_no_refusal() -> None:
    assert read(image(incompatible=1)).refusals == ()


@pytest.mark.parametrize("compression", [0, 1])
def test_both_compressions_of_qemu_are_taken(compression: int) -> None:
    data = image(compression=compression, incompatible=8 if compression else 0)

    assert read(data).refusals == ()


def test_snapshots_and_extended_l2_entries_are_taken() -> None:
    data = image(snapshots=2, snapshots_offset=3 * CLUSTER, l1_entries=4, incompatible=16)

    assert read(data).refusals == ()


@pytest.mark.parametrize(
    ("data", "finding"),
    [
        (image(incompatible=2), "corrupt"),
        (image(incompatible=4), "external file"),
        (image((EXTERNAL_DATA_NAME, b"/etc/shadow")), "external file"),
        (image(encryption=1), "AES"),
        (image(encryption=2), "LUKS"),
        (image(encryption=7), "method 7"),
        (image((ENCRYPTION_HEADER, bytes(16))), "encrypted"),
        (image(incompatible=1 << 5 | 1 << 63), r"bits \[5, 63\]"),
        (image(compression=9, incompatible=8), "compression type 9"),
        (image(compression=1), "compression type 1"),
        (image(compression=0, incompatible=8), "compression type 0"),
    ],
)
def test_what_no_instance_may_have_is_a_refusal(data: bytes, finding: str) -> None:
    (refusal,) = read(data).refusals

    assert re.search(finding, refusal)


def test_every_refusal_is_reported() -> None:
    assert len(read(image(incompatible=2 | 4 | 1 << 40, encryption=2)).refusals) == 4


@pytest.mark.parametrize(
    ("data", "finding"),
    [
        (b"", "cut short in its header"),
        (image()[:71], "cut short in its header"),
        (image()[:100], "cut short in its header"),
        (image(magic=b"QFI\xfa"), "not a qcow2 image"),
        (image(version=1), "version 1"),
        (image(version=4), "version 4"),
        (image(cluster_bits=8), "clusters"),
        (image(cluster_bits=22), "clusters"),
        (image(cluster_bits=2**32 - 1), "clusters"),
        (image(header_bytes=103), "length as 103"),
        (image(header_bytes=108), "length as 108"),
        (image(header_bytes=2**32 - 8), "length as"),
        (image(cluster_bits=9, header_bytes=1024), "longer than its first cluster"),
        (image(incompatible=16, cluster_bits=13), "less than 16 KiB"),
        (image(refcount_order=7), "reference counts"),
        (image(virtual_size=2**63), "claims a size"),
        (image(virtual_size=2**40), "too few"),
        (image(l1_entries=0), "too few"),
        (image(l1_entries=2**32 - 1), "L1 table of"),
        (image(l1_offset=4 * CLUSTER), "L1 table behind the end"),
        (image(l1_offset=2**64 - CLUSTER), "L1 table behind the end"),
        (image(l1_offset=3 * CLUSTER + 8), "where no table can be"),
        (image(l1_offset=0), "where no table can be"),
        (image(refcount_clusters=0), "no reference count table"),
        (image(refcount_offset=2**40), "reference count table behind"),
        (image(refcount_clusters=129), "reference count table of"),
        (image(snapshots=65537), "snapshot table of"),
        (image(snapshots=1, snapshots_offset=9 * CLUSTER), "snapshot table behind"),
        (image(size_bytes=2 * CLUSTER), "behind the end"),
        (image(backing=b"x" * 1024), "1024 bytes"),
        (image(backing=b""), "0 bytes"),
        (image(backing_offset=8, backing_bytes=8), "out of place"),
        (image(backing_offset=CLUSTER, backing_bytes=8), "out of place"),
        (image(backing_offset=2**64 - 1, backing_bytes=8), "out of place|cut short"),
        (image(backing=b"base\0/etc/shadow"), "zero byte"),
        (image((BACKING_FORMAT, b"x" * 16)), "15 is the most"),
        (image(*[(FEATURE_NAMES, b"")] * 32), "more than 32"),
    ],
)
def test_a_malformed_header_is_an_error(data: bytes, finding: str) -> None:
    with pytest.raises(Malformed, match=finding):
        read(data)


def test_an_extension_can_not_reach_out_of_the_header() -> None:
    data = bytearray(image())
    struct.pack_into(">II", data, 112, BACKING_FORMAT, 2**32 - 1)

    with pytest.raises(Malformed, match="runs out of its header"):
        read(bytes(data))


def test_an_extension_can_not_reach_over_the_backing_name() -> None:
    data = bytearray(image((FEATURE_NAMES, bytes(48)), backing=b"base.qcow2"))
    struct.pack_into(">I", data, 116, 4096)

    with pytest.raises(Malformed, match="runs out of its header"):
        read(bytes(data))


def test_a_device_that_ends_early_is_an_error() -> None:
    with pytest.raises(Malformed, match="cut short"):
        parse(reader(image()[:90]), 4 * CLUSTER)


class Counting:
    """A reader that keeps the sum of what it was asked for."""

    def __init__(self, data: bytes) -> None:
        self.data = data
        self.asked_bytes = 0
        self.calls = 0

    def __call__(self, offset: int, length: int) -> bytes:
        self.asked_bytes += length
        self.calls += 1
        return self.data[offset : offset + length]


def assert_bounded(data: bytes) -> None:
    counting = Counting(data)
    try:
        parse(counting, len(data))
    except Malformed as error:
        assert str(error).isprintable()
    assert counting.asked_bytes <= READ_LIMIT_BYTES
    assert counting.calls <= 50


def test_a_header_full_of_long_extensions_is_not_read_on() -> None:
    data = bytearray(image(size_bytes=4 << 21, cluster_bits=21, l1_offset=3 << 21) + bytes(8))
    struct.pack_into(">Q", data, 48, 1 << 21)
    for number in range(16):
        struct.pack_into(">II", data, 112 + number * 4104, BACKING_FORMAT, 4096)
    counting = Counting(bytes(data))

    with pytest.raises(Malformed, match="header of more than"):
        parse(counting, len(data))
    assert counting.asked_bytes <= READ_LIMIT_BYTES


@given(st.binary(max_size=4096))
def test_arbitrary_bytes_do_no_more_than_fail(data: bytes) -> None:
    assert_bounded(data)
    assert_bounded(b"QFI\xfb" + data)


@given(
    st.lists(st.tuples(st.integers(0, 1023), st.binary(min_size=1, max_size=16)), max_size=8),
    st.sampled_from([2, 3]),
)
def test_damage_anywhere_does_no_more_than_fail(
    damages: list[tuple[int, bytes]], version: int
) -> None:
    data = bytearray(image((BACKING_FORMAT, b"qcow2"), backing=b"base.qcow2", version=version))
    for offset, content in damages:
        data[offset : offset + len(content)] = content

    assert_bounded(bytes(data))


numbers = st.one_of(
    st.integers(0, 2**64 - 1), st.integers(0, 300), st.integers(0, 16).map(lambda n: n * CLUSTER)
)


@given(st.dictionaries(st.sampled_from(sorted(set(FIELDS) - {"magic", "version"})), numbers))
def test_arbitrary_numbers_do_no_more_than_fail(changes: dict[str, int]) -> None:
    fitted = {
        name: value % 256 ** struct.calcsize(FIELDS[name][1]) for name, value in changes.items()
    }

    assert_bounded(image((FEATURE_NAMES, bytes(48)), **fitted))


@pytest.mark.parametrize("cluster_bits", [9, 12, 16, 21])
def test_a_file_may_become_as_large_as_a_disk_that_is_written_anew_whole(cluster_bits: int) -> None:
    """The refcounts and L2 tables that QEMU makes for it, summed as docs/interop/qcow2.txt does."""
    cluster, virtual, before = 1 << cluster_bits, 10 << 30, 1 << 30
    header = Qcow2Header(None, None, (), virtual_bytes=virtual, cluster_bytes=cluster)
    data = virtual // cluster
    tables = -(-data * 16 // cluster)
    counted = before // cluster + data + tables
    refcounts = -(-counted * 8 // cluster)
    least = before + (data + tables + refcounts) * cluster

    largest = largest_file_bytes(header, before)

    assert least <= largest < least + least // 8 + (64 << 20)
