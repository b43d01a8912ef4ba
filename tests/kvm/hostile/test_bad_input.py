"""Names, definitions and disks that no instance may have: said in two lines, nothing left."""

import json
import os
import struct
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from hypervisor.images.errors import BackingMismatch, HeaderRefused, ImageNotOpened, NotAnImage
from hypervisor.tiny import rom_path
from kvmsec.errors import BadName
from kvmsec.linux.errors import Fault
from kvmsec.node.boot_files import BootFileRefused
from kvmsec.node.images_in_use import ImageInUse

pytestmark = pytest.mark.kvm

Make = Callable[[Path], object]
TINY = ("--memory", "1", "--accel", "tcg", "--firmware", str(rom_path()))
NOBODY = 65534


# Names -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name", ["../x", "-x", "a\nb", "a" * 4096, "", "a/b", "A", ".", "\x1b[31m"]
)
def test_a_name_that_is_none_is_refused(place: Any, name: str) -> None:
    with place.unchanged():
        said = place.kvmsec("instance", "start", *TINY, "--", name).refused(status=2)
        place.kvmsec("instance", "stop", "--", name).refused(status=2)
    assert "\x1b" not in said
    assert "is not a name for an instance" in said


def test_a_name_is_checked_again_where_it_becomes_a_path(place: Any) -> None:
    for act in ("stop", "info", "log", "reboot"):
        with pytest.raises(BadName):
            place.lab.run(lambda node, act=act: getattr(node, act)("../../etc"))


def test_an_unknown_instance_is_an_error_and_not_a_stop(place: Any) -> None:
    with place.unchanged():
        for act in ("stop", "info", "log", "reboot", "console"):
            place.kvmsec("instance", act, "nobody").refused("there is no instance nobody")


# Definitions -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("memory_mib = 1\nmemroy = 2\nfirmwar = 'x'\n", ("memroy", "firmwar")),
        ("memory_mib = 'much'\nvcpus = 0\n", ("memory_mib", "vcpus")),
        ("memory_mib = 1\nname = 'other'\n", ("name",)),
        ("memory_mib = 1\nsecurity_model = 'pool'\nsecurity_domain = 'nobody'\n", ("domain",)),
        ("memory_mib = 1\n[[disks]]\npath = 'relative'\n", ("disks[0].path",)),
        ("memory_mib = \n", ("line 1",)),
        ("\0\1\2", ()),
        ("[" * 100_000, ()),
    ],
)
def test_a_definition_with_faults_is_refused_with_all_of_them(
    place: Any, text: str, words: tuple[str, ...]
) -> None:
    spec = place.lab.root / "web.toml"
    spec.write_text(text)
    with place.unchanged():
        done = place.kvmsec("instance", "start", "web", "--spec", spec)
    assert (done.status, done.out) == (1, "")
    assert done.err.startswith(f"kvmsec: {spec}:")
    assert "Traceback" not in done.err and "unexpected" not in done.err
    for word in words:
        assert word in done.err


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (os.mkfifo, "it is not a regular file"),
        (Path.mkdir, "it is not a regular file"),
        (lambda path: path.symlink_to("/dev/zero"), "it is not a regular file"),
        (lambda path: path.write_bytes(b"#" * 5_000_000), "it is larger than 1048576 bytes"),
        (lambda path: None, "No such file or directory"),
    ],
)
def test_a_definition_that_is_no_file_of_a_sane_size_is_refused(
    place: Any, make: Make, words: str
) -> None:
    spec = place.lab.root / "web.toml"
    make(spec)
    with place.unchanged():
        done = place.kvmsec("instance", "start", "web", "--spec", spec)
    assert (done.status, done.out) == (1, "")
    assert done.err.startswith(f"kvmsec: {spec}: ")
    assert words in done.err


def test_a_kept_definition_that_others_may_write_is_refused(place: Any) -> None:
    kept = place.lab.paths.definition("web")
    kept.write_text("memory_mib = 1\n")
    kept.chmod(0o666)
    with place.unchanged():
        place.kvmsec("instance", "start", "web").refused(str(kept), "can be written by others")


# Disks -------------------------------------------------------------------------------------------


def qcow2(*options: str, cut_to: int | None = None, l1_offset: int | None = None) -> Make:
    """Makes an image of 1 MiB, and spoils it (QEMU, docs/interop/qcow2.txt)."""

    def make(path: Path) -> None:
        argv = ["qemu-img", "create", "-q", "-f", "qcow2", "-u"]
        filled = [option.replace("PATH", str(path)) for option in options]
        subprocess.run([*argv, *filled, str(path), "1M"], check=True)
        if cut_to is not None:
            os.truncate(path, cut_to)
        if l1_offset is not None:
            with path.open("r+b") as file:
                file.seek(40)
                file.write(struct.pack(">Q", l1_offset))

    return make


def backed_by(name: str) -> Make:
    return qcow2("-F", "raw", "-b", name)


