"""The tree that jails get copies of: built once, and never something that QEMU's files were."""

import errno
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from hypervisor.closure import Binds, Closure
from hypervisor.jail import BootFile
from hypervisor.steps import JailFailed
from hypervisor.tree import Trees, build_tree
from kvmsec.linux import namespaces, syscalls
from kvmsec.linux.children import run_in_child
from tests.root.hypervisor.jailed import (
    PROGRAMS,
    Build,
    binds_of,
    build,
    closure_of,
    mounts_of,
    running,
    said,
    the_launcher_is_as_before,
)

__all__ = ["build", "the_launcher_is_as_before"]

pytestmark = [pytest.mark.root, pytest.mark.usefixtures("the_launcher_is_as_before")]


@pytest.fixture
def trees(tmp_path: Path) -> Iterator[Trees]:
    (tmp_path / "place").mkdir()
    trees = Trees(str(tmp_path / "place"))
    yield trees
    trees.close()


@pytest.fixture
def data(tmp_path: Path) -> Path:
    path = tmp_path / "data"
    path.write_text("old")
    return path


def with_data(data: Path) -> Closure:
    return closure_of((*binds_of(*PROGRAMS), (str(data), "/data")))


def seen_in(tree: int, path: str) -> Any:
    """The entries of a directory of the tree itself, or the words in a file of it."""

    def look() -> Any:
        syscalls.setns(tree, namespaces.CLONE_NEWNS)
        return sorted(os.listdir(path)) if os.path.isdir(path) else Path(path).read_text()

    return run_in_child(look, what="looking", timeout_s=20, keep=[tree])


def descriptors() -> set[str]:
    return set(os.listdir("/proc/self/fd"))


def test_one_tree_is_for_all_while_its_files_stay(trees: Trees, data: Path) -> None:
    first = trees.of(with_data(data))
    before = descriptors()
    assert trees.of(with_data(data)) == first
    assert descriptors() == before
    assert not os.get_inheritable(first)
    assert trees.of(closure_of(binds_of(*PROGRAMS))) != first, "other files are another tree"


def test_it_holds_what_it_was_given_and_places_for_the_rest(trees: Trees, data: Path) -> None:
    tree = trees.of(closure_of(((str(data), "/somewhere/data"),)))
    assert seen_in(tree, "/") == ["boot", "dev", "output", "somewhere"]
    assert seen_in(tree, "/somewhere/data") == "old"
    assert [seen_in(tree, place) for place in ("/boot", "/dev", "/output")] == [[], [], []]


def test_nothing_of_it_is_mounted_on_the_node(trees: Trees, data: Path) -> None:
    before = Path("/proc/self/mountinfo").read_text()
    tree = trees.of(with_data(data))
    assert Path("/proc/self/mountinfo").read_text() == before
    assert os.readlink(f"/proc/self/fd/{tree}") != os.readlink("/proc/self/ns/mnt")


def test_what_one_jail_mounts_no_other_sees_nor_the_tree(build: Build, trees: Trees) -> None:
    firmware = os.memfd_create("firmware")
    os.write(firmware, b"its own")
    tree = trees.of(closure_of(binds_of(*PROGRAMS)))
    first = build(tree=tree, boot_files=(BootFile(firmware, 7, "firmware"),))
    with running(first, "/bin/sleep", "60") as one:
        with running(build(tree=tree), "/bin/sleep", "60") as other:
            assert {"ro", "nosuid", "nodev", "noexec"} <= mounts_of(one)["/boot"][0]
            assert "/boot" not in mounts_of(other)
            assert os.listdir(f"/proc/{one}/root/boot") == ["firmware"]
            assert os.listdir(f"/proc/{other}/root/boot") == []
            outputs = [os.stat(f"/proc/{pid}/root/output").st_dev for pid in (one, other)]
            devices = [os.stat(f"/proc/{pid}/root/dev").st_dev for pid in (one, other)]
        assert outputs[0] != outputs[1]
        assert devices[0] != devices[1]
        assert [seen_in(tree, place) for place in ("/boot", "/dev", "/output")] == [[], [], []]
    os.close(firmware)


