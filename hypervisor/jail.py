"""What an instance's process is shut into, as one ordered list of steps.

The steps run in a freshly forked child (`hypervisor.child`), which is already PID 1 of a PID
namespace of its own, in a network, an IPC and a UTS namespace where no other child ever was
(`kinds_made_before`). Each does one thing to the calling process, in an order that later steps rely
on, and a failure of any of them ends the child before QEMU's first instruction. Each lock is read
back by its step, or by the last. No step can be left out by a setting, but the filter and the
session keyring on a host that refuses one; what a test of the others may leave out is in `LOCKS`.

The first of them make the cell: they need to know little, and are taken while the launcher still
finds out for whom it is. The child then waits to be told the rest.
"""

import errno
import fcntl
import os
import resource
import socket
import stat
import struct
from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Final

from attrs import evolve, field, frozen

from hypervisor.descriptors import identity_of
from hypervisor.errors import SESSION_KEYRING, JailFailed
from hypervisor.limits import ProcessLimits
from hypervisor.seccomp import IO_SETUP, TICKET_BYTES, Filter
from hypervisor.steps import Step, take
from hypervisor.tree import BOOT, DEV, OUTPUT
from kvmsec.linux import credentials, inherited, namespaces, syscalls
from kvmsec.linux.credentials import Credentials

_NODES: Final = (
    ("null", 1, 3),
    ("zero", 1, 5),
    ("full", 1, 7),
    ("random", 1, 8),
    ("urandom", 1, 9),
)
NETWORK_NAMESPACE: Final = "network namespace"
SECCOMP: Final = "seccomp"
LOCKS: Final = frozenset({NETWORK_NAMESPACE, SECCOMP})
"""What a jail can be built without, for tests alone: so it is shown that another lock holds too."""
_KINDS_MADE_BEFORE: Final = {
    "network": namespaces.CLONE_NEWNET,
    "IPC": namespaces.CLONE_NEWIPC,
    "UTS": namespaces.CLONE_NEWUTS,
}
_KVM_NODE: Final = ("kvm", 10, 232)  # Linux Documentation/admin-guide/devices.txt, misc minor 232
UMASK: Final = 0o077
ENVIRONMENT: Final = {"PATH": "/usr/bin", "LC_ALL": "C"}
"""What QEMU gets: nothing of its launcher's."""
_ENVIRONMENT_WORDS: Final = (b"PATH=/usr/bin", b"LC_ALL=C")
_NO_PROGRAMS: Final = namespaces.MS_NOSUID | namespaces.MS_NOEXEC
_PAGE: Final = 4096


@frozen
class BootFile:
    """A file that QEMU can only open by path: its checked descriptor, its size, its name."""

    descriptor: int
    size_bytes: int
    name: str = field()

    @name.validator
    def _require_plain_name(self, _: object, name: str) -> None:
        if name in ("", ".", "..") or "/" in name:
            raise ValueError(f"{name!r} is no name of a file in {BOOT}")


@frozen
class Cell:
    """What a jail begins with, before it is known whom it is for.

    tree: a descriptor of the mount namespace that it gets a copy of (`hypervisor.tree`).
    cgroups: the files of version 1 groups to write "0" to, which joins them.
    limits: all but the size of files, which is the jail's.
    without_locks: members of `LOCKS`; for tests alone.
    """

    tree: int
    cgroups: tuple[str, ...] = ()
    limits: ProcessLimits = field(factory=lambda: ProcessLimits(file_bytes=None))
    without_locks: frozenset[str] = field(default=frozenset())

    @without_locks.validator
    def _require_known_locks(self, _: object, without: frozenset[str]) -> None:
        if unknown := without - LOCKS:
            raise ValueError(f"{sorted(unknown)} are no locks of a jail: {sorted(LOCKS)}")

    @property
    def kinds_made_before(self) -> int:
        """See the function."""
        return kinds_made_before(self.without_locks)