@pytest.mark.parametrize(
    ("make", "format_", "kind", "words"),
    [
        (lambda path: None, "raw", ImageNotOpened, "No such file"),
        (Path.mkdir, "raw", NotAnImage, "is a directory"),
        (os.mkfifo, "raw", NotAnImage, "is a FIFO"),
        (lambda path: path.symlink_to("/etc/shadow"), "raw", ImageNotOpened, "a symbolic link"),
        (backed_by("/etc/shadow"), "qcow2", BackingMismatch, "/etc/shadow"),
        (backed_by('json:{"driver":"file"}'), "qcow2", BackingMismatch, "as JSON"),
        (backed_by("nbd://127.0.0.1/x"), "qcow2", BackingMismatch, "protocol"),
        (qcow2("-o", "data_file=PATH.data"), "qcow2", HeaderRefused, "an external file"),
        (qcow2(cut_to=50), "qcow2", HeaderRefused, ""),
        (qcow2(cut_to=0), "qcow2", HeaderRefused, ""),
        (qcow2(cut_to=65536), "qcow2", HeaderRefused, "behind the end"),
        (qcow2(l1_offset=1 << 40), "qcow2", HeaderRefused, "behind the end"),
        (lambda path: path.write_bytes(b"MZ" * 512), "qcow2", HeaderRefused, ""),
    ],
)
def test_a_disk_that_is_none_is_refused(
    place: Any, make: Make, format_: str, kind: type[Fault], words: str
) -> None:
    path = place.lab.root / "disk"
    make(path)
    error = place.refused(kind, disks=[{"path": str(path), "format": format_}])
    assert str(path) in error.message
    assert words in error.message


def test_the_command_says_of_a_disk_what_the_library_does(place: Any) -> None:
    disk = place.lab.root / "disk"
    disk.mkdir()
    error = place.refused(NotAnImage, disks=[{"path": str(disk)}])
    said = place.kvmsec("instance", "start", "web", *TINY, "--disk", f"{disk},format=raw")
    assert (said.status, said.err.splitlines()[0]) == (1, f"kvmsec: {error.message}")


def test_what_was_opened_is_what_the_guest_gets_whatever_is_swapped_in_later(place: Any) -> None:
    disk = place.lab.disk()
    definition = place.lab.definition(disks=[{"path": str(disk), "device": "ide"}])
    before = Path("/etc/shadow").read_bytes()

    def swap(step: str) -> None:
        if step == "jail":
            disk.rename(disk.with_name("moved"))
            disk.symlink_to("/etc/shadow")

    place.lab.run(lambda node: node.start(definition), on_step=swap)
    with place.lab.line() as line:
        line.ask(b"w")
    place.lab.stop()
    assert any(disk.with_name("moved").read_bytes())
    assert Path("/etc/shadow").read_bytes() == before


def test_a_disk_that_another_instance_has_is_refused_by_whatever_name(place: Any) -> None:
    disk = place.lab.disk()
    os.link(disk, disk.with_name("other-name"))
    place.lab.start("one", disks=[{"path": str(disk)}])
    for path in (disk, disk.with_name("other-name")):
        for more in ({}, {"readonly": True}):
            error = place.refused(ImageInUse, "two", disks=[{"path": str(path), **more}])
            assert error.holder == "one"
    place.lab.stop("one")
    place.lab.start("two", disks=[{"path": str(disk)}])
    place.lab.stop("two")


def test_of_two_starts_at_once_one_gets_the_disk(place: Any) -> None:
    disk = place.lab.disk()
    argv = [place.command("instance", "start", name, *TINY, "--disk", str(disk)) for name in "ab"]
    rivals = [subprocess.Popen(one, stderr=subprocess.PIPE, text=True) for one in argv]
    said = [rival.communicate(timeout=60)[1] for rival in rivals]
    assert sorted(rival.returncode for rival in rivals) == [0, 1]
    assert "is in use by the instance" in "".join(said)
    (runs,) = place.lab.instances()
    place.lab.stop(runs)


def test_of_two_starts_of_one_instance_one_is_refused(place: Any) -> None:
    argv = place.command("instance", "start", "web", *TINY)
    rivals = [subprocess.Popen(argv, stderr=subprocess.PIPE, text=True) for _ in range(2)]
    said = [rival.communicate(timeout=60)[1] for rival in rivals]
    assert sorted(rival.returncode for rival in rivals) == [0, 1]
    assert "the instance web runs already" in "".join(said)
    assert len(place.lab.claims.leases()) == 1
    place.lab.stop()


def test_a_firmware_that_is_a_link_or_no_file_is_refused(place: Any) -> None:
    folder, link = place.lab.root / "folder", place.lab.root / "link"
    folder.mkdir()
    link.symlink_to(rom_path())
    for path in (folder, link, place.lab.root / "missing", Path("/dev/zero")):
        assert str(path) in place.refused(BootFileRefused, firmware=str(path)).message


# Users -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "arguments",
    [
        ("instance", "start", "web", *TINY),
        ("instance", "stop", "web"),
        ("instance", "list"),
        ("cluster", "modify", "--add-uids", "246000"),
        ("cluster", "info"),
        ("uids", "provision", "246000"),
        ("uids", "release", "246000"),
        ("firewall", "remove"),
        ("firewall", "show"),
    ],
)
def test_without_root_nothing_is_done(place: Any, arguments: tuple[str, ...]) -> None:
    with place.unchanged():
        place.kvmsec(*arguments, user=NOBODY).refused("root")


def test_a_json_listing_stays_one_document_whatever_went_wrong_before(place: Any) -> None:
    place.kvmsec("instance", "start", "web", *TINY, "--disk", "/nowhere").refused("/nowhere")
    assert json.loads(place.kvmsec("instance", "list", "--json").out) == []