def test_a_file_that_is_replaced_is_another_one_in_the_next_jail(
    build: Build, trees: Trees, data: Path
) -> None:
    before = trees.of(with_data(data))
    with running(build(tree=before), "/bin/sleep", "60") as pid:
        (data.parent / "new").write_text("new")
        os.rename(data.parent / "new", data)
        assert Path(f"/proc/{pid}/root/data").read_text() == "old"
        after = trees.of(with_data(data))
        assert after != before
        assert said(build(tree=after), "/bin/cat", "/data") == (0, "new")


def test_a_file_that_is_written_to_is_so_in_the_tree(
    build: Build, trees: Trees, data: Path
) -> None:
    tree = trees.of(with_data(data))
    data.write_text("edited")
    assert said(build(tree=tree), "/bin/cat", "/data") == (0, "edited")


def test_a_file_that_another_is_mounted_on_is_that_one_in_the_next_jail(
    build: Build, trees: Trees, data: Path, tmp_path: Path
) -> None:
    before = trees.of(with_data(data))
    (tmp_path / "cover").write_text("cover")
    namespaces.mount(str(tmp_path / "cover"), str(data), None, namespaces.MS_BIND)
    try:
        after = trees.of(with_data(data))
        assert said(build(tree=after), "/bin/cat", "/data") == (0, "cover")
    finally:
        namespaces.umount(str(data), namespaces.MNT_DETACH)
    assert trees.of(with_data(data)) == before


def test_a_handful_is_kept_and_the_one_that_rested_longest_goes(
    trees: Trees, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    built: list[str] = []

    def build_and_note(binds: Binds, mount_point: str) -> int:
        built.append(Path(binds[0][0]).name)
        return build_tree(binds, mount_point)

    monkeypatch.setattr("hypervisor.tree.build_tree", build_and_note)
    for name in "abcde":
        (tmp_path / name).touch()
    before = len(descriptors())
    for name in "abcdaeab":  # At the e there are four, and b has rested longest.
        trees.of(closure_of(((str(tmp_path / name), "/file"),)))
    assert "".join(built) == "abcdeb"
    assert len(descriptors()) == before + 4


def test_a_jail_that_stands_outlives_the_tree(build: Build, trees: Trees, data: Path) -> None:
    before = descriptors()
    tree = trees.of(with_data(data))
    with running(build(tree=tree), "/bin/sleep", "60") as pid:
        trees.close()
        assert Path(f"/proc/{pid}/root/data").read_text() == "old"
    trees.close()
    assert trees.of(with_data(data)) >= 0, "it can be used again"
    trees.close()
    assert len(descriptors() - before) <= 2, "those of the jail's that the fixture closes"


@pytest.mark.parametrize(
    ("binds", "mount_point", "step", "number"),
    [
        ((), "/nowhere", "root", errno.ENOENT),
        ((("/nowhere", "/file"),), "/mnt", "programs", errno.ENOENT),
        ((("/etc/hostname", "/dev"),), "/mnt", "programs", errno.EEXIST),
        ((("/etc/hostname", "/a"), ("/etc/hostname", "/a/b")), "/mnt", "programs", errno.EEXIST),
    ],
)
def test_one_that_can_not_be_built_is_told_by_its_step(
    binds: Binds, mount_point: str, step: str, number: int
) -> None:
    before = descriptors()
    with pytest.raises(JailFailed) as raised:
        build_tree(binds, mount_point)
    assert (raised.value.step, raised.value.errno) == (step, number)
    assert descriptors() == before


def test_without_the_right_to_mount_it_says_who_has_to_run_it() -> None:
    def attempt() -> list[str | None]:
        syscalls.set_capabilities(0, 0, 0)
        try:
            build_tree((), "/mnt")
        except JailFailed as error:
            return [error.step, error.hint]
        return []

    step, hint = run_in_child(attempt, what="building", timeout_s=20)
    assert step == "mount namespace"
    assert "as root" in hint