@frozen
class Jail:
    """Everything else that a jail is made of; descriptors are the launcher's own numbers.

    output: a detached mount (`syscalls.detached_copy`) of a sized tmpfs that belongs to the
        instance; /output inside. It can be attached once: a jail is for one child.
    log: a descriptor for stdout and stderr.
    boot_files: copied to /boot, read-only.
    has_native_aio: whether a disk is read by the kernel's own queues (io_setup(2)); all of a node
        share one number of them (fs.aio-max-nr), which an instance without need must not use up.
    may_share_keyring: whether it may have the launcher's session keyring where the host gives it
        none of its own; the node's configuration lets that be missing.
    file_bytes: the largest file that it may write (`ProcessLimits`).
    descriptors: descriptor number inside -> the launcher's; the only ones that reach QEMU.
    system_calls: kvmsec's own filter; None where the node's configuration lets it be missing.
    ticket: what lets one program be executed under that filter, a new one for each jail.
    """

    cell: Cell
    name: str
    credentials: Credentials
    output: int
    log: int
    system_calls: Filter | None
    boot_files: tuple[BootFile, ...] = ()
    has_kvm: bool = False
    has_native_aio: bool = False
    may_share_keyring: bool = False
    file_bytes: int = 1 << 30
    descriptors: Mapping[int, int] = {}
    ticket: bytes = field(factory=lambda: os.urandom(TICKET_BYTES), repr=False)

    @property
    def limits(self) -> ProcessLimits:
        return evolve(self.cell.limits, file_bytes=self.file_bytes)

    @property
    def held(self) -> tuple[int, ...]:
        """Every descriptor of the launcher's that the child needs for this, each once."""
        files = (file.descriptor for file in self.boot_files)
        return tuple({self.output, self.log, *files, *self.descriptors.values()})

    def renumbered(self, numbers: Mapping[int, int]) -> "Jail":
        """The same with other descriptors of the same files: by the number that each had."""
        return evolve(
            self,
            output=numbers[self.output],
            log=numbers[self.log],
            boot_files=tuple(
                evolve(file, descriptor=numbers[file.descriptor]) for file in self.boot_files
            ),
            descriptors={inside: numbers[ours] for inside, ours in self.descriptors.items()},
        )

    @property
    def filter_in_force(self) -> Filter | None:
        """The filter that the child is to be under."""
        return None if SECCOMP in self.cell.without_locks else self.system_calls


def kinds_made_before(without_locks: Collection[str] = ()) -> int:
    """The kinds of namespaces, as flags of unshare(2), that a child has before its first step.

    They are the same whatever it becomes, so that they can be made before anybody asks for it: a
    network takes the kernel a millisecond.
    """
    every = sum(_KINDS_MADE_BEFORE.values())
    return every - namespaces.CLONE_NEWNET if NETWORK_NAMESPACE in without_locks else every


def make_namespaces(kinds: int) -> None:
    """Have the calling process in new namespaces of these kinds. Raises JailFailed."""
    try:
        syscalls.unshare(kinds)
    except OSError as error:
        names = ", ".join(name for name, kind in _KINDS_MADE_BEFORE.items() if kinds & kind)
        raise JailFailed("namespaces", error.errno or 0, f"{error} ({names})") from error


def _leave_session(cell: Cell) -> None:
    os.setsid()


def _join_cgroups(cell: Cell) -> None:
    for path in cell.cgroups:
        _write_zero(path)


def _write_zero(path: str) -> None:
    descriptor = os.open(path, os.O_WRONLY | os.O_CLOEXEC)
    try:
        os.write(descriptor, b"0")
    finally:
        os.close(descriptor)


def _limit_resources(cell: Cell) -> None:
    cell.limits.apply()


def _leave_namespaces(cell: Cell) -> None:
    # Root and working directory are the tree's from here on; it is copied, and never changed.
    syscalls.setns(cell.tree, namespaces.CLONE_NEWNS)
    syscalls.unshare(namespaces.CLONE_NEWNS | namespaces.CLONE_NEWCGROUP)
    os.umask(0)  # The modes that follow are meant, whatever the launcher's umask is.


