"""The chain in the headers is the definition's, or there is no start."""

from pathlib import Path

import pytest

from hypervisor.images.backing import ImageFile, chain_of, check_chain
from hypervisor.images.errors import BackingMismatch, HeaderRefused
from hypervisor.images.qcow2 import Qcow2Header
from hypervisor.machine import Backing, Disk

TOP = ImageFile(Path("/vm/web/top.qcow2"), "qcow2")
BASE = ImageFile(Path("/vm/base.qcow2"), "qcow2", readonly=True)
RAW = ImageFile(Path("/vm/disk.img"), "raw")


def header(
    backing: bytes | None = None, *, format_: str | None = None, refusals: tuple[str, ...] = ()
) -> Qcow2Header:
    return Qcow2Header(
        backing_name=backing,
        backing_format=format_,
        refusals=refusals,
        virtual_bytes=1 << 20,
        cluster_bytes=1 << 16,
    )


@pytest.mark.parametrize(
    "name",
    [
        b"/vm/base.qcow2",
        b"../base.qcow2",
        b"/vm/./web/../base.qcow2",
    ],
)
@pytest.mark.parametrize("said", [None, "qcow2"])
def test_the_definition_and_the_header_may_spell_one_path_differently(
    name: bytes, said: str | None
) -> None:
    check_chain([TOP, BASE], [header(name, format_=said), header()])


def test_single_images_need_no_backing() -> None:
    check_chain([RAW], [None])
    check_chain([TOP], [header()])
    check_chain([], [])


def test_bytes_that_are_no_utf8_can_be_named() -> None:
    below = ImageFile(Path(b"/vm/\xff.img".decode(errors="surrogateescape")))

    check_chain([TOP, below], [header(b"../\xff.img"), None])


@pytest.mark.parametrize(
    ("name", "finding"),
    [
        (b"/etc/shadow", "/etc/shadow, but the definition gives it /vm/base.qcow2"),
        (b"base.qcow2", "base.qcow2, but the definition"),
        (b'json:{"driver":"file","filename":"/etc/shadow"}', "as JSON"),
        (b"nbd:unix:/run/nbd", "the protocol 'nbd'"),
        (b"nbd://10.0.0.1/x", "the protocol 'nbd'"),
        (b"http://evil/", "the protocol 'http'"),
        (b"fat:rw:/etc", "the protocol 'fat'"),
        (b"file:/vm/base.qcow2", "the protocol 'file'"),
        (b"file:../base.qcow2", "the protocol 'file'"),
        (b":", "the protocol ''"),
    ],
)
def test_a_header_that_names_something_else_is_refused(name: bytes, finding: str) -> None:
    with pytest.raises(BackingMismatch) as caught:
        check_chain([TOP, BASE], [header(name), header()])

    assert finding in caught.value.message
    assert str(TOP.path) in caught.value.message
    assert caught.value.path == TOP.path


def test_a_colon_in_a_directory_is_no_protocol() -> None:
    below = ImageFile(Path("/vm/a:b/base.img"))

    check_chain([TOP, below], [header(b"/vm/a:b/base.img"), None])


def test_a_backing_file_that_only_one_side_knows_is_refused() -> None:
    with pytest.raises(BackingMismatch, match="gives it none"):
        check_chain([TOP], [header(b"/vm/base.qcow2")])
    with pytest.raises(BackingMismatch, match="names no backing file"):
        check_chain([TOP, BASE], [header(), header()])
    with pytest.raises(BackingMismatch, match="is raw"):
        check_chain([RAW, BASE], [None, header()])


def test_the_end_of_a_chain_is_held_to_the_definition_too() -> None:
    with pytest.raises(BackingMismatch) as caught:
        check_chain([TOP, BASE], [header(b"/vm/base.qcow2"), header(b"/etc/shadow")])

    assert caught.value.path == BASE.path


def test_another_format_than_the_headers_is_refused() -> None:
    with pytest.raises(BackingMismatch, match="is raw, the definition qcow2"):
        check_chain([TOP, BASE], [header(b"/vm/base.qcow2", format_="raw"), header()])


def test_refusals_name_the_file_and_every_finding() -> None:
    with pytest.raises(HeaderRefused) as caught:
        check_chain([TOP], [header(refusals=("is encrypted", "is corrupt"))])

    assert caught.value.message == "disk /vm/web/top.qcow2 is encrypted; it is corrupt"


def test_names_are_shown_escaped() -> None:
    with pytest.raises(BackingMismatch) as caught:
        check_chain([TOP], [header(b"\x1b[2J\n\xe2\x80\xae/x")])

    assert caught.value.message.isprintable()


def test_the_hint_can_be_pasted_into_a_shell() -> None:
    below = ImageFile(Path("/vm/a base.img"))

    with pytest.raises(BackingMismatch) as caught:
        check_chain([TOP, below], [header(b"/vm/x"), None])

    assert caught.value.hint is not None
    assert caught.value.hint.endswith("-b '/vm/a base.img' -F raw /vm/web/top.qcow2")


def test_a_disk_is_a_chain_whose_bases_are_only_read() -> None:
    disk = Disk(path=TOP.path, format="qcow2", backing=(Backing(BASE.path, "qcow2"),))

    assert chain_of(disk) == (TOP, BASE)
    assert chain_of(Disk(path=RAW.path, readonly=True))[0].readonly
    assert chain_of(Disk(path=RAW.path, device="cdrom"))[0].readonly
