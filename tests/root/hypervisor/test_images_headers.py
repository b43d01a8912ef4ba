"""A header is read by nobody, as QEMU reads it, and must be the definition's."""

import contextlib
import fcntl
import os
import struct
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest

from hypervisor.images import (
    BackingMismatch,
    HeaderRefused,
    ImageError,
    ImageFile,
    InspectionFailed,
    OpenImage,
    inspection,
    open_chains,
)
from hypervisor.images.opening import INSPECTION_TIMEOUT_S
from hypervisor.images.qcow2 import Malformed, parse
from kvmsec.linux import command
from kvmsec.linux.credentials import Credentials
from kvmsec.linux.errors import CommandFailed

pytestmark = pytest.mark.root

NOBODY = Credentials(uid=230001, gid=230001)

Make = Callable[..., ImageFile]


def open_chain(
    chain: Sequence[ImageFile], *, timeout_s: float = INSPECTION_TIMEOUT_S
) -> tuple[OpenImage, ...]:
    return open_chains([chain], inspector=NOBODY, timeout_s=timeout_s)[0]


def opened(*chain: ImageFile) -> list[OpenImage]:
    """What `open_chain` gives, already closed again."""
    images = open_chain(chain)
    for image in images:
        image.close()
    return list(images)


def access_mode(descriptor: int) -> int:
    return fcntl.fcntl(descriptor, fcntl.F_GETFL) & os.O_ACCMODE


def patch(image: ImageFile, offset: int, format_: str, *values: int) -> None:
    with image.path.open("r+b") as file:
        file.seek(offset)
        file.write(struct.pack(format_, *values))


@pytest.mark.parametrize(
    "options",
    [
        "compat=0.10",
        "compat=1.1,lazy_refcounts=on",
        "cluster_size=512",
        "cluster_size=2M",
        "extended_l2=on",
        "compression_type=zstd",
        "refcount_bits=1",
        "preallocation=metadata",
        "preallocation=full",
    ],
)
def test_every_image_that_qemu_img_makes_is_taken(vm: Path, options: str, make_qcow2: Make) -> None:
    assert len(opened(make_qcow2("disk.qcow2", options=options))) == 1


def test_internal_snapshots_and_bitmaps_are_fine(
    vm: Path, make_qcow2: Make, qemu_img: Callable[..., bytes]
) -> None:
    image = make_qcow2("disk.qcow2")
    qemu_img("snapshot", "-c", "before", image.path)
    qemu_img("bitmap", "--add", image.path, "changes")

    assert len(opened(image)) == 1


def test_a_raw_disk_that_looks_like_qcow2_is_not_parsed(vm: Path, make_qcow2: Make) -> None:
    evil = make_qcow2("disk.img", backing="/etc/shadow")

    assert len(opened(ImageFile(evil.path, "raw"))) == 1


@pytest.mark.parametrize(
    "name",
    [
        "/etc/shadow",
        "../../../../../../etc/shadow",
        'json:{"driver":"file","filename":"/etc/shadow"}',
        "nbd:unix:/run/nbd.sock",
        "http://127.0.0.1/base",
    ],
)
def test_a_header_that_names_anything_else_is_refused(
    vm: Path, name: str, make_qcow2: Make
) -> None:
    base = make_qcow2("base.qcow2")
    top = make_qcow2("top.qcow2", backing=name)

    for chain in ([top], [top, base]):
        with pytest.raises(BackingMismatch) as caught:
            opened(*chain)
        assert str(top.path) in caught.value.message
        assert name in caught.value.message


def test_an_external_data_file_is_refused(vm: Path, make_qcow2: Make) -> None:
    image = make_qcow2("disk.qcow2", options=f"data_file={vm}/data.raw,data_file_raw=on")

    with pytest.raises(HeaderRefused, match="external file"):
        opened(image)


def test_an_encrypted_image_is_refused(vm: Path, qemu_img: Callable[..., bytes]) -> None:
    path = vm / "disk.qcow2"
    secret = ["--object", "secret,id=s,data=abc", "-o", "encrypt.format=luks,encrypt.key-secret=s"]
    iterations = ["-o", "encrypt.iter-time=10"]
    for attempt in range(10):
        try:
            qemu_img("create", "-q", "-f", "qcow2", *secret, *iterations, path, "1M")
            break
        except CommandFailed as error:
            # It times itself to choose the iterations, and gives up where its clock stood still.
            if attempt == 9 or "Unable to get accurate CPU usage" not in str(error):
                raise

    with pytest.raises(HeaderRefused, match="LUKS"):
        opened(ImageFile(path, "qcow2"))


