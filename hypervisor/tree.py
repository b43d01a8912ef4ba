"""The tree that QEMU runs in: built once, read-only, and copied for each jail.

It is the root of a mount namespace in which there is nothing else, and no process. A jail enters
it and takes a copy of the namespace, so that what is mounted for one instance no other sees; to
copy some fifty mounts takes the kernel no longer than to mount a few by their paths.

The namespace is there as long as its descriptor is: it ends with the launcher, whatever becomes of
that. What is mounted in it is the files themselves, so that one that is written to is what it is
on the host. One that is replaced is not: it makes another closure, and so another tree.
"""

import errno
import os
import socket
import stat
from collections.abc import Collection
from typing import Final

from attrs import frozen

from hypervisor.closure import Closure
from hypervisor.errors import JailFailed
from hypervisor.identity import FileIdentity, still_hold
from hypervisor.steps import Step, take
from kvmsec.linux import namespaces, passing, syscalls
from kvmsec.linux.children import run_in_child

OUTPUT: Final = "/output"
BOOT: Final = "/boot"
DEV: Final = "/dev"
_DEADLINE_S: Final = 10.0
_KEPT: Final = 4


class _Building:
    """A tree that the calling process is about to build."""

    def __init__(self, closure: Closure, mount_point: str) -> None:
        self.closure = closure
        self.mount_point = mount_point
        self.namespace = -1


def _leave_mount_namespace(tree: _Building) -> None:
    syscalls.unshare(namespaces.CLONE_NEWNS)
    tree.namespace = os.open("/proc/self/ns/mnt", os.O_RDONLY | os.O_CLOEXEC)


