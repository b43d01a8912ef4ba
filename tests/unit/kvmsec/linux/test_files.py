"""Files that are whole or absent, and paths in which no link is followed."""

import errno
import os
import stat
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from kvmsec.linux import files
from kvmsec.linux.errors import UntrustedPath

WRITERS: list[Callable[..., None]] = [
    files.write_atomically,
    files.replace_atomically,
    files.create_exclusively,
]


@pytest.fixture(autouse=True)
def no_descriptor_is_left() -> Iterator[None]:
    before = set(os.listdir("/proc/self/fd"))
    yield
    assert set(os.listdir("/proc/self/fd")) == before


@pytest.mark.parametrize("write", WRITERS)
@pytest.mark.parametrize("umask", [0o000, 0o077, 0o777])
def test_what_is_written_is_its_writers_alone_whatever_the_umask_is(
    write: Callable[..., None], umask: int, tmp_path: Path
) -> None:
    before = os.umask(umask)
    try:
        write(tmp_path / "private", b"1")
    finally:
        os.umask(before)
    assert (tmp_path / "private").read_bytes() == b"1"
    assert stat.S_IMODE((tmp_path / "private").stat().st_mode) == 0o600
    assert os.listdir(tmp_path) == ["private"]


def test_what_is_there_is_replaced_or_kept_as_the_name_says(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"old")
    with pytest.raises(FileExistsError):
        files.create_exclusively(path, b"new")
    assert path.read_bytes() == b"old"
    files.write_atomically(path, b"new")
    assert path.read_bytes() == b"new"
    files.replace_atomically(path, b"newer")
    assert path.read_bytes() == b"newer"
    assert os.listdir(tmp_path) == ["file"]


@pytest.mark.parametrize("write", WRITERS[:2])
def test_a_link_is_replaced_and_not_written_through(
    write: Callable[..., None], tmp_path: Path
) -> None:
    (tmp_path / "other").write_bytes(b"untouched")
    (tmp_path / "link").symlink_to("other")
    write(tmp_path / "link", b"mine")
    assert (tmp_path / "other").read_bytes() == b"untouched"
    assert not (tmp_path / "link").is_symlink()


@pytest.mark.parametrize("write", WRITERS)
@pytest.mark.parametrize("call", ["write", "fchmod", "fsync", "rename", "link", "fsync directory"])
def test_whatever_call_fails_nothing_half_done_is_left(
    write: Callable[..., None], call: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*arguments: object, **_: object) -> None:
        is_directory = isinstance(arguments[0], int) and stat.S_ISDIR(
            os.fstat(arguments[0]).st_mode
        )
        if call.startswith("fsync") and is_directory != call.endswith("directory"):
            return
        raise OSError(errno.EIO, "Input/output error")

    if call == "rename":
        monkeypatch.setattr(Path, "rename", fail)
    else:
        monkeypatch.setattr(f"kvmsec.linux.files.os.{call.split()[0]}", fail)
    failed = False
    try:
        write(tmp_path / "file", b"content")
    except OSError:
        failed = True
    monkeypatch.undo()
    left = os.listdir(tmp_path)
    if write is files.write_atomically and call == "fsync directory":
        assert left == ["file"]  # Whole, but a power cut may take it back: that is said.
    else:
        assert left == ([] if failed else ["file"])


def test_a_short_write_is_carried_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write = os.write
    monkeypatch.setattr(
        "kvmsec.linux.files.os.write", lambda descriptor, data: write(descriptor, data[:3])
    )
    files.write_atomically(tmp_path / "file", b"0123456789")
    assert (tmp_path / "file").read_bytes() == b"0123456789"


def test_reading_is_bounded(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"x" * 100)
    assert files.read_bounded(path, 100) == b"x" * 100
    with pytest.raises(ValueError, match="larger than 99 bytes"):
        files.read_bounded(path, 99)
    with pytest.raises(ValueError, match="larger"):
        files.read_bounded(Path("/dev/zero"), 3 << 20)
    descriptor = os.open(path, os.O_RDONLY)
    assert files.read_bounded(descriptor, 1000) == b"x" * 100
    os.fstat(descriptor)  # The caller's, still open.
    os.close(descriptor)