def _limit_files(jail: Jail) -> None:
    jail.limits.limit_files()


def _name_host(jail: Jail) -> None:
    socket.sethostname(jail.name)


def _copy_boot_files(jail: Jail) -> None:
    if not jail.boot_files:
        return
    size = sum(-(-file.size_bytes // _PAGE) * _PAGE for file in jail.boot_files) + _PAGE
    data = f"size={size},nr_inodes={len(jail.boot_files) + 1},mode=0755"
    namespaces.mount("kvmsec-boot", BOOT, "tmpfs", _NO_PROGRAMS | namespaces.MS_NODEV, data)
    for file in jail.boot_files:
        _copy(file)
    _seal(BOOT, namespaces.MS_NODEV)


def _copy(file: BootFile) -> None:
    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC
    copy = os.open(f"{BOOT}/{file.name}", flags, 0o444)
    copied = 0
    while copied < file.size_bytes:
        count = os.sendfile(copy, file.descriptor, copied, file.size_bytes - copied)
        if count == 0:
            raise OSError(errno.ENODATA, f"{file.name} became shorter while it was copied")
        copied += count
    os.close(copy)


def _seal(place: str, flags: int = 0) -> None:
    remount = namespaces.MS_REMOUNT | namespaces.MS_BIND | namespaces.MS_RDONLY
    namespaces.mount(None, place, None, remount | _NO_PROGRAMS | flags)


def _make_devices(jail: Jail) -> None:
    namespaces.mount("kvmsec-dev", DEV, "tmpfs", _NO_PROGRAMS, "size=4k,nr_inodes=16,mode=0755")
    for name, major, minor in _NODES:
        _make_node(name, major, minor, 0o666)
    if jail.has_kvm:
        _make_node(*_KVM_NODE, 0o600)
        os.chown(f"{DEV}/kvm", jail.credentials.uid, jail.credentials.gid)
    _seal(DEV)


def _make_node(name: str, major: int, minor: int, mode: int) -> None:
    os.mknod(f"{DEV}/{name}", stat.S_IFCHR | mode, os.makedev(major, minor))


def _attach_output(jail: Jail) -> None:
    syscalls.attach(jail.output, OUTPUT)
    syscalls.set_mount_attributes(
        OUTPUT,
        syscalls.MOUNT_ATTR_NOSUID | syscalls.MOUNT_ATTR_NODEV | syscalls.MOUNT_ATTR_NOEXEC,
    )


def _place_descriptors(jail: Jail) -> None:
    """Put each descriptor on its number inside; the rest closes with the exec.

    Held against the files that they are to stand for: a number may have been used twice. Two taps
    are one file to that, and so are two descriptors of the kernel's own making (anon_inode).
    """
    null = os.open("/dev/null", os.O_RDWR | os.O_CLOEXEC)
    wanted = {0: null, 1: jail.log, 2: jail.log, **jail.descriptors}
    # First out of each other's way, then into place: a plain dup2 could hit one still to be used.
    above = max(wanted) + 1
    files = {inside: identity_of(ours) for inside, ours in wanted.items()}
    moved = {inside: duplicate_above(ours, above) for inside, ours in wanted.items()}
    # What is granted may have been inheritable under its old number as well.
    syscalls.close_on_exec(0)
    for inside, ours in moved.items():
        os.dup2(ours, inside, inheritable=True)
    for inside, file in files.items():
        if identity_of(inside) != file:
            raise OSError(0, f"descriptor {inside} is of another file than was granted")


def duplicate_above(descriptor: int, lowest: int) -> int:
    """A copy with a number of at least `lowest`, close-on-exec."""
    return fcntl.fcntl(descriptor, fcntl.F_DUPFD_CLOEXEC, lowest)


def _narrow_umask(jail: Jail) -> None:
    os.umask(UMASK)


def _leave_session_keyring(jail: Jail) -> None:
    try:
        credentials.leave_session_keyring()
    except OSError as error:
        is_refused = error.errno in (errno.EPERM, errno.EACCES, errno.ENOSYS)
        if not (is_refused and jail.may_share_keyring):
            raise


def _drop_privileges(jail: Jail) -> None:
    credentials.take(jail.credentials)


def _filter_system_calls(jail: Jail) -> None:
    if jail.filter_in_force is None:
        return
    absent = () if jail.has_native_aio else (IO_SETUP,)
    jail.filter_in_force.put_in_force(jail.ticket, absent)


def _read_back(jail: Jail) -> None:
    """What no earlier step could hold against the whole of what it and the others left."""
    if problems := list(_problems_left(jail)):
        raise OSError(0, "; ".join(problems))


def _problems_left(jail: Jail) -> Iterator[str]:
    if (umask := os.umask(UMASK)) != UMASK:  # To set it is the only way to ask for it.
        yield f"umask {umask:#05o}, wanted {UMASK:#05o}"
    most, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    found, granted = inherited.survivors(most), {0, 1, 2, *jail.descriptors}
    if left := sorted(found - granted):
        yield f"descriptors {left} stay open and nobody granted them"
    if lost := sorted(granted - found):
        yield f"descriptors {lost} are granted and do not stay open"


CELL_STEPS: Final = (
    Step("session", _leave_session, "no controlling terminal to type into"),
    Step("cgroups", _join_cgroups, "counted and ended as one, before anything can be forked"),
    Step("limits", _limit_resources, "nothing without a bound, no core with a guest's memory"),
    Step("namespaces", _leave_namespaces, "no path and no cgroup of the node's"),
)
JAIL_STEPS: Final = (
    Step("file size", _limit_files, "the largest of its disks and of what it writes, no more"),
    Step("host name", _name_host, "the node's own is nobody's business"),
    Step("boot files", _copy_boot_files, "firmware and kernels take no descriptor in QEMU"),
    Step("devices", _make_devices, "/dev/kvm for this uid alone, whatever the node's mode is"),
    Step("output", _attach_output, "the only writable place, of a fixed size"),
    Step("descriptors", _place_descriptors, "what was granted, on the numbers that were named"),
    Step("umask", _narrow_umask, "what QEMU creates is nobody else's to read"),
    Step(SESSION_KEYRING, _leave_session_keyring, "what an admin's login put there is not its"),
    Step("privileges", _drop_privileges, "uid, groups, capabilities, for good"),
    Step("system calls", _filter_system_calls, "it denies what the others are made of"),
    Step("read back", _read_back, "a step that did nothing, or was undone by a later one, is told"),
)
STEPS: Final = (*CELL_STEPS, *JAIL_STEPS)


def execute(jail: Jail, program: str, argv: Sequence[str]) -> None:
    """Become the one program that a jail's filter lets be executed. Raises OSError, or is gone.

    What the kernel is given for an environment is looked at last of all, where it lies in memory.
    """
    environment = syscalls.strings(f"{name}={value}" for name, value in ENVIRONMENT.items())
    if list(environment) != [*_ENVIRONMENT_WORDS, None]:
        raise OSError(0, "the environment is not the one that QEMU is to have")
    arguments, ticket = syscalls.strings(argv), struct.unpack("<3Q", jail.ticket)
    syscalls.execute(program, arguments, environment, ticket)


def enter_cell(cell: Cell) -> None:
    """Take the first steps. Raises JailFailed with the one that failed."""
    take(CELL_STEPS, cell)


def enter(jail: Jail) -> None:
    """Shut the calling process in, which is in the jail's cell, and has renumbered the jail.

    Descriptors that have to stay until the exec are close-on-exec, and above every number in
    `jail.descriptors`. Raises JailFailed with the step that failed.
    """
    take(JAIL_STEPS, jail)
