"""Disk images in a directory of root's, made by the qemu-img that is installed; and jails."""

import os
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from hypervisor.images import ImageFile
from kvmsec.linux import command
from tests.root.hypervisor.jailed import build, nursery, the_launcher_is_as_before

__all__ = ["build", "nursery", "the_launcher_is_as_before"]

MakeQcow2 = Callable[..., ImageFile]


@pytest.fixture
def vm(tmp_path: Path) -> Iterator[Path]:
    """A directory that only root may enter; afterwards no descriptor may be left open."""
    place = tmp_path / "vm"
    place.mkdir(mode=0o700)
    before = set(os.listdir("/proc/self/fd"))
    yield place
    assert set(os.listdir("/proc/self/fd")) == before


@pytest.fixture
def qemu_img() -> Callable[..., bytes]:
    """Run qemu-img with the given arguments; gives what it prints."""

    def run(*arguments: str | Path) -> bytes:
        return command.run(["qemu-img", *map(str, arguments)], timeout_s=30).stdout

    return run


@pytest.fixture
def make_qcow2(vm: Path, qemu_img: Callable[..., bytes]) -> MakeQcow2:
    """Make a qcow2 image of 16 MiB in `vm`, over a backing file that need not exist."""

    def make(name: str, *, backing: Path | str | None = None, options: str = "") -> ImageFile:
        arguments = ["-o", options] if options else []
        if backing is not None:
            arguments += ["-u", "-b", str(backing), "-F", "qcow2"]
        qemu_img("create", "-q", "-f", "qcow2", *arguments, vm / name, "16M")
        (vm / name).chmod(0o600)
        return ImageFile(vm / name, "qcow2")

    return make


@pytest.fixture
def make_raw(vm: Path) -> Callable[[str], ImageFile]:
    """Make a raw image of 1 MiB in `vm`."""

    def make(name: str) -> ImageFile:
        (vm / name).write_bytes(bytes(1 << 20))
        (vm / name).chmod(0o600)
        return ImageFile(vm / name)

    return make
