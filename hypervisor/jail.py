"""What an instance's process is shut into, as one ordered list of steps.

The steps run in a freshly forked child of a launcher with one thread; the child is already PID 1
of a PID namespace of its own. Each does one thing to the calling process, in an order that later
steps rely on, and a failure of any of them ends the child before QEMU's first instruction. No
step can be left out by a setting, but the last one on a host that lacks the library for it; what a
test of the others may leave out is in `LOCKS`.
"""

import errno
import fcntl
import os
import socket
import stat
import struct
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Final

from attrs import field, frozen

from hypervisor.errors import HypervisorError
from hypervisor.limits import ProcessLimits
from hypervisor.seccomp import IO_SETUP, TICKET_BYTES, Filter
from kvmsec.linux import children, credentials, namespaces, syscalls
from kvmsec.linux.credentials import Credentials

OUTPUT: Final = "/output"
BOOT: Final = "/boot"
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
_KVM_NODE: Final = ("kvm", 10, 232)  # Linux Documentation/admin-guide/devices.txt, misc minor 232


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
class Jail:
    """Everything that a jail is made of, decided before the fork.

    binds: pairs of (path on the host, the same thing's path inside), read-only inside.
    boot_files: copied to /boot, read-only.
    mount_point: an empty directory of the host's on which the new root is built.
    output: a directory on the host, a sized tmpfs that belongs to the instance; /output inside.
    log: a descriptor for stdout and stderr.
    has_native_aio: whether a disk is read by the kernel's own queues (io_setup(2)); all of a node
        share one number of them (fs.aio-max-nr), which an instance without need must not use up.
    born_in: the version 2 control group of the child from its birth; None where there is none.
    cgroups: the files of version 1 groups to write "0" to, which joins them.
    descriptors: descriptor number inside -> the launcher's; the only ones that reach QEMU.
    system_calls: kvmsec's own filter; None where the node's configuration lets it be missing.
    ticket: what lets one program be executed under that filter, a new one for each jail.
    without_locks: members of `LOCKS`; for tests alone.
    """

    name: str
    credentials: Credentials
    mount_point: str
    output: str
    log: int
    binds: tuple[tuple[str, str], ...]
    system_calls: Filter | None
    boot_files: tuple[BootFile, ...] = ()
    has_kvm: bool = False
    has_native_aio: bool = False
    born_in: str | None = None
    cgroups: tuple[str, ...] = ()
    limits: ProcessLimits = field(factory=ProcessLimits)
    descriptors: Mapping[int, int] = {}
    ticket: bytes = field(factory=lambda: os.urandom(TICKET_BYTES), repr=False)
    without_locks: frozenset[str] = field(default=frozenset())

    @without_locks.validator
    def _require_known_locks(self, _: object, without: frozenset[str]) -> None:
        if unknown := without - LOCKS:
            raise ValueError(f"{sorted(unknown)} are no locks of a jail: {sorted(LOCKS)}")

    @property
    def filter_in_force(self) -> Filter | None:
        """The filter that the child is to be under."""
        return None if SECCOMP in self.without_locks else self.system_calls


class JailFailed(HypervisorError):
    """A step of the jail failed; QEMU was not started."""

    def __init__(self, step: str, number: int, detail: str) -> None:
        hint = "run kvmsec as root, outside a container" if number == errno.EPERM else None
        super().__init__(f"the jail's step {step!r} failed: {detail}", hint=hint)
        self.step = step
        self.errno = number
        self.detail = detail


def _leave_session(jail: Jail) -> None:
    os.setsid()


def _join_cgroups(jail: Jail) -> None:
    for path in jail.cgroups:
        _write_zero(path)


def _write_zero(path: str) -> None:
    descriptor = os.open(path, os.O_WRONLY | os.O_CLOEXEC)
    try:
        os.write(descriptor, b"0")
    finally:
        os.close(descriptor)


def _limit_resources(jail: Jail) -> None:
    jail.limits.apply()


