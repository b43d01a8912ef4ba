"""Disks are opened by root without trusting their paths, their headers or their parser."""

import contextlib
import errno
import fcntl
import json
import os
import socket
import stat
import struct
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from hypervisor.images import (
    BackingMismatch,
    HeaderRefused,
    ImageError,
    ImageFile,
    ImageIdentity,
    ImageNotOpened,
    ImageUsedTwice,
    InspectionFailed,
    NotAnImage,
    OpenImage,
    inspection,
    open_chain,
    open_chains,
)
from hypervisor.images.qcow2 import Malformed, parse
from kvmsec.linux import command
from kvmsec.linux.credentials import Credentials

pytestmark = pytest.mark.root

NOBODY = Credentials(uid=230001, gid=230001)
MIB = 1 << 20


def qemu_img(*arguments: str | Path) -> bytes:
    return command.run(["qemu-img", *map(str, arguments)], timeout_s=30).stdout


def make_qcow2(path: Path, *, backing: Path | str | None = None, options: str = "") -> ImageFile:
    arguments: list[str | Path] = ["create", "-q", "-f", "qcow2"]
    if options:
        arguments += ["-o", options]
    if backing is not None:
        arguments += ["-u", "-b", str(backing), "-F", "qcow2"]
    qemu_img(*arguments, path, "16M")
    path.chmod(0o600)
    return ImageFile(path, "qcow2")


def make_raw(path: Path, content: bytes = bytes(MIB)) -> ImageFile:
    path.write_bytes(content)
    path.chmod(0o600)
    return ImageFile(path)


def patch(image: ImageFile, offset: int, format_: str, *values: int) -> None:
    with image.path.open("r+b") as file:
        file.seek(offset)
        file.write(struct.pack(format_, *values))


@pytest.fixture
def vm(tmp_path: Path) -> Path:
    """A directory that only root may enter."""
    place = tmp_path / "vm"
    place.mkdir(mode=0o700)
    return place


@pytest.fixture(autouse=True)
def _no_descriptor_is_lost() -> Iterator[None]:
    before = set(os.listdir("/proc/self/fd"))
    yield
    assert set(os.listdir("/proc/self/fd")) == before


def opened(*chain: ImageFile) -> list[OpenImage]:
    """What `open_chain` gives, already closed again."""
    images = open_chain(chain, inspector=NOBODY)
    for image in images:
        image.close()
    return list(images)


def access_mode(descriptor: int) -> int:
    return fcntl.fcntl(descriptor, fcntl.F_GETFL) & os.O_ACCMODE


def test_a_raw_disk_is_opened_for_writing_and_stays_roots(vm: Path) -> None:
    disk = make_raw(vm / "disk.img")

    (image,) = open_chain([disk], inspector=NOBODY)
    try:
        assert access_mode(image.fd) == os.O_RDWR
        assert os.get_blocking(image.fd)
        assert not os.get_inheritable(image.fd)
        assert (image.kind, image.virtual_size_bytes) == ("file", MIB)
        assert image.identity == ImageIdentity.of(disk.path.stat())
    finally:
        image.close()
    status = disk.path.stat()
    assert (status.st_uid, status.st_gid, stat.S_IMODE(status.st_mode)) == (0, 0, 0o600)


def test_a_read_only_disk_is_opened_for_reading(vm: Path) -> None:
    disk = make_raw(vm / "disk.img")

    (image,) = open_chain([ImageFile(disk.path, readonly=True)], inspector=NOBODY)
    try:
        assert access_mode(image.fd) == os.O_RDONLY
    finally:
        image.close()


def test_only_the_top_of_a_chain_can_be_written(vm: Path) -> None:
    base = make_qcow2(vm / "base.qcow2")
    middle = make_qcow2(vm / "middle.qcow2", backing="base.qcow2")
    top = make_qcow2(vm / "top.qcow2", backing=middle.path)

    images = open_chain([top, middle, base], inspector=NOBODY)
    try:
        assert [access_mode(image.fd) for image in images] == [os.O_RDWR, *[os.O_RDONLY] * 2]
        assert [image.readonly for image in images] == [False, True, True]
        assert {image.virtual_size_bytes for image in images} == {16 * MIB}
    finally:
        for image in images:
            image.close()


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
def test_every_image_that_qemu_img_makes_is_read_as_qemu_img_reads_it(
    vm: Path, options: str
) -> None:
    image = make_qcow2(vm / "disk.qcow2", options=options)

    (seen,) = opened(image)

    said = json.loads(qemu_img("info", "--output=json", image.path))
    assert seen.virtual_size_bytes == said["virtual-size"]


def test_internal_snapshots_and_bitmaps_are_fine(vm: Path) -> None:
    image = make_qcow2(vm / "disk.qcow2")
    qemu_img("snapshot", "-c", "before", image.path)
    qemu_img("bitmap", "--add", image.path, "changes")

    assert len(opened(image)) == 1


