"""Root opens exactly the disks that the definition names, and never by a link."""

import errno
import fcntl
import os
import socket
import stat
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import pytest
from attrs import evolve

from hypervisor.images import (
    ImageError,
    ImageFile,
    ImageIdentity,
    ImageNotOpened,
    ImageUsedTwice,
    NotAnImage,
    OpenImage,
    open_chains,
)
from hypervisor.images.opening import INSPECTION_TIMEOUT_S
from kvmsec.linux import command
from kvmsec.linux.children import start_child
from kvmsec.linux.credentials import Credentials
from kvmsec.linux.syscalls import mount, umount

pytestmark = pytest.mark.root

NOBODY = Credentials(uid=230001, gid=230001)
MIB = 1 << 20

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


@pytest.fixture
def block_device(vm: Path, make_raw: Make) -> Iterator[Path]:
    """A loop device over a file of 1 MiB."""
    backing = make_raw("backing")
    made = command.run(["losetup", "--find", "--show", str(backing.path)], timeout_s=10, ok=(0, 1))
    if made.status:
        pytest.skip("this kernel has no loop device")
    device = Path(made.stdout.decode().strip())
    yield device
    command.run(["losetup", "--detach", str(device)], timeout_s=10)


def test_a_raw_disk_is_opened_for_writing_and_stays_roots(vm: Path, make_raw: Make) -> None:
    disk = make_raw("disk.img")

    (image,) = open_chain([disk])
    try:
        assert access_mode(image.fd) == os.O_RDWR
        assert os.get_blocking(image.fd)
        assert not os.get_inheritable(image.fd)
        assert image.kind == "file"
        assert image.identity == ImageIdentity.of(disk.path.stat())
    finally:
        image.close()
    status = disk.path.stat()
    assert (status.st_uid, status.st_gid, stat.S_IMODE(status.st_mode)) == (0, 0, 0o600)


def test_a_read_only_disk_is_opened_for_reading(vm: Path, make_raw: Make) -> None:
    disk = make_raw("disk.img")

    (image,) = open_chain([ImageFile(disk.path, readonly=True)])
    try:
        assert access_mode(image.fd) == os.O_RDONLY
    finally:
        image.close()


def test_direct_io_is_asked_for_when_a_disk_is_opened(vm: Path, make_raw: Make) -> None:
    disk = make_raw("disk.img")

    for is_direct in (True, False):
        (image,) = open_chain([evolve(disk, is_direct=is_direct)])
        try:
            assert bool(fcntl.fcntl(image.fd, fcntl.F_GETFL) & os.O_DIRECT) == is_direct
        finally:
            image.close()


def test_a_filesystem_without_direct_io_is_said(vm: Path, make_raw: Make) -> None:
    mount("memory", str(vm), "ramfs", 0)
    try:
        disk = make_raw("disk.img")
        with pytest.raises(ImageNotOpened, match="without direct I/O") as caught:
            open_chain([evolve(disk, is_direct=True)])
        assert caught.value.hint == "say cache = writeback for the disk"
        open_chain([disk])[0].close()
    finally:
        umount(str(vm))


def test_only_the_top_of_a_chain_can_be_written(vm: Path, make_qcow2: Make) -> None:
    base = make_qcow2("base.qcow2")
    middle = make_qcow2("middle.qcow2", backing="base.qcow2")
    top = make_qcow2("top.qcow2", backing=middle.path)

    images = open_chain([top, middle, base])
    try:
        assert [access_mode(image.fd) for image in images] == [os.O_RDWR, *[os.O_RDONLY] * 2]
        assert [image.readonly for image in images] == [False, True, True]
    finally:
        for image in images:
            image.close()


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
        with pytest.raises(NotAnImage, match=what) as caught:
            opened(ImageFile(vm / name))
        assert "lsblk" in (caught.value.hint or "")
    with pytest.raises(ImageNotOpened, match=r"missing\.img can't be opened: No such file"):
        opened(ImageFile(vm / "missing.img"))
    with pytest.raises(ImageNotOpened, match="not an absolute path"):
        opened(ImageFile(Path("disk.img")))
    with pytest.raises(ImageNotOpened, match="not an absolute path"):
        opened(ImageFile(Path("/dev/null\0.img")))