def _leave_namespaces(jail: Jail) -> None:
    network = 0 if NETWORK_NAMESPACE in jail.without_locks else namespaces.CLONE_NEWNET
    syscalls.unshare(
        namespaces.CLONE_NEWNS
        | network
        | namespaces.CLONE_NEWIPC
        | namespaces.CLONE_NEWUTS
        | namespaces.CLONE_NEWCGROUP
    )


def _name_host(jail: Jail) -> None:
    socket.sethostname(jail.name)


def _stop_propagation(jail: Jail) -> None:
    namespaces.mount(None, "/", None, namespaces.MS_REC | namespaces.MS_PRIVATE)


def _mount_root(jail: Jail) -> None:
    # Room for the boot files and a page a directory: nothing writes here afterwards.
    entries = 2 * len(jail.binds) + len(jail.boot_files) + 64
    size = sum(-(-file.size_bytes // 4096) * 4096 for file in jail.boot_files) + 4096 * entries
    flags = namespaces.MS_NOSUID | namespaces.MS_NODEV | namespaces.MS_NOEXEC
    data = f"size={size},nr_inodes={entries * 4},mode=0755"
    namespaces.mount("kvmsec", jail.mount_point, "tmpfs", flags, data)
    os.chdir(jail.mount_point)
    os.umask(0)  # The modes that follow are meant, whatever the launcher's umask is.
    for directory in ("dev", _inside(OUTPUT), _inside(BOOT)):
        os.mkdir(directory, 0o755)


def _inside(path: str) -> str:
    """A path inside, as seen from the new root while that is the working directory only."""
    return path.lstrip("/")


def _bind_programs(jail: Jail) -> None:
    # All places first: once something of the node is mounted, making one could change the node.
    made = {""}
    binds = [(source, _inside(target)) for source, target in jail.binds]
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


def _copy_boot_files(jail: Jail) -> None:
    for file in jail.boot_files:
        target = f"{_inside(BOOT)}/{file.name}"
        copy = os.open(target, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o444)
        copied = 0
        while copied < file.size_bytes:
            count = os.sendfile(copy, file.descriptor, copied, file.size_bytes - copied)
            if count == 0:
                raise OSError(errno.ENODATA, f"{file.name} became shorter while it was copied")
            copied += count
        os.close(copy)


def _make_read_only(jail: Jail) -> None:
    # One call for the tree and all that is mounted in it, before what may be written joins.
    syscalls.set_mount_attributes(
        ".",
        syscalls.MOUNT_ATTR_RDONLY | syscalls.MOUNT_ATTR_NOSUID | syscalls.MOUNT_ATTR_NODEV,
    )


def _make_devices(jail: Jail) -> None:
    flags = namespaces.MS_NOSUID | namespaces.MS_NOEXEC
    namespaces.mount("kvmsec-dev", "dev", "tmpfs", flags, "size=4k,nr_inodes=16,mode=0755")
    for name, major, minor in _NODES:
        _make_node(name, major, minor, 0o666)
    if jail.has_kvm:
        _make_node(*_KVM_NODE, 0o600)
        os.chown("dev/kvm", jail.credentials.uid, jail.credentials.gid)
    namespaces.mount(
        None, "dev", None, namespaces.MS_REMOUNT | namespaces.MS_BIND | namespaces.MS_RDONLY | flags
    )


def _make_node(name: str, major: int, minor: int, mode: int) -> None:
    os.mknod(f"dev/{name}", stat.S_IFCHR | mode, os.makedev(major, minor))


def _bind_output(jail: Jail) -> None:
    output = _inside(OUTPUT)
    namespaces.mount(jail.output, output, None, namespaces.MS_BIND)
    syscalls.set_mount_attributes(
        output,
        syscalls.MOUNT_ATTR_NOSUID | syscalls.MOUNT_ATTR_NODEV | syscalls.MOUNT_ATTR_NOEXEC,
    )


def _change_root(jail: Jail) -> None:
    # The old root comes to lie on the new one and is taken off there: see pivot_root(2).
    namespaces.pivot_root(".", ".")
    namespaces.umount(".", namespaces.MNT_DETACH)
    os.chdir("/")


def _place_descriptors(jail: Jail) -> None:
    """Put each descriptor on its number inside; the rest closes with the exec."""
    null = os.open("/dev/null", os.O_RDWR | os.O_CLOEXEC)
    wanted = {0: null, 1: jail.log, 2: jail.log, **jail.descriptors}
    # First out of each other's way, then into place: a plain dup2 could hit one still to be used.
    above = max(wanted) + 1
    moved = {inside: duplicate_above(ours, above) for inside, ours in wanted.items()}
    # What is granted may have been inheritable under its old number as well.
    syscalls.close_on_exec(0)
    for inside, ours in moved.items():
        os.dup2(ours, inside, inheritable=True)


def duplicate_above(descriptor: int, lowest: int) -> int:
    """A copy with a number of at least `lowest`, close-on-exec."""
    return fcntl.fcntl(descriptor, fcntl.F_DUPFD_CLOEXEC, lowest)


def _narrow_umask(jail: Jail) -> None:
    os.umask(0o077)


def _drop_privileges(jail: Jail) -> None:
    credentials.become(jail.credentials)


def _filter_system_calls(jail: Jail) -> None:
    if jail.filter_in_force is None:
        return
    absent = () if jail.has_native_aio else (IO_SETUP,)
    jail.filter_in_force.put_in_force(jail.ticket, absent)


@frozen
class Step:
    """One thing that is done to the child, and why."""

    name: str
    act: Callable[[Jail], None]
    reason: str


STEPS: Final = (
    Step("session", _leave_session, "no controlling terminal to type into"),
    Step("cgroups", _join_cgroups, "counted and ended as one, before anything can be forked"),
    Step("limits", _limit_resources, "nothing without a bound, no core with a guest's memory"),
    Step("namespaces", _leave_namespaces, "no mount, network, IPC, name or cgroup of the node"),
    Step("host name", _name_host, "the node's own is nobody's business"),
    Step("propagation", _stop_propagation, "no mount made here may reach the node, nor back"),
    Step("root", _mount_root, "an empty tree: what isn't put in it can't be opened"),
    Step("programs", _bind_programs, "QEMU, its libraries and data; binds, so nothing is copied"),
    Step("boot files", _copy_boot_files, "firmware and kernels take no descriptor in QEMU"),
    Step("read-only", _make_read_only, "nothing that QEMU runs from can be changed"),
    Step("devices", _make_devices, "/dev/kvm for this uid alone, whatever the node's mode is"),
    Step("output", _bind_output, "the only writable place, of a fixed size"),
    Step("change root", _change_root, "the node's tree is detached: no path leads to it"),
    Step("descriptors", _place_descriptors, "what was granted, on the numbers that were named"),
    Step("umask", _narrow_umask, "what QEMU creates is nobody else's to read"),
    Step("privileges", _drop_privileges, "uid, groups, capabilities, for good"),
    Step("system calls", _filter_system_calls, "the last: it denies what the others are made of"),
)


def close_foreign(jail: Jail, keep: Collection[int]) -> None:
    """Close every descriptor of the calling process but what the jail needs, and `keep`."""
    files = [file.descriptor for file in jail.boot_files]
    children.close_all_but({0, 1, 2, jail.log, *jail.descriptors.values(), *files, *keep})


def execute(jail: Jail, program: str, argv: Sequence[str], environment: Mapping[str, str]) -> None:
    """Become the one program that a jail's filter lets be executed. Raises OSError, or is gone."""
    syscalls.execute(program, argv, environment, struct.unpack("<3Q", jail.ticket))


def enter(jail: Jail) -> None:
    """Shut the calling process in, a child by `children.fork` that has closed what is foreign.

    Descriptors that have to stay until the exec are close-on-exec, and above every number in
    `jail.descriptors`. Raises JailFailed with the step that failed.
    """
    for step in STEPS:
        try:
            step.act(jail)
        except OSError as error:
            raise JailFailed(step.name, error.errno or 0, str(error)) from error