def _stop_propagation(tree: _Building) -> None:
    # All of the namespace's, also above the root of a launcher that was chrooted: what is still
    # shared when the old tree is taken off would be taken off the node as well.
    root = os.open("/", os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    syscalls.setns(tree.namespace, namespaces.CLONE_NEWNS)
    namespaces.mount(None, "/", None, namespaces.MS_REC | namespaces.MS_PRIVATE)
    os.fchdir(root)
    os.chroot(".")


def _mount_root(tree: _Building) -> None:
    # A page for each directory: nothing writes here afterwards.
    entries = 2 * len(tree.closure.binds) + 64
    flags = namespaces.MS_NOSUID | namespaces.MS_NODEV | namespaces.MS_NOEXEC
    data = f"size={4096 * entries},nr_inodes={entries * 4},mode=0755"
    namespaces.mount("kvmsec", tree.mount_point, "tmpfs", flags, data)
    os.chdir(tree.mount_point)
    os.umask(0)  # The modes that follow are meant, whatever the launcher's umask is.
    for directory in (DEV, OUTPUT, BOOT):
        os.mkdir(_inside(directory), 0o755)


def _inside(path: str) -> str:
    """A path inside, as seen from the new root while that is the working directory only."""
    return path.lstrip("/")


def _bind_files(tree: _Building) -> None:
    # All places first: once something of the node is mounted, making one could change the node.
    made = {""}
    binds = [(source, _inside(target)) for source, target in tree.closure.binds]
    for source, target in binds:
        _make_parents(target, made)
        if stat.S_ISDIR(os.stat(source).st_mode):
            os.mkdir(target, 0o755)
            made.add(target)
        else:
            os.mknod(target, stat.S_IFREG | 0o444)
    for source, target in binds:
        namespaces.mount(source, target, None, namespaces.MS_BIND)


def _make_parents(path: str, made: set[str]) -> None:
    parent = path.rpartition("/")[0]
    if parent not in made:
        _make_parents(parent, made)
        os.mkdir(parent, 0o755)
        made.add(parent)


def _make_read_only(tree: _Building) -> None:
    # One call for the tree and all that is mounted in it.
    syscalls.set_mount_attributes(
        ".",
        syscalls.MOUNT_ATTR_RDONLY | syscalls.MOUNT_ATTR_NOSUID | syscalls.MOUNT_ATTR_NODEV,
    )


def _change_root(tree: _Building) -> None:
    # From the namespace's own root, where whoever enters it comes to. In a launcher that was
    # chrooted it is another than the launcher's, and would stay in its place.
    here = os.open(".", os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    syscalls.setns(tree.namespace, namespaces.CLONE_NEWNS)
    os.fchdir(here)
    # The old root comes to lie on the new one and is taken off there: see pivot_root(2).
    namespaces.pivot_root(".", ".")
    namespaces.umount(".", namespaces.MNT_DETACH)
    built = os.stat(".")
    syscalls.setns(tree.namespace, namespaces.CLONE_NEWNS)
    if not os.path.samestat(os.stat("/"), built):
        raise OSError(errno.EXDEV, "whoever enters the namespace comes to another root")


def _require_same_files(tree: _Building) -> None:
    inside = {path for _, path in tree.closure.binds}
    for file in tree.closure.files:
        if file.path in inside and FileIdentity.of(file.path) != file:
            raise OSError(errno.ESTALE, "was replaced meanwhile", file.path)


STEPS: Final = (
    Step("mount namespace", _leave_mount_namespace, "nothing of it is to be seen on the node"),
    Step("propagation", _stop_propagation, "no mount made here may reach the node, nor back"),
    Step("root", _mount_root, "an empty tree: what isn't put in it can't be opened"),
    Step("files", _bind_files, "QEMU, its libraries and data; binds, so nothing is copied"),
    Step("read-only", _make_read_only, "nothing that QEMU runs from can be changed"),
    Step("change root", _change_root, "the node's tree is detached: no path leads to it"),
    Step("same files", _require_same_files, "what others put there for a moment would be kept"),
)


def build_tree(closure: Closure, mount_point: str) -> int:
    """Build a tree; returns a descriptor of its mount namespace, close-on-exec.

    It waits for a child of some ten milliseconds, in place. mount_point: a directory of the node's,
    on which the tree is built where nobody else sees it; nothing that is bound may lie below it.

    Raises JailFailed with the step that failed, ManyThreads, OSError, and ChildFailed and
    ChildTimedOut for the child.
    """
    ours, theirs = socket.socketpair()
    with ours, theirs:
        failure = run_in_child(
            lambda: _build(_Building(closure, mount_point), theirs),
            what="building the tree that QEMU runs in",
            timeout_s=_DEADLINE_S,
            keep=[theirs.fileno()],
        )
        if failure is not None:
            raise JailFailed(*failure)
        _, (built,) = passing.receive(ours, 1, 1)
    return built


def _build(tree: _Building, launcher: socket.socket) -> tuple[str, int, str] | None:
    try:
        take(STEPS, tree)
    except JailFailed as error:
        return error.step, error.errno, error.detail
    socket.send_fds(launcher, [b"t"], [tree.namespace])
    return None


@frozen
class _Built:
    closure: Closure
    descriptor: int


class Trees:
    """The trees of one launcher: each is built by the first start that wants it.

    mount_point: see `build_tree`.
    """

    def __init__(self, mount_point: str) -> None:
        self._mount_point = mount_point
        self._built: list[_Built] = []

    def take(self, closure: Closure) -> int:
        """A descriptor of a closure's tree, the caller's to close.

        A few are kept, those that were asked for last, as long as their files are what they were:
        a tree keeps what was deleted on the disk. Raises what `build_tree` raises.
        """
        found = next((one for one in self._built if one.closure == closure), None)
        if found is None:
            self._let_go([one for one in self._built if not _is_current(one.closure)])
            found = _Built(closure, build_tree(closure, self._mount_point))
        else:
            self._built.remove(found)
        self._built.append(found)
        self._let_go(self._built[:-_KEPT])
        return os.dup(found.descriptor)

    def close(self) -> None:
        """Let all of them go; a jail that is built keeps its copy."""
        self._let_go(self._built[:])

    def _let_go(self, trees: Collection[_Built]) -> None:
        for one in trees:
            self._built.remove(one)
            os.close(one.descriptor)


def _is_current(closure: Closure) -> bool:
    try:
        return still_hold(closure.files)
    except OSError:
        return False
