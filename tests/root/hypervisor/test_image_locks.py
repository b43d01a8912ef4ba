"""What other programs know by the locks of an image, held against QEMU's own tools."""

import subprocess
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from attrs import evolve

from hypervisor.images import ImageFile, ImageLocked, OpenImage, lock, open_chains
from kvmsec.linux.credentials import NOBODY, Credentials

pytestmark = pytest.mark.root

Make = Callable[[str], ImageFile]


@contextmanager
def opened(image: ImageFile) -> Iterator[OpenImage]:
    ((found,),) = open_chains([[image]], inspector=Credentials(NOBODY, NOBODY))
    try:
        yield found
    finally:
        found.close()


@contextmanager
def used_by_qemu(path: Path) -> Iterator[None]:
    """Somebody else's QEMU has it open, as its own tool does."""
    tool = subprocess.Popen(
        ["qemu-io", "-f", "raw", str(path)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    with tool:
        assert tool.stdin and tool.stdout
        tool.stdin.write("length\n")
        tool.stdin.flush()
        assert "1 MiB" in tool.stdout.readline()
        yield
        tool.kill()


def asks_qemu(path: Path, *words: str) -> bool:
    command = ["qemu-io", "-f", "raw", *words, str(path)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0 or "lock" in done.stderr, done
    return done.returncode == 0


READ = ("-r", "-c", "read 0 512")
WRITE = ("-c", "write 0 512")


def test_an_image_that_is_written_is_nobody_elses(make_raw: Make) -> None:
    image = make_raw("disk.img")
    with opened(image) as ours:
        assert asks_qemu(image.path, *WRITE)
        lock(ours)
        assert not asks_qemu(image.path, *WRITE)
        assert asks_qemu(image.path, *READ), "as beside a QEMU: who reads minds no writer"
    assert asks_qemu(image.path, *WRITE), "the locks go with the descriptor"


def test_an_image_that_is_read_may_be_read_by_others(make_raw: Make) -> None:
    image = evolve(make_raw("disk.img"), readonly=True)
    with opened(image) as ours, opened(image) as again:
        lock(ours)
        lock(again)
        assert asks_qemu(image.path, *READ)
        assert not asks_qemu(image.path, *WRITE)


@pytest.mark.parametrize("readonly", [False, True])
def test_an_image_that_another_qemu_writes_is_refused(make_raw: Make, readonly: bool) -> None:
    image = evolve(make_raw("disk.img"), readonly=readonly)
    refused = pytest.raises(ImageLocked, match="is locked: another program uses it")
    with opened(image) as ours, used_by_qemu(image.path), refused:
        lock(ours)


def test_two_of_us_exclude_each_other_unless_both_read(make_raw: Make) -> None:
    image = make_raw("disk.img")
    with opened(image) as first, opened(evolve(image, readonly=True)) as second:
        lock(first)
        with pytest.raises(ImageLocked):
            lock(second)
