"""The tree that jails get copies of: built once, and never something that QEMU's files were."""

import contextlib
import errno
import os
import resource
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from hypervisor.closure import Binds, Closure
from hypervisor.errors import JailFailed
from hypervisor.jail import BootFile
from hypervisor.steps import Step
from hypervisor.tree import STEPS, Trees, build_tree
from kvmsec.linux import namespaces, syscalls
from kvmsec.linux.children import run_in_child
from kvmsec.linux.errors import ChildFailed, ChildTimedOut
from tests.root.hypervisor.jailed import (
    PROGRAMS,
    Build,
    binds_of,
    closure_of,
    mounts_of,
    running,
    said,
)

MS_SHARED = 1 << 20  # mount(2)

pytestmark = [pytest.mark.root, pytest.mark.usefixtures("the_launcher_is_as_before")]


class OpenTrees:
    """A launcher's trees, and what was taken of them, until the test ends."""

    def __init__(self, place: Path) -> None:
        self.kept = Trees(str(place))
        self._taken: list[int] = []

    def of(self, closure: Closure) -> int:
        self._taken.append(self.kept.take(closure))
        return self._taken[-1]

    def name(self, closure: Closure) -> str:
        return os.readlink(f"/proc/self/fd/{self.of(closure)}")

    def close(self) -> None:
        self.kept.close()
        while self._taken:
            os.close(self._taken.pop())


@pytest.fixture
def trees(tmp_path: Path) -> Iterator[OpenTrees]:
    (tmp_path / "place").mkdir(exist_ok=True)
    trees = OpenTrees(tmp_path / "place")
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


def test_one_tree_is_for_all_while_its_files_stay(trees: OpenTrees, data: Path) -> None:
    first = trees.of(with_data(data))
    before = len(descriptors())
    assert trees.name(with_data(data)) == os.readlink(f"/proc/self/fd/{first}")
    assert len(descriptors()) == before + 1, "its taker's own"
    assert not os.get_inheritable(first)
    other = closure_of(binds_of(*PROGRAMS))
    assert trees.name(other) != trees.name(with_data(data)), "other files are another tree"


def test_it_holds_what_it_was_given_and_places_for_the_rest(trees: OpenTrees, data: Path) -> None:
    tree = trees.of(closure_of(((str(data), "/somewhere/data"),)))
    assert seen_in(tree, "/") == ["boot", "dev", "output", "somewhere"]
    assert seen_in(tree, "/somewhere/data") == "old"
    assert [seen_in(tree, place) for place in ("/boot", "/dev", "/output")] == [[], [], []]


def test_nothing_of_it_is_mounted_on_the_node(trees: OpenTrees, data: Path) -> None:
    before = Path("/proc/self/mountinfo").read_text()
    tree = trees.of(with_data(data))
    assert Path("/proc/self/mountinfo").read_text() == before
    assert os.readlink(f"/proc/self/fd/{tree}") != os.readlink("/proc/self/ns/mnt")


def test_what_one_jail_mounts_no_other_sees_nor_the_tree(build: Build, trees: OpenTrees) -> None:
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
    build: Build, trees: OpenTrees, data: Path
) -> None:
    before = trees.of(with_data(data))
    with running(build(tree=before), "/bin/sleep", "60") as pid:
        (data.parent / "new").write_text("new")
        os.rename(data.parent / "new", data)
        assert Path(f"/proc/{pid}/root/data").read_text() == "old"
        after = trees.of(with_data(data))
        assert said(build(tree=after), "/bin/cat", "/data") == (0, "new")


def test_a_file_that_is_written_to_is_so_in_the_tree(
    build: Build, trees: OpenTrees, data: Path
) -> None:
    tree = trees.of(with_data(data))
    data.write_text("edited")
    assert said(build(tree=tree), "/bin/cat", "/data") == (0, "edited")


def test_a_file_that_another_is_mounted_on_is_that_one_in_the_next_jail(
    build: Build, trees: OpenTrees, data: Path, tmp_path: Path
) -> None:
    trees.of(with_data(data))
    (tmp_path / "cover").write_text("cover")
    namespaces.mount(str(tmp_path / "cover"), str(data), None, namespaces.MS_BIND)
    try:
        after = trees.of(with_data(data))
        assert said(build(tree=after), "/bin/cat", "/data") == (0, "cover")
    finally:
        namespaces.umount(str(data), namespaces.MNT_DETACH)
    assert said(build(tree=trees.of(with_data(data))), "/bin/cat", "/data") == (0, "old")