def test_a_raw_disk_that_looks_like_qcow2_is_not_parsed(vm: Path) -> None:
    evil = make_qcow2(vm / "disk.img", backing="/etc/shadow")

    (seen,) = opened(ImageFile(evil.path, "raw"))

    assert seen.virtual_size_bytes == evil.path.stat().st_size


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
def test_a_header_that_names_anything_else_is_refused(vm: Path, name: str) -> None:
    base = make_qcow2(vm / "base.qcow2")
    top = make_qcow2(vm / "top.qcow2", backing=name)

    for chain in ([top], [top, base]):
        with pytest.raises(BackingMismatch) as caught:
            opened(*chain)
        assert str(top.path) in caught.value.message
        assert name in caught.value.message


def test_an_external_data_file_is_refused(vm: Path) -> None:
    image = make_qcow2(vm / "disk.qcow2", options=f"data_file={vm}/data.raw,data_file_raw=on")

    with pytest.raises(HeaderRefused, match="external file"):
        opened(image)


def test_an_encrypted_image_is_refused(vm: Path) -> None:
    path = vm / "disk.qcow2"
    secret = ["--object", "secret,id=s,data=abc", "-o", "encrypt.format=luks,encrypt.key-secret=s"]
    iterations = ["-o", "encrypt.iter-time=10"]
    qemu_img("create", "-q", "-f", "qcow2", *secret, *iterations, path, "1M")

    with pytest.raises(HeaderRefused, match="LUKS"):
        opened(ImageFile(path, "qcow2"))


@pytest.mark.parametrize("length", [0, 3, 71, 103, 4096, 131072])
def test_an_image_that_was_cut_short_is_refused(vm: Path, length: int) -> None:
    image = make_qcow2(vm / "disk.qcow2")
    os.truncate(image.path, length)

    with pytest.raises(HeaderRefused, match=r"disk\.qcow2 (is cut short|has its)"):
        opened(image)


def test_another_image_format_is_no_qcow2(vm: Path) -> None:
    path = vm / "disk.vmdk"
    qemu_img("create", "-q", "-f", "vmdk", path, "1M")

    with pytest.raises(HeaderRefused, match="not a qcow2 image"):
        opened(ImageFile(path, "qcow2"))


def test_every_disk_of_a_machine_is_looked_at(vm: Path) -> None:
    good, bad = make_qcow2(vm / "good.qcow2"), make_qcow2(vm / "bad.qcow2")
    patch(bad, 72, ">Q", 1 << 9)

    with pytest.raises(HeaderRefused, match=r"bad\.qcow2 uses features"):
        open_chains([[make_raw(vm / "raw.img")], [good], [bad]], inspector=NOBODY)


def test_what_is_missing_or_no_file_is_said(vm: Path) -> None:
    os.mkfifo(vm / "fifo")
    listening = socket.socket(socket.AF_UNIX)
    listening.bind(str(vm / "socket"))
    listening.close()
    os.mknod(vm / "tty", stat.S_IFCHR | 0o600, os.makedev(5, 0))

    for name, what in (
        (".", "a directory"),
        ("fifo", "a FIFO"),
        ("socket", "a socket"),
        ("tty", "a character device"),
    ):
        with pytest.raises(NotAnImage, match=what):
            opened(ImageFile(vm / name))
    with pytest.raises(ImageNotOpened, match=r"missing\.img can't be opened: No such file"):
        opened(ImageFile(vm / "missing.img"))
    with pytest.raises(ImageNotOpened, match="not an absolute path"):
        opened(ImageFile(Path("disk.img")))
    with pytest.raises(ImageNotOpened, match="not an absolute path"):
        opened(ImageFile(Path("/dev/null\0.img")))


def test_no_link_is_followed_anywhere(vm: Path) -> None:
    disk = make_raw(vm / "disk.img")
    (vm / "link.img").symlink_to(disk.path)
    (vm.parent / "linked").symlink_to(vm)

    for path in (vm / "link.img", vm.parent / "linked" / "disk.img"):
        with pytest.raises(ImageNotOpened, match="symbolic link") as caught:
            opened(ImageFile(path))
        assert caught.value.errno == errno.ELOOP
    with pytest.raises(ImageError):
        opened(ImageFile(Path("/proc/self/exe")))