def test_no_link_is_followed_anywhere(vm: Path, make_raw: Make) -> None:
    disk = make_raw("disk.img")
    (vm / "link.img").symlink_to(disk.path)
    (vm.parent / "linked").symlink_to(vm)

    for path in (vm / "link.img", vm.parent / "linked" / "disk.img"):
        with pytest.raises(ImageNotOpened, match="symbolic link") as caught:
            opened(ImageFile(path))
        assert caught.value.errno == errno.ELOOP
    with pytest.raises(ImageError):
        opened(ImageFile(Path("/proc/self/exe")))


def test_a_link_that_is_swapped_in_never_gets_through(vm: Path, make_raw: Make) -> None:
    """Whatever moment the swap takes, it is the disk that is opened, or nothing."""
    disk = make_raw("disk.img")
    victim = make_raw("victim.img")
    identity = ImageIdentity.of(disk.path.stat())
    (vm / "link").symlink_to(victim.path)
    os.link(disk.path, vm / "kept")

    def swap() -> None:
        while True:
            os.link(vm / "kept", vm / "fresh")
            os.symlink(victim.path, vm / "evil")
            os.rename(vm / "evil", disk.path)
            os.rename(vm / "fresh", disk.path)

    swapping = start_child(swap, what="swapping")
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
        swapping.close()
    assert refused
    assert taken


def test_the_same_file_can_not_be_used_twice(vm: Path, make_qcow2: Make, make_raw: Make) -> None:
    disk = make_raw("disk.img")
    os.link(disk.path, vm / "alias.img")
    readonly = ImageFile(vm / "alias.img", readonly=True)
    top = make_qcow2("top.qcow2", backing="top.qcow2")

    for chains in ([[disk], [disk]], [[disk], [readonly]], [[readonly], [disk]], [[top, top]]):
        with pytest.raises(ImageUsedTwice, match="in this machine"):
            open_chains(chains, inspector=NOBODY)


def test_two_disks_of_a_machine_may_share_a_base(vm: Path, make_qcow2: Make) -> None:
    base = make_qcow2("base.qcow2")
    tops = [make_qcow2(f"{name}.qcow2", backing=base.path) for name in "ab"]

    chains = open_chains([[top, base] for top in tops], inspector=NOBODY)

    assert chains[0][1].identity == chains[1][1].identity
    for chain in chains:
        for image in chain:
            image.close()


def test_the_base_of_one_disk_is_no_disk_to_write(vm: Path, make_qcow2: Make) -> None:
    base = make_qcow2("base.qcow2")
    top = make_qcow2("top.qcow2", backing=base.path)

    with pytest.raises(ImageUsedTwice):
        open_chains([[top, base], [base]], inspector=NOBODY)


def test_a_block_device_is_known_by_its_number(vm: Path, block_device: Path) -> None:
    number = block_device.stat().st_rdev
    os.mknod(vm / "alias", stat.S_IFBLK | 0o600, number)

    (seen,) = opened(ImageFile(block_device))

    assert seen.kind == "block"
    assert seen.identity == ImageIdentity("block", number)
    with pytest.raises(ImageUsedTwice):
        open_chains([[ImageFile(block_device)], [ImageFile(vm / "alias")]], inspector=NOBODY)


def test_the_descriptor_is_a_file_description_of_its_own(vm: Path, make_raw: Make) -> None:
    """Nobody may be left with a copy: QEMU's image locks live in the description."""
    disk = make_raw("disk.img")
    (first,) = open_chain([disk])
    try:
        os.lseek(first.fd, 512, os.SEEK_SET)
        (second,) = open_chain([disk])
        second_offset = os.lseek(second.fd, 0, os.SEEK_CUR)
        second.close()
        assert second_offset == 0
    finally:
        first.close()
