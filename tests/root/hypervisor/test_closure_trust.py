"""What QEMU is made of is root's alone to change, also while a package of it is upgraded."""

import itertools
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest

from hypervisor.closure import Closure, find_closure, require_trusted_parts
from hypervisor.features import find_qemu
from kvmsec.linux import command
from kvmsec.linux.credentials import Credentials
from kvmsec.linux.errors import UntrustedPath

pytestmark = pytest.mark.kvm

NOBODY = Credentials(230002, 230002)


def test_a_part_that_others_may_change_is_refused() -> None:
    qemu = find_qemu(None, None)
    closure = find_closure(qemu, accelerator="tcg", credentials=NOBODY)
    data = next(Path(source) for source, _ in closure.binds if Path(source).is_dir())
    # In a mount of its own over the directory, so that the host's files stay as they are.
    command.run(["mount", "-t", "tmpfs", "-o", "mode=755", "data", str(data)], timeout_s=10)
    try:
        (data / "bios.bin").touch(mode=0o644)
        require_trusted_parts(closure)
        for mode in (0o646, 0o664):  # Which changes nothing about the directory.
            (data / "bios.bin").chmod(mode)
            with pytest.raises(UntrustedPath, match=r"bios\.bin"):
                require_trusted_parts(closure)
    finally:
        command.run(["umount", str(data)], timeout_s=10)


def after_listing(
    directory: Path, act: Callable[[], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Have something done each time that a directory was listed, before its entries are seen."""
    scandir = os.scandir

    @contextmanager
    def listed(path: str) -> Iterator[list[os.DirEntry[str]]]:
        with scandir(path) as entries:
            found = list(entries)
        if path == str(directory):
            act()
        yield found

    monkeypatch.setattr(os, "scandir", listed)


@pytest.mark.parametrize("mode", [0o644, 0o646])
def test_a_part_that_is_renamed_while_it_is_looked_at_is_looked_at_by_its_new_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, mode: int
) -> None:
    """As dpkg does with each file of a package that it upgrades."""
    new = tmp_path / "firmware" / "bios.bin.dpkg-new"
    new.parent.mkdir()
    new.touch()
    new.chmod(mode)

    def rename() -> None:
        with suppress(FileNotFoundError):
            new.rename(new.with_suffix(""))

    after_listing(new.parent, rename, monkeypatch)
    closure = Closure("/qemu", ((str(tmp_path), "/usr/share/qemu"),))
    if mode == 0o644:
        require_trusted_parts(closure)
    else:
        with pytest.raises(UntrustedPath, match=r"bios\.bin can be written by others"):
            require_trusted_parts(closure)
    assert not new.exists()


def test_parts_that_are_never_there_any_more_are_an_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    names = (tmp_path / str(number) for number in itertools.count())
    present = next(names)
    present.touch()

    def rename() -> None:
        nonlocal present
        present = present.rename(next(names))

    after_listing(tmp_path, rename, monkeypatch)
    with pytest.raises(FileNotFoundError, match=str(tmp_path)):
        require_trusted_parts(Closure("/qemu", ((str(tmp_path), "/usr/share/qemu"),)))


@pytest.fixture
def folder() -> Iterator[Path]:
    """A directory that is root's with all above it."""
    path = Path("/run/kvmsec-folder")
    (path / "inner").mkdir(mode=0o755, parents=True)
    path.chmod(0o755)
    yield path
    shutil.rmtree(path)


def parts_in(*folders: Path) -> Closure:
    """A program of two parts, one of which nobody could replace."""
    for one in folders:
        (one / "part").touch(mode=0o644)
    own = [(str(one / "part"), f"/{number}") for number, one in enumerate(folders)]
    return Closure("/0", (*own, ("/usr/bin/env", "/env")))


@pytest.mark.parametrize("where", ["", "inner"])
def test_a_part_whose_directory_others_may_write_is_refused(folder: Path, where: str) -> None:
    closure = parts_in(folder / "inner")
    require_trusted_parts(closure)
    (folder / where).chmod(0o757)
    with pytest.raises(UntrustedPath, match="can be written by others"):
        require_trusted_parts(closure)
    (folder / where).chmod(0o755)
    os.chown(folder / where, NOBODY.uid, 0)
    with pytest.raises(UntrustedPath, match=f"belongs to uid {NOBODY.uid}"):
        require_trusted_parts(closure)


def test_a_sticky_directory_may_stand_above_a_part_and_hold_none(folder: Path) -> None:
    closure = parts_in(folder / "inner")
    folder.chmod(0o1777)
    require_trusted_parts(closure)
    with pytest.raises(UntrustedPath, match=rf"{folder} can be written by others"):
        require_trusted_parts(parts_in(folder, folder / "inner"))


def test_a_directory_that_is_a_link_by_now_is_followed_to_where_it_leads(folder: Path) -> None:
    (folder / "open/target").mkdir(parents=True)
    closure = parts_in(folder / "inner", folder / "open/target")
    shutil.rmtree(folder / "inner")
    (folder / "inner").symlink_to("open/target")
    require_trusted_parts(closure)
    (folder / "open").chmod(0o757)
    with pytest.raises(UntrustedPath, match="open can be written by others"):
        require_trusted_parts(parts_in(folder / "inner"))