@pytest.mark.parametrize("length", [0, 3, 71, 103, 4096, 131072])
def test_an_image_that_was_cut_short_is_refused(vm: Path, length: int, make_qcow2: Make) -> None:
    image = make_qcow2("disk.qcow2")
    os.truncate(image.path, length)

    with pytest.raises(HeaderRefused, match=r"disk\.qcow2 (is cut short|has its)"):
        opened(image)


def test_another_image_format_is_no_qcow2(vm: Path, qemu_img: Callable[..., bytes]) -> None:
    path = vm / "disk.vmdk"
    qemu_img("create", "-q", "-f", "vmdk", path, "1M")

    with pytest.raises(HeaderRefused, match="not a qcow2 image"):
        opened(ImageFile(path, "qcow2"))


def test_every_disk_of_a_machine_is_looked_at(vm: Path, make_qcow2: Make, make_raw: Make) -> None:
    good, bad = make_qcow2("good.qcow2"), make_qcow2("bad.qcow2")
    patch(bad, 72, ">Q", 1 << 9)

    with pytest.raises(HeaderRefused, match=r"bad\.qcow2 uses features"):
        open_chains([[make_raw("raw.img")], [good], [bad]], inspector=NOBODY)


def test_the_parser_is_nobody_and_can_not_write(
    vm: Path, monkeypatch: pytest.MonkeyPatch, make_qcow2: Make
) -> None:
    image = make_qcow2("disk.qcow2")
    inode = image.path.stat().st_ino

    def spy(*_: object) -> None:
        modes = []
        for descriptor in range(256):
            with contextlib.suppress(OSError):
                if os.fstat(descriptor).st_ino == inode:
                    modes.append(access_mode(descriptor))
        raise Malformed(f"uids {os.getresuid()} modes {modes}")

    monkeypatch.setattr("hypervisor.images.qcow2.parse", spy)

    with pytest.raises(HeaderRefused) as caught:
        opened(image)
    uids = (NOBODY.uid,) * 3
    assert caught.value.finding == f"uids {uids} modes {[os.O_RDONLY]}"


def test_a_parser_that_was_taken_over_can_only_lie_about_its_header(
    vm: Path, monkeypatch: pytest.MonkeyPatch, make_qcow2: Make
) -> None:
    image = make_qcow2("disk.qcow2")

    for answer in (None, [], {}, {"version": {}}, [1], {"malformed": "\x1b[2J\n"}):
        monkeypatch.setattr(inspection, "_inspect", lambda *_, answer=answer: answer)
        with pytest.raises(ImageError) as caught:
            opened(image)
        assert caught.value.message.isprintable()


def test_a_parser_that_hangs_is_ended_in_time(
    vm: Path, monkeypatch: pytest.MonkeyPatch, make_qcow2: Make
) -> None:
    image = make_qcow2("disk.qcow2")
    monkeypatch.setattr(inspection, "_inspect", lambda *_: time.sleep(60))

    started = time.monotonic()
    with pytest.raises(InspectionFailed, match="did not end within"):
        open_chain([image], timeout_s=0.2)
    assert time.monotonic() - started < 5


def test_hostile_headers_agree_with_qemu_img(vm: Path, make_qcow2: Make) -> None:
    """Neither is the laxer one: what is refused here, QEMU's own driver refuses as well."""
    image = make_qcow2("disk.qcow2")
    for offset, format_, value in (
        (20, ">I", 9),
        (20, ">I", 22),
        (24, ">Q", 2**62),
        (36, ">I", 2**31),
        (40, ">Q", 8),
        (48, ">Q", 8),
        (56, ">I", 2**31),
        (60, ">I", 2**31),
        (96, ">I", 7),
        (100, ">I", 2**31),
    ):
        original = image.path.read_bytes()
        patch(image, offset, format_, value)
        data = image.path.read_bytes()
        with pytest.raises(Malformed):
            parse(lambda start, length, data=data: data[start : start + length], len(data))
        checked = command.run(
            ["qemu-img", "info", "-f", "qcow2", str(image.path)], timeout_s=10, ok=(0, 1)
        )
        assert checked.status == 1
        image.path.write_bytes(original)