def test_removing_what_is_not_there_is_fine(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    assert files.remove_file(tmp_path / "file")
    assert not files.remove_file(tmp_path / "file")


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    (tmp_path / "real" / "inner").mkdir(parents=True)
    (tmp_path / "real" / "file").write_bytes(b"content")
    (tmp_path / "secret").write_bytes(b"secret")
    (tmp_path / "link").symlink_to("real")
    (tmp_path / "real" / "link").symlink_to("../secret")
    (tmp_path / "real" / "magic").symlink_to("/proc/self/exe")
    return tmp_path


@pytest.mark.parametrize("name", ["link/file", "real/link", "link", "real/magic"])
def test_no_link_is_followed_wherever_it_stands(tree: Path, name: str) -> None:
    with pytest.raises(OSError) as raised:
        files.open_without_links(tree / name, os.O_RDONLY)
    assert raised.value.errno == errno.ELOOP
    assert raised.value.filename == str(tree / name)


def test_no_magic_link_of_proc_is_followed(tree: Path) -> None:
    descriptor = os.open(tree, os.O_RDONLY)
    try:
        with pytest.raises(OSError) as raised:
            files.open_without_links(Path(f"/proc/self/fd/{descriptor}/secret"), os.O_RDONLY)
        assert raised.value.errno == errno.ELOOP
    finally:
        os.close(descriptor)


def test_what_is_opened_is_close_on_exec(tree: Path) -> None:
    descriptor = files.open_without_links(tree / "real" / "file", os.O_RDONLY)
    assert not os.get_inheritable(descriptor)
    assert os.read(descriptor, 100) == b"content"
    os.close(descriptor)


@pytest.mark.parametrize(
    ("name", "number"),
    [
        ("../secret", errno.EXDEV),
        ("inner/../../secret", errno.EXDEV),
        ("/etc/passwd", errno.EXDEV),
        ("link", errno.ELOOP),
        ("missing", errno.ENOENT),
    ],
)
def test_nothing_outside_a_directory_is_opened_below_it(tree: Path, name: str, number: int) -> None:
    directory = os.open(tree / "real", os.O_RDONLY)
    try:
        with pytest.raises(OSError) as raised:
            files.open_without_links(Path(name), os.O_RDONLY, directory=directory)
        assert raised.value.errno == number
        inside = files.open_without_links(Path("inner/../file"), os.O_RDONLY, directory=directory)
        os.close(inside)
    finally:
        os.close(directory)


@pytest.mark.parametrize("umask", [0o000, 0o027, 0o077, 0o777])
def test_a_private_directory_is_the_callers_alone(tmp_path: Path, umask: int) -> None:
    if umask == 0o777 and os.geteuid() != 0:
        pytest.skip("a parent that its owner can't enter")
    path = tmp_path / "a" / "b"
    before = os.umask(umask)
    try:
        files.make_private_directory(path)
        files.make_private_directory(path)
    finally:
        os.umask(before)
    assert stat.S_IMODE(path.stat().st_mode) == 0o700
    path.chmod(0o755)
    files.make_private_directory(path)
    assert stat.S_IMODE(path.stat().st_mode) == 0o700


@pytest.mark.parametrize("kind", ["file", "link"])
def test_what_is_no_directory_is_not_taken_for_one(tmp_path: Path, kind: str) -> None:
    path = tmp_path / "place"
    if kind == "file":
        path.touch(mode=0o644)
    else:
        (tmp_path / "elsewhere").mkdir(mode=0o755)
        path.symlink_to("elsewhere")
    with pytest.raises(UntrustedPath, match="is not a directory"):
        files.make_private_directory(path)
    if kind == "link":
        assert stat.S_IMODE((tmp_path / "elsewhere").stat().st_mode) == 0o755