def test_a_link_that_is_swapped_in_never_gets_through(vm: Path) -> None:
    """Whatever moment the swap takes, it is the disk that is opened, or nothing."""
    disk = make_raw(vm / "disk.img")
    victim = make_raw(vm / "victim.img")
    identity = ImageIdentity.of(disk.path.stat())
    (vm / "link").symlink_to(victim.path)
    os.link(disk.path, vm / "kept")
    stop = threading.Event()

    def swap() -> None:
        while not stop.is_set():
            os.link(vm / "kept", vm / "fresh")
            os.symlink(victim.path, vm / "evil")
            os.rename(vm / "evil", disk.path)
            os.rename(vm / "fresh", disk.path)

    swapping = threading.Thread(target=swap)
    swapping.start()
    try:
        refused, taken, deadline = 0, 0, time.monotonic() + 1
        while time.monotonic() < deadline:
            try:
                (image,) = opened(disk)
            except ImageNotOpened as error:
                assert error.errno == errno.ELOOP
                refused += 1
            else:
                assert image.identity == identity
                taken += 1
    finally:
        stop.set()
        swapping.join()
    assert refused
    assert taken


def test_the_same_file_can_not_be_used_twice(vm: Path) -> None:
    disk = make_raw(vm / "disk.img")
    os.link(disk.path, vm / "alias.img")
    readonly = ImageFile(vm / "alias.img", readonly=True)
    top = make_qcow2(vm / "top.qcow2", backing="top.qcow2")

    for chains in ([[disk], [disk]], [[disk], [readonly]], [[readonly], [disk]], [[top, top]]):
        with pytest.raises(ImageUsedTwice, match="in this machine"):
            open_chains(chains, inspector=NOBODY)


def test_two_disks_of_a_machine_may_share_a_base(vm: Path) -> None:
    base = make_qcow2(vm / "base.qcow2")
    tops = [make_qcow2(vm / f"{name}.qcow2", backing=base.path) for name in "ab"]

    chains = open_chains([[top, base] for top in tops], inspector=NOBODY)

    assert chains[0][1].identity == chains[1][1].identity
    for chain in chains:
        for image in chain:
            image.close()


def test_the_base_of_one_disk_is_no_disk_to_write(vm: Path) -> None:
    base = make_qcow2(vm / "base.qcow2")
    top = make_qcow2(vm / "top.qcow2", backing=base.path)

    with pytest.raises(ImageUsedTwice):
        open_chains([[top, base], [base]], inspector=NOBODY)


def test_the_parser_is_nobody_and_can_not_write(vm: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    image = make_qcow2(vm / "disk.qcow2")

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
    vm: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    image = make_qcow2(vm / "disk.qcow2")

    for answer in (None, [], {}, {"version": {}}, [1], {"malformed": "\x1b[2J\n"}):
        monkeypatch.setattr(inspection, "_inspect", lambda *_, answer=answer: answer)
        with pytest.raises(ImageError) as caught:
            opened(image)
        assert caught.value.message.isprintable()


def test_a_parser_that_hangs_is_ended_in_time(vm: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    image = make_qcow2(vm / "disk.qcow2")
    monkeypatch.setattr(inspection, "_inspect", lambda *_: time.sleep(60))

    started = time.monotonic()
    with pytest.raises(InspectionFailed, match="did not end within"):
        open_chain([image], inspector=NOBODY, timeout_s=0.2)
    assert time.monotonic() - started < 5


@pytest.fixture
def block_device(vm: Path) -> Iterator[Path]:
    """A loop device over a file of 1 MiB."""
    backing = make_raw(vm / "backing")
    made = command.run(["losetup", "--find", "--show", str(backing.path)], timeout_s=10, ok=(0, 1))
    if made.status:
        pytest.skip("this kernel has no loop device")
    device = Path(made.stdout.decode().strip())
    yield device
    command.run(["losetup", "--detach", str(device)], timeout_s=10)


def test_a_block_device_is_known_by_its_number(vm: Path, block_device: Path) -> None:
    number = block_device.stat().st_rdev
    os.mknod(vm / "alias", stat.S_IFBLK | 0o600, number)

    (seen,) = opened(ImageFile(block_device))

    assert (seen.kind, seen.virtual_size_bytes) == ("block", MIB)
    assert seen.identity == ImageIdentity("block", number)
    with pytest.raises(ImageUsedTwice):
        open_chains([[ImageFile(block_device)], [ImageFile(vm / "alias")]], inspector=NOBODY)


def test_the_descriptor_is_a_file_description_of_its_own(vm: Path) -> None:
    """Nobody may be left with a copy: QEMU's image locks live in the description."""
    disk = make_raw(vm / "disk.img")
    (first,) = open_chain([disk], inspector=NOBODY)
    try:
        os.lseek(first.fd, 512, os.SEEK_SET)
        (second,) = open_chain([disk], inspector=NOBODY)
        second_offset = os.lseek(second.fd, 0, os.SEEK_CUR)
        second.close()
        assert second_offset == 0
    finally:
        first.close()


def test_hostile_headers_agree_with_qemu_img(vm: Path) -> None:
    """What the parser takes, QEMU's own opens; a header that only one reads would be a gap."""
    image = make_qcow2(vm / "disk.qcow2")
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
