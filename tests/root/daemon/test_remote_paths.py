"""Where a path that another node names really leads, on a real file system."""

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from hypervisor.spec import machine_from
from kvmsec.config import RemoteSettings
from kvmsec.daemon.remote_orders import (
    RemoteOrderRefused,
    Unfollowable,
    follow,
    require_allowed,
)

pytestmark = pytest.mark.root


@pytest.fixture
def folder() -> Iterator[Path]:
    """A folder that is root's all the way up, which pytest's own are not."""
    top = Path("/run/kvmsec-test-remote")
    (top / "disks").mkdir(parents=True, mode=0o755)
    yield top / "disks"
    for path in sorted(top.rglob("*"), reverse=True):
        path.rmdir() if path.is_dir() and not path.is_symlink() else path.unlink()
    top.rmdir()


def test_a_plain_file_is_where_it_says(folder: Path) -> None:
    disk = folder / "disk.raw"
    disk.touch()
    assert (follow(disk).path, follow(disk).is_block_device) == (disk, False)


def test_a_chain_of_links_is_followed_to_its_end(folder: Path) -> None:
    (folder / "a").symlink_to("b")
    (folder / "b").symlink_to("../disks/c")
    (folder / "c").symlink_to("/etc/passwd")
    assert follow(folder / "a").path == Path("/etc/passwd").resolve()


@pytest.mark.parametrize("target", ["missing", "loop", "..", "/run/.."])
def test_what_leads_nowhere_is_refused(folder: Path, target: str) -> None:
    (folder / "loop").symlink_to(target)
    with pytest.raises(Unfollowable):
        follow(folder / "loop")


def test_a_folder_that_others_can_write_to_is_refused(folder: Path) -> None:
    (folder / "disk.raw").touch()
    folder.chmod(0o777)
    with pytest.raises(Unfollowable, match="written by others"):
        follow(folder / "disk.raw")


def test_a_link_through_somebody_elses_directory_is_refused(folder: Path) -> None:
    foreign = folder / "foreign"
    foreign.mkdir()
    (foreign / "hop").symlink_to(folder / "disk.raw")
    (folder / "disk.raw").touch()
    os.chown(foreign, 247001, 247001)
    (folder / "link").symlink_to("foreign/hop")
    with pytest.raises(Unfollowable, match="247001"):
        follow(folder / "link")


def test_a_device_is_told_from_a_file(folder: Path) -> None:
    os.mknod(folder / "dm-0", 0o60600, os.makedev(7, 200))
    (folder / "root").symlink_to("dm-0")
    assert follow(folder / "root").is_block_device


def test_a_link_out_of_the_folder_is_refused_and_one_within_is_not(folder: Path) -> None:
    (folder / "disk.raw").touch()
    (folder / "in").symlink_to("disk.raw")
    (folder / "out").symlink_to("/etc/shadow")
    settings = RemoteSettings(disk_folders=(folder,))

    def machine(name: str) -> object:
        return machine_from(
            {"name": "web", "disks": [{"path": str(folder / name)}]}, source="the test"
        )

    require_allowed(machine("in"), settings)  # type: ignore[arg-type]
    with pytest.raises(RemoteOrderRefused) as raised:
        require_allowed(machine("out"), settings)  # type: ignore[arg-type]
    assert len(raised.value.problems) == 1
    assert raised.value.hint is not None
