"""Full disks: a start that finds no room fails whole, and every end is still an end."""

import contextlib
import json
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from attrs import frozen

from hypervisor.tiny import rom_path
from kvmsec.linux import processes
from kvmsec.linux.errors import Fault
from kvmsec.linux.syscalls import mount, umount
from uidpool.errors import RecordNotWritten

pytestmark = pytest.mark.kvm

PAGE = os.sysconf("SC_PAGE_SIZE")
PAGES = 128
INODES = 96
RESTING = "[uids]\nreuse_delay_s = 600\n"


@frozen
class Small:
    """A small filesystem, and how it is filled up to so many free pages or inodes."""

    place: Path

    @property
    def _ballast(self) -> Path:
        return self.place / "ballast"

    def leave_pages(self, count: int) -> None:
        self.empty()
        self._ballast.mkdir()
        free = os.statvfs(self.place).f_bavail
        with (self._ballast / "pages").open("wb") as file:
            if free > count:
                os.posix_fallocate(file.fileno(), 0, (free - count) * PAGE)

    def leave_inodes(self, count: int) -> None:
        self.empty()
        self._ballast.mkdir()
        for number in range(os.statvfs(self.place).f_favail - count):
            (self._ballast / str(number)).touch()

    def empty(self) -> None:
        shutil.rmtree(self._ballast, ignore_errors=True)


@pytest.fixture
def shrink() -> Iterator[Callable[[Path], Small]]:
    """Puts what a directory holds on a filesystem that has little room."""
    mounted: list[Path] = []

    def make(place: Path) -> Small:
        before = {path: path.read_bytes() for path in place.rglob("*") if path.is_file()}
        folders = [path for path in place.rglob("*") if path.is_dir()]
        options = f"size={PAGES * PAGE},nr_inodes={INODES},mode=0700"
        mount("small", str(place), "tmpfs", 0, options)
        mounted.append(place)
        for folder in folders:
            folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        for path, content in before.items():
            path.write_bytes(content)
            path.chmod(0o600)
        return Small(place)

    yield make
    for place in reversed(mounted):
        umount(str(place))


PLACES = {
    "records": lambda lab: lab.paths.run,
    "leases": lambda lab: lab.paths.uid_leases,
    "rests": lambda lab: lab.paths.uid_state,
    "state": lambda lab: lab.paths.var,
    "log": lambda lab: lab.paths.log,
}


@pytest.fixture
def lab(make_lab: Callable[..., Any]) -> Any:
    made = make_lab(RESTING)
    made.start()  # so that every directory is there, and what QEMU can do is known
    made.stop()
    return made


def leftovers(lab: Any) -> dict[str, object]:
    found: dict[str, object] = lab.leftovers()
    found.pop("mounts", None)  # ours
    return found


@pytest.mark.parametrize("what", ["pages", "inodes"])
@pytest.mark.parametrize("where", PLACES)
def test_a_start_finds_room_or_leaves_nothing(
    lab: Any, shrink: Callable[[Path], Small], where: str, what: str
) -> None:
    place = PLACES[where](lab)
    disk = shrink(place)
    leave = getattr(disk, f"leave_{what}")
    for count in range(60):
        leave(count)
        try:
            pid = lab.start().pid
        except (OSError, Fault) as error:
            told = str(error)
            assert "No space left on device" in told
            assert str(place) in told, "which disk is full"
            assert leftovers(lab) == {}
        else:
            break
    leave(0)
    # Without room for a note of it a uid stays leased; its instance ends all the same.
    with contextlib.suppress(RecordNotWritten):
        lab.stop()
    assert processes.read_status(pid) is None
    lab.reconcile()
    disk.empty()
    lab.reconcile()
    assert leftovers(lab) == {}


def test_what_runs_goes_on_while_nothing_else_can_start(
    make_place: Callable[[str], Any], shrink: Callable[[Path], Small]
) -> None:
    place = make_place(RESTING)
    disk = shrink(place.lab.paths.run)
    pid = place.lab.start().pid
    disk.leave_pages(0)
    options = ("--memory", "1", "--firmware", str(rom_path()), "--accel", "tcg")
    refused = place.kvmsec("instance", "start", "other", *options)
    assert (refused.status, refused.out) == (1, "")
    assert refused.err.startswith(f"kvmsec: {place.lab.paths.run}")
    assert refused.err.splitlines()[0].endswith(": No space left on device")
    (listed,) = json.loads(place.kvmsec("instance", "list", "--json").out)
    assert (listed["name"], listed["state"], listed["pid"]) == ("web", "running", pid)
    with place.lab.line() as line:
        assert line.ask(b"ehello\n") == "ECHO hello"
    stopped = place.kvmsec("instance", "stop", "web")
    assert (stopped.status, stopped.err) == (0, "")
    disk.empty()
