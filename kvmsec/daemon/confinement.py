"""What the front and the courier are shut into, as one ordered list of steps.

Like an instance's jail (`hypervisor.jail`), for a Python program that has imported all that it
will ever need: the steps run in it, as root and as PID 1 of a PID namespace of its own, before it
has read a byte from the network. Afterwards nothing on the node can be opened, reached or started
from it; it keeps the node's network namespace, for that is what it serves.
"""

import errno
import os
import resource
import socket
from typing import Final

from attrs import field, frozen

from hypervisor.limits import ProcessLimits
from hypervisor.seccomp import EXECVE, IO_SETUP, TICKET_BYTES, Filter
from hypervisor.steps import Step
from kvmsec.errors import KvmsecError
from kvmsec.linux import credentials, namespaces, syscalls
from kvmsec.linux.credentials import Credentials

OWN_DESCRIPTORS: Final = "/proc/self/fd"
"""All that the tree holds: a key is handed to OpenSSL as a file in memory, by its path here."""
_PROC: Final = "whole"
_MAX_FILE_BYTES: Final = 256 * 1024
_MAX_DATA_BYTES: Final = 512 << 20
_OPEN_FILES: Final = 1024


@frozen(kw_only=True)
class Confinement:
    """Who the calling process is to be, and what it keeps.

    name: what the process and its host are called.
    mount_point: a directory of the node on which the empty tree is built, seen by nobody else.
    system_calls: None where the node's configuration lets the filter be missing.
    descriptors: all that it has open; anything else is an error of whoever started it.
    """

    name: str
    credentials: Credentials
    mount_point: str
    system_calls: Filter | None
    descriptors: frozenset[int]
    limits: ProcessLimits = field(
        factory=lambda: ProcessLimits(
            open_files=_OPEN_FILES, processes=0, file_bytes=_MAX_FILE_BYTES, locked_bytes=0
        )
    )


class ConfinementFailed(KvmsecError):
    """A step of the confinement failed; the process ends before it has heard the network."""

    def __init__(self, step: str, number: int, detail: str) -> None:
        hint = "run kvmsec as root, outside a container" if number == errno.EPERM else None
        super().__init__(f"the step {step!r} of the confinement failed: {detail}", hint=hint)
        self.step = step
        self.errno = number
        self.detail = detail


def _leave_session(wanted: Confinement) -> None:
    os.setsid()


def _require_own_descriptors(wanted: Confinement) -> None:
    # Listing them takes a descriptor, which is closed by then.
    found = {int(name) for name in os.listdir(OWN_DESCRIPTORS)}
    for number in found - wanted.descriptors:
        try:
            os.fstat(number)
        except OSError:
            continue
        raise PermissionError(f"descriptor {number} is open and nobody granted it")


def _limit_resources(wanted: Confinement) -> None:
    wanted.limits.apply()
    resource.setrlimit(resource.RLIMIT_DATA, (_MAX_DATA_BYTES, _MAX_DATA_BYTES))


def _leave_namespaces(wanted: Confinement) -> None:
    syscalls.unshare(
        namespaces.CLONE_NEWNS
        | namespaces.CLONE_NEWIPC
        | namespaces.CLONE_NEWUTS
        | namespaces.CLONE_NEWCGROUP
    )


def _name_host(wanted: Confinement) -> None:
    socket.sethostname(wanted.name)


def _stop_propagation(wanted: Confinement) -> None:
    namespaces.mount(None, "/", None, namespaces.MS_REC | namespaces.MS_PRIVATE)


def _mount_root(wanted: Confinement) -> None:
    flags = namespaces.MS_NOSUID | namespaces.MS_NODEV | namespaces.MS_NOEXEC
    namespaces.mount(
        "kvmsec", wanted.mount_point, "tmpfs", flags, "size=32k,nr_inodes=16,mode=0755"
    )
    os.chdir(wanted.mount_point)
    os.makedirs(OWN_DESCRIPTORS.lstrip("/"), 0o755)


def _bind_descriptors(wanted: Confinement) -> None:
    """Of /proc only the directory of the process's own descriptors: they are its own already."""
    if os.getpid() != 1:
        raise PermissionError("it is not the first process of a PID namespace")
    flags = namespaces.MS_NOSUID | namespaces.MS_NODEV | namespaces.MS_NOEXEC
    os.mkdir(_PROC, 0o700)
    namespaces.mount("proc", _PROC, "proc", flags)
    namespaces.mount(f"{_PROC}/1/fd", OWN_DESCRIPTORS.lstrip("/"), None, namespaces.MS_BIND)
    namespaces.umount(_PROC, namespaces.MNT_DETACH)
    os.rmdir(_PROC)


def _make_read_only(wanted: Confinement) -> None:
    syscalls.set_mount_attributes(
        ".",
        syscalls.MOUNT_ATTR_RDONLY
        | syscalls.MOUNT_ATTR_NOSUID
        | syscalls.MOUNT_ATTR_NODEV
        | syscalls.MOUNT_ATTR_NOEXEC,
    )


def _change_root(wanted: Confinement) -> None:
    # The old root comes to lie on the new one and is taken off there: see pivot_root(2).
    namespaces.pivot_root(".", ".")
    namespaces.umount(".", namespaces.MNT_DETACH)
    os.chdir("/")
    if sorted(os.listdir("/")) != ["proc"]:
        raise PermissionError(f"the tree is not empty: {sorted(os.listdir('/'))}")


def _drop_privileges(wanted: Confinement) -> None:
    os.umask(0o077)
    credentials.become(wanted.credentials)


def _end_with_parent(wanted: Confinement) -> None:
    syscalls.end_with_parent()


def _filter_system_calls(wanted: Confinement) -> None:
    if wanted.system_calls is None:
        return
    # Whoever has the ticket may execute a program, so nobody may: the call is absent before that.
    wanted.system_calls.put_in_force(os.urandom(TICKET_BYTES), (EXECVE, IO_SETUP))


STEPS: Final = (
    Step("session", _leave_session, "no controlling terminal to type into"),
    Step("descriptors", _require_own_descriptors, "what is open is all that it will ever reach"),
    Step("limits", _limit_resources, "no core with a key in it, no process, memory with a bound"),
    Step("namespaces", _leave_namespaces, "no mount, IPC object, name or cgroup of the node"),
    Step("host name", _name_host, "the node's own is nobody's business"),
    Step("propagation", _stop_propagation, "no mount made here may reach the node, nor back"),
    Step("root", _mount_root, "an empty tree: nothing can be opened in it"),
    Step("own descriptors", _bind_descriptors, "OpenSSL takes a key by a path alone"),
    Step("read-only", _make_read_only, "nothing can be put into the tree either"),
    Step("change root", _change_root, "the node's tree is detached: no path leads to it"),
    Step("privileges", _drop_privileges, "uid, groups, capabilities, for good"),
    Step("parent", _end_with_parent, "without its root part it serves nobody; uids forget this"),
    Step("system calls", _filter_system_calls, "the last: it denies what the others are made of"),
)


def enter(wanted: Confinement) -> None:
    """Shut the calling process in. Raises ConfinementFailed with the step that failed."""
    for step in STEPS:
        try:
            step.act(wanted)
        except OSError as error:
            raise ConfinementFailed(step.name, error.errno or 0, str(error)) from error