def test_a_handful_is_kept_and_the_one_that_rested_longest_goes(
    trees: OpenTrees, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    built: list[str] = []

    def build_and_note(closure: Closure, mount_point: str) -> int:
        built.append(Path(closure.binds[0][0]).name)
        return build_tree(closure, mount_point)

    monkeypatch.setattr("hypervisor.tree.build_tree", build_and_note)
    for name in "abcde":
        (tmp_path / name).touch()
    before = len(descriptors())
    for name in "abcdaeab":  # At the e there are four, and b has rested longest.
        os.close(trees.kept.take(closure_of(((str(tmp_path / name), "/file"),))))
    assert "".join(built) == "abcdeb"
    assert len(descriptors()) == before + 4


def test_what_was_taken_outlives_what_is_kept(build: Build, trees: OpenTrees, data: Path) -> None:
    """A start waits for others between its look at the tree and its fork."""
    tree = trees.of(with_data(data))
    trees.kept.close()
    with running(build(tree=tree), "/bin/sleep", "60") as pid:
        trees.close()
        assert Path(f"/proc/{pid}/root/data").read_text() == "old"
    trees.close()
    assert trees.of(with_data(data)) >= 0, "it can be used again"


def test_a_file_that_is_another_one_while_the_tree_is_built_is_refused(
    build: Build, trees: OpenTrees, tmp_path: Path
) -> None:
    """A folder that somebody may rename gives files away of which nothing changes."""
    for folder in ("folder", "other"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "file").write_text(folder)
    place = str(tmp_path / "folder" / "file")
    closure = closure_of((*binds_of(*PROGRAMS), (place, place)))
    os.rename(tmp_path / "folder", tmp_path / "away")
    os.rename(tmp_path / "other", tmp_path / "folder")
    with pytest.raises(JailFailed, match="replaced meanwhile") as raised:
        trees.of(closure)
    assert raised.value.step == "same files"
    assert "try again" in str(raised.value.hint)
    os.rename(tmp_path / "folder", tmp_path / "other")
    os.rename(tmp_path / "away", tmp_path / "folder")
    assert said(build(tree=trees.of(closure)), "/bin/cat", place) == (0, "folder")


def test_a_tree_whose_files_were_replaced_is_let_go_with_them(
    trees: OpenTrees, tmp_path: Path
) -> None:
    """Else what an upgrade deletes would take its room on the disk until the daemon ends."""
    file = tmp_path / "file"
    file.touch()
    os.close(trees.kept.take(closure_of(((str(file), "/file"),))))
    before = len(descriptors())
    for _ in range(3):
        (tmp_path / "new").touch()
        os.rename(tmp_path / "new", file)
        os.close(trees.kept.take(closure_of(((str(file), "/file"),))))
    assert len(descriptors()) == before


def test_nothing_that_is_mounted_on_the_node_later_comes_into_a_jail(
    build: Build, trees: OpenTrees, tmp_path: Path
) -> None:
    """Where systemd runs, all of the node's mounts are shared with those that are made of them."""
    data = tmp_path / "data"
    data.mkdir()
    namespaces.mount("none", str(tmp_path), "tmpfs", 0)
    try:
        namespaces.mount(None, str(tmp_path), None, MS_SHARED)
        for name in ("data", "place", "output"):
            (tmp_path / name).mkdir()
        tree = trees.of(closure_of((*binds_of(*PROGRAMS), (str(data), "/data"))))
        jail = build(tree=tree)
        early, late = tmp_path / "output" / "early", tmp_path / "output" / "late"
        for place in (early, late, data / "sub"):
            place.mkdir()
        namespaces.mount("none", str(early), "tmpfs", 0)
        with running(jail, "/bin/sleep", "60") as pid:
            for place in (late, data / "sub"):
                namespaces.mount("none", str(place), "tmpfs", 0)
            assert not {"/output/early", "/output/late", "/data/sub"} & set(mounts_of(pid))
    finally:
        namespaces.umount(str(tmp_path), namespaces.MNT_DETACH)


@pytest.mark.parametrize("propagation", [MS_SHARED, namespaces.MS_PRIVATE])
def test_a_launcher_in_a_chroot_builds_the_tree_and_leaves_the_node_as_it_is(
    data: Path, propagation: int
) -> None:
    """The root of a mount namespace is not that of a process whose root is below it."""
    root = data.parent / "chroot"
    root.mkdir()

    def make_a_node_and_build() -> list[Any]:
        # One of the test's own, which shares nothing with that which it runs on.
        syscalls.unshare(namespaces.CLONE_NEWNS)
        namespaces.mount(None, "/", None, namespaces.MS_REC | namespaces.MS_PRIVATE)
        namespaces.mount("/", str(root), None, namespaces.MS_BIND | namespaces.MS_REC)
        namespaces.mount(None, "/", None, namespaces.MS_REC | propagation)
        before = Path("/proc/self/mountinfo").read_text()
        told = run_in_child(build_in_chroot, what="building", timeout_s=20)
        assert Path("/proc/self/mountinfo").read_text() == before
        return list(told)

    def build_in_chroot() -> list[Any]:
        os.chroot(root)
        os.chdir("/")
        tree = build_tree(closure_of(((str(data), "/data"),)), "/mnt")
        return [seen_in(tree, "/"), seen_in(tree, "/data")]

    told = run_in_child(make_a_node_and_build, what="making a node", timeout_s=30)
    assert told == [["boot", "data", "dev", "output"], "old"]


@pytest.mark.parametrize(
    ("binds", "mount_point", "step", "number"),
    [
        ((), "/nowhere", "root", errno.ENOENT),
        ((("/nowhere", "/file"),), "/mnt", "files", errno.ENOENT),
        ((("/etc/hostname", "/dev"),), "/mnt", "files", errno.EEXIST),
        ((("/etc/hostname", "/a"), ("/etc/hostname", "/a/b")), "/mnt", "files", errno.EEXIST),
    ],
)
def test_one_that_can_not_be_built_is_told_by_its_step(
    binds: Binds, mount_point: str, step: str, number: int
) -> None:
    before = descriptors()
    with pytest.raises(JailFailed) as raised:
        build_tree(Closure("", binds), mount_point)
    assert (raised.value.step, raised.value.errno) == (step, number)
    assert descriptors() == before


def test_a_full_table_of_descriptors_is_told_and_leaves_none() -> None:
    def fill_and_attempt() -> list[Any]:
        limit = max(map(int, descriptors())) + 9
        resource.setrlimit(resource.RLIMIT_NOFILE, (limit, limit))
        filling = []
        with contextlib.suppress(OSError):
            while True:
                filling.append(os.open("/", os.O_PATH))
        told: list[Any] = []
        while filling:
            before = len(descriptors_with_room(filling))
            try:
                os.close(build_tree(Closure("", ()), "/mnt"))
                return told
            except (OSError, ChildFailed) as error:
                told.append(type(error).__name__)
            assert len(descriptors_with_room(filling)) == before - 1
        return told

    told = run_in_child(fill_and_attempt, what="building", timeout_s=60)
    assert set(told) == {"OSError", "ChildFailed"}


def descriptors_with_room(filling: list[int]) -> set[str]:
    """The caller's, once one of `filling` made room to look."""
    os.close(filling.pop())
    return descriptors()


@pytest.mark.parametrize("fault", [signal.SIGKILL, signal.SIGSTOP])
def test_a_builder_that_is_killed_or_hangs_is_told(
    monkeypatch: pytest.MonkeyPatch, fault: signal.Signals
) -> None:
    monkeypatch.setattr("hypervisor.tree._DEADLINE_S", 0.5)
    hurt = Step("hurt", lambda _: os.kill(os.getpid(), fault), "for the test")
    monkeypatch.setattr("hypervisor.tree.STEPS", (*STEPS, hurt))
    before = descriptors()
    with pytest.raises((ChildFailed, ChildTimedOut), match="building the tree"):
        build_tree(Closure("", ()), "/mnt")
    assert descriptors() == before


def test_without_the_right_to_mount_it_says_who_has_to_run_it() -> None:
    def attempt() -> list[str | None]:
        syscalls.set_capabilities(0, 0, 0)
        try:
            build_tree(Closure("", ()), "/mnt")
        except JailFailed as error:
            return [error.step, error.hint]
        return []

    step, hint = run_in_child(attempt, what="building", timeout_s=20)
    assert step == "mount namespace"
    assert "as root" in hint
