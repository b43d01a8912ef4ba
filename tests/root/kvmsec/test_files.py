"""Files whole or absent on a full disk, and paths that only root can steer."""

import errno
import os
import stat
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from kvmsec.linux import files, namespaces
from kvmsec.linux.errors import UntrustedPath

pytestmark = pytest.mark.root

SOMEBODY = 239903
WRITERS: list[Callable[..., None]] = [
    files.write_atomically,
    files.replace_atomically,
    files.create_exclusively,
]


@pytest.fixture
def tiny(tmp_path: Path) -> Iterator[Path]:
    """A filesystem of 32 KiB."""
    namespaces.mount("tiny", str(tmp_path), "tmpfs", 0, "size=32k,nr_inodes=8")
    yield tmp_path
    namespaces.umount(str(tmp_path), namespaces.MNT_DETACH)


@pytest.fixture
def trusted(tmp_path: Path) -> Path:
    """A directory of root's below directories of root's; /tmp is the sandbox's own."""
    directory = tmp_path / "t"
    directory.mkdir(mode=0o755)
    for step in (directory, *directory.parents[:-2]):
        step.chmod(0o755)
    return directory


@pytest.mark.parametrize("write", WRITERS)
def test_a_full_disk_leaves_no_half_file_and_no_temporary_one(
    write: Callable[..., None], tiny: Path
) -> None:
    with pytest.raises(OSError) as raised:
        write(tiny / "file", b"x" * 40_000)
    assert raised.value.errno == errno.ENOSPC
    assert os.listdir(tiny) == []


@pytest.mark.parametrize("write", WRITERS[:2])
def test_a_full_disk_leaves_the_old_content(write: Callable[..., None], tiny: Path) -> None:
    write(tiny / "file", b"old" * 1000)
    with pytest.raises(OSError, match="No space"):
        write(tiny / "file", b"new" * 10_000)
    assert (tiny / "file").read_bytes() == b"old" * 1000
    assert os.listdir(tiny) == ["file"]


@pytest.mark.parametrize("write", WRITERS)
def test_no_inode_left_is_an_error_that_leaves_nothing(
    write: Callable[..., None], tiny: Path
) -> None:
    fillers = []
    with pytest.raises(OSError, match="No space"):
        for number in range(20):
            (tiny / str(number)).touch()
            fillers.append(str(number))
    with pytest.raises(OSError, match="No space"):
        write(tiny / "file", b"x")
    assert sorted(os.listdir(tiny)) == sorted(fillers)


def plain(directory: Path) -> Path:
    path = directory / "file"
    path.touch(mode=0o644)
    return path


def test_roots_own_file_is_trusted(trusted: Path) -> None:
    files.require_trusted(plain(trusted))
    files.require_trusted(trusted)
    files.require_trusted(Path("/"))


def test_a_missing_one_is_an_oserror(trusted: Path) -> None:
    with pytest.raises(FileNotFoundError):
        files.require_trusted(trusted / "missing")
    (trusted / "dangling").symlink_to("missing")
    with pytest.raises(FileNotFoundError):
        files.require_trusted(trusted / "dangling")


def refused(path: Path, culprit: Path) -> None:
    with pytest.raises(UntrustedPath) as raised:
        files.require_trusted(path)
    assert raised.value.path == culprit


@pytest.mark.parametrize("mode", [0o664, 0o646, 0o666, 0o1666])
def test_a_file_that_others_may_write_is_refused(trusted: Path, mode: int) -> None:
    path = plain(trusted)
    path.chmod(mode)
    refused(path, path)


@pytest.mark.parametrize("spoil", ["owner", "group", "others"])
def test_a_directory_above_that_others_may_change_is_refused(trusted: Path, spoil: str) -> None:
    above = trusted / "above"
    (above / "between").mkdir(parents=True)
    path = plain(above / "between")
    if spoil == "owner":
        os.chown(above, SOMEBODY, 0)
    else:
        above.chmod(0o775 if spoil == "group" else 0o757)
    refused(path, above)


def test_an_access_list_that_lets_somebody_write_is_refused(trusted: Path) -> None:
    path = plain(trusted)
    # acl(5) in its binary form: version 2, then user::rw- user:SOMEBODY:rw- group mask other.
    entries = [(1, 6, None), (2, 6, SOMEBODY), (4, 4, None), (0x10, 6, None), (0x20, 4, None)]
    value = (2).to_bytes(4, "little") + b"".join(
        tag.to_bytes(2, "little")
        + rights.to_bytes(2, "little")
        + (0xFFFFFFFF if who is None else who).to_bytes(4, "little")
        for tag, rights, who in entries
    )
    try:
        os.setxattr(path, "system.posix_acl_access", value)
    except OSError as error:
        if error.errno != errno.ENOTSUP:
            raise
        pytest.skip("this kernel's tmpfs has no access lists")
    refused(path, path)


def test_a_sticky_directory_may_stand_above_but_is_not_trusted_itself(trusted: Path) -> None:
    sticky = trusted / "sticky"
    sticky.mkdir()
    sticky.chmod(0o1777)
    files.require_trusted(plain(sticky))
    refused(sticky, sticky)
    (trusted / "link").symlink_to(sticky)
    refused(trusted / "link", sticky)


def test_somebodys_link_in_a_sticky_directory_is_refused(trusted: Path) -> None:
    sticky = trusted / "sticky"
    sticky.mkdir()
    sticky.chmod(0o1777)
    link = sticky / "link"
    link.symlink_to(plain(trusted))
    files.require_trusted(link)
    os.chown(link, SOMEBODY, 0, follow_symlinks=False)
    refused(link, link)


def test_a_chain_of_links_is_held_to_the_rule_at_each_end(trusted: Path) -> None:
    open_directory = trusted / "open"
    open_directory.mkdir()
    target = plain(trusted)
    (open_directory / "second").symlink_to(target)
    (trusted / "first").symlink_to("open/second")
    files.require_trusted(trusted / "first")
    open_directory.chmod(0o777)
    refused(trusted / "first", open_directory)


def test_dots_after_a_link_are_taken_as_the_kernel_takes_them(trusted: Path) -> None:
    """`near/../file` is not in the directory that holds `near` when that is a link."""
    (trusted / "bad" / "deep").mkdir(parents=True)
    (trusted / "bad").chmod(0o777)
    (trusted / "bad" / "file").touch(mode=0o644)
    (trusted / "file").touch(mode=0o644)
    (trusted / "near").symlink_to("bad/deep")
    refused(Path(f"{trusted}/near/../file"), trusted / "bad")
    (trusted / "outer").symlink_to("near/../file")
    refused(trusted / "outer", trusted / "bad")


def test_links_that_lead_in_a_circle_are_an_error(trusted: Path) -> None:
    (trusted / "a").symlink_to("b")
    (trusted / "b").symlink_to("a")
    with pytest.raises(OSError) as raised:
        files.require_trusted(trusted / "a")
    assert raised.value.errno == errno.ELOOP


def test_a_relative_path_is_judged_from_where_the_process_is(
    trusted: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain(trusted)
    monkeypatch.chdir(trusted)
    files.require_trusted(Path("file"))
    trusted.chmod(0o777)
    refused(Path("file"), trusted)


def test_somebodys_directory_is_not_taken_for_private(trusted: Path) -> None:
    theirs = trusted / "theirs"
    theirs.mkdir()
    os.chown(theirs, SOMEBODY, 0)
    with pytest.raises(UntrustedPath):
        files.make_private_directory(theirs)
    assert stat.S_IMODE(theirs.stat().st_mode) == 0o755
