"""What the kernel has to offer: everything that a jail is made of, tried rather than looked up."""

import errno
import os
import platform
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Final

from hypervisor import huge_pages
from hypervisor.cgroup_delegation import DEFAULT_PARENT
from hypervisor.cgroup_limits import GroupLimits
from hypervisor.cgroup_mounts import mounted
from hypervisor.cgroups import Hierarchy
from hypervisor.errors import ALLOW_KEYCTL, KEYRING_HINT
from hypervisor.machine import Limits
from hypervisor.seccomp import TICKET_BYTES, NoFilter, find_filter
from kvmsec.config import Config
from kvmsec.linux import command, namespaces, processes, syscalls
from kvmsec.linux.credentials import Credentials, become, leave_session_keyring
from kvmsec.linux.errors import CommandFailed, CommandTimedOut
from kvmsec.linux.files import open_without_links
from kvmsec.linux.keyrings import are_known
from kvmsec.node import limits, trial_groups
from kvmsec.node.doctor.subject import Answer, Subject, error, ok, warning

_TRIAL_BYTES: Final = 64 << 20
_NOBODY: Final = Credentials(65534, 65534)  # Debian Policy 9.2.2
_PR_SET_SECCOMP: Final = 22
_YAMA: Final = Path("/proc/sys/kernel/yama/ptrace_scope")
_IO_URING: Final = Path("/proc/sys/kernel/io_uring_disabled")
_LOGGED: Final = Path("/proc/sys/kernel/seccomp/actions_logged")
_CONTAINER_HINT: Final = (
    "run kvmsec on the host itself, or in a container that is given all privileges"
)
_SYSTEMD_S: Final = 5.0
_SYSTEMD: Final = Path("/run/systemd/system")  # sd_booted(3)
_UNIT_HINT: Final = "start the unit that the group is of, with Delegate=yes"
_PARENT_HINT: Final = (
    "install kvmsec-instances.service (docs/packaging.md, The wheel, has it), and write "
    'cgroup.parent = "kvmsec.slice/kvmsec-instances.service" in kvmsec.toml'
)
_KINDS: Final = {
    "mount": namespaces.CLONE_NEWNS,
    "network": namespaces.CLONE_NEWNET,
    "IPC": namespaces.CLONE_NEWIPC,
    "UTS": namespaces.CLONE_NEWUTS,
    "PID": namespaces.CLONE_NEWPID,
    "cgroup": namespaces.CLONE_NEWCGROUP,
}


def check_system(subject: Subject) -> Iterator[Answer]:
    """Versions, and the one architecture that the system calls are numbered for."""
    about = f"Python {platform.python_version()}, Linux {os.uname().release}, {os.uname().machine}"
    if os.uname().machine == "x86_64":
        yield ok(about)
    else:
        yield error(f"{about}: kvmsec knows x86_64 only", "use an x86_64 host")


def check_system_calls(subject: Subject) -> Iterator[Answer]:
    """Each call that Debian's Python takes for granted or has no name for."""
    # close_range (5.9) needs no trial: without it no child process would have come this far.
    missing = [name for name, use in _CALLS.items() if not _works(use)]
    if missing:
        yield error(
            f"not available: {', '.join(missing)}",
            f"run Linux 5.12 or later; in a container, {_CONTAINER_HINT}",
        )
    else:
        yield ok(f"{', '.join(_CALLS)}")


def _works(use: Callable[[], None]) -> bool:
    try:
        use()
    except OSError as failure:
        # What is asked for does not exist or is senseless: said by a kernel that has the call.
        return failure.errno in (errno.ENOENT, errno.EINVAL, errno.EBADF)
    return True


def _open_by_rules() -> None:
    os.close(open_without_links(Path("/proc"), os.O_PATH))


def _signal_by_descriptor() -> None:
    pidfd = os.pidfd_open(os.getpid())
    signal.pidfd_send_signal(pidfd, 0)
    os.close(pidfd)


def _change_no_mount() -> None:
    syscalls.set_mount_attributes("/proc/no such mount", syscalls.MOUNT_ATTR_NODEV)


def _fork_into_no_group() -> None:
    nowhere = os.open("/proc", os.O_PATH | os.O_CLOEXEC)
    try:
        syscalls.clone3(0, nowhere)  # Refused, and so no fork: that is no control group.
    finally:
        os.close(nowhere)


_CALLS: Final = {
    "openat2": _open_by_rules,
    "pidfd_open and pidfd_send_signal": _signal_by_descriptor,
    "mount_setattr": _change_no_mount,
    "clone3": _fork_into_no_group,
}


def check_namespaces(subject: Subject) -> Iterator[Answer]:
    """A process of our own leaves each kind of namespace; it ends right after."""
    refused = {}
    for kind, flag in _KINDS.items():
        try:
            syscalls.unshare(flag)
        except OSError as failure:
            refused[kind] = failure.strerror
    if refused:
        reasons = "; ".join(f"{kind}: {reason}" for kind, reason in refused.items())
        yield error(f"can't be made anew: {reasons}", _CONTAINER_HINT)
    else:
        yield ok(", ".join(_KINDS))


def check_privileges(subject: Subject) -> Iterator[Answer]:
    """A process of our own gives up everything for good, and the kernel filters system calls."""
    try:
        syscalls.prctl(_PR_SET_SECCOMP, syscalls.SECCOMP_MODE_FILTER)
    except OSError as failure:
        # EFAULT: the filter that we didn't give could not be read, so filters are known (prctl(2)).
        if failure.errno != errno.EFAULT:
            yield error(
                f"the kernel has no seccomp filters ({failure.strerror})",
                "run a kernel with CONFIG_SECCOMP_FILTER, as distributions' kernels are",
            )
    try:
        become(_NOBODY)
    except OSError as failure:
        yield error(f"root can't be given up for good: {failure}", _CONTAINER_HINT)
        return
    status = processes.read_status(os.getpid())
    if status is not None and status.no_new_privs and not any(status.capabilities):
        yield ok("seccomp filters, no_new_privs, and nothing left once root is given up")
    else:
        yield error("the kernel still shows capabilities once root is given up", _CONTAINER_HINT)


def check_filter(subject: Subject) -> Iterator[Answer]:
    """kvmsec's own filter is made, and a process of our own takes it; it ends right after."""
    try:
        made = find_filter()
    except NoFilter as failure:
        if subject.config and "seccomp" in subject.config.confinement.may_be_missing:
            found = f"{failure.message} (kvmsec.toml says that it may be missing)"
            yield warning(found, "install it: apt-get install libseccomp2")
        else:
            yield error(f"{failure.message}: no instance can start", failure.hint)
        return
    become(_NOBODY)
    made.put_in_force(os.urandom(TICKET_BYTES))
    yield ok(f"libseccomp {made.library}, {made.length} instructions, which the kernel takes")


def check_keyring(subject: Subject) -> Iterator[Answer]:
    """A process of our own gets a session keyring that is nobody else's; it ends right after."""
    try:
        leave_session_keyring()
    except OSError as failure:
        found = f"no new session keyring can be had ({failure.strerror})"
        if subject.config and "session-keyring" in subject.config.confinement.may_be_missing:
            yield warning(f"{found} (kvmsec.toml says that it may be missing)", ALLOW_KEYCTL)
        else:
            yield error(f"{found}: no instance can start", KEYRING_HINT)
        return
    if are_known():
        yield ok("a new one for each process that asks")
    else:
        yield ok("there are no keys here, and so none to share")


def check_ptrace(subject: Subject) -> Iterator[Answer]:
    """Under `pool` no two instances share a uid, but what broke out of one can trace its QEMU."""
    scope = _setting(_YAMA)
    if scope is None:
        yield ok("the kernel has no Yama: processes that share a uid may trace one another")
    elif scope == "0":
        yield warning(
            "Yama lets processes that share a uid trace one another (kernel.yama.ptrace_scope 0): "
            "instances of one user under `user`, and whatever got out of a jail its own QEMU",
            _sysctl_hint("kernel.yama.ptrace_scope", 1, "debuggers then need root to attach"),
        )
    else:
        yield ok(f"Yama restricts it (ptrace_scope {scope})")


def check_io_uring(subject: Subject) -> Iterator[Answer]:
    """Whether the kernel keeps instances from io_uring too, as kvmsec's filter does.

    A process registers its credentials with a ring (io_uring_register(2),
    IORING_REGISTER_PERSONALITY), and whoever has the ring acts with them after it has ended: so a
    uid can be used that has no process any more, and no look at processes finds that.
    """
    disabled = _setting(_IO_URING)
    if disabled is None:
        yield ok("the kernel can't keep instances from it as well (Linux 6.6 can), or has none")
    elif disabled == "0":
        yield warning(
            "nothing but the filter of system calls keeps instances from it "
            "(kernel.io_uring_disabled 0): credentials that are registered with a ring of somebody "
            "else's outlive the uid's processes",
            _sysctl_hint(
                "kernel.io_uring_disabled",
                1,
                "other programs' users then need the group kernel.io_uring_group; 2 where root "
                "needs none either",
            ),
        )
    else:
        yield ok(f"the kernel keeps it from instances, too (io_uring_disabled {disabled})")


def check_call_log(subject: Subject) -> Iterator[Answer]:
    """Whether an instance can have the kernel log its own system calls, at no rate but its own.

    With a filter of its own, which needs no privilege (seccomp(2), SECCOMP_RET_LOG). The filters
    of kvmsec and QEMU end the whole process, which is worth a line.
    """
    logged = _setting(_LOGGED)
    if logged is None:
        yield ok("the kernel has no setting for what of seccomp filters it logs")
    elif open_ones := sorted({*logged.split()} - {"kill_process"}):
        yield warning(
            "an instance that was taken over may fill the kernel's and the audit log with lines "
            f"about its own calls (kernel.seccomp.actions_logged has {', '.join(open_ones)})",
            _sysctl_hint(
                "kernel.seccomp.actions_logged",
                "kill_process",
                "what other programs' filters do short of ending them is then not logged",
            ),
        )
    else:
        yield ok("nothing but the end of a process is logged")


def _setting(path: Path) -> str | None:
    """What a sysctl is set to; None where the kernel has no such one."""
    try:
        return path.read_text().strip()
    except FileNotFoundError:
        return None


def _sysctl_hint(name: str, value: int | str, price: str) -> str:
    return f"sysctl -w {name}={value}, and a line of that in /etc/sysctl.d ({price})"


def check_cgroups(subject: Subject) -> Iterator[Answer]:
    """Whether instances get groups that hold them; without, none is started, unless tolerated.

    A trial group is made and removed, as no instance is named: what a parent hands down is known
    from nothing else. Once this has ended, even halfway, it is a leak like another to `reconcile`.
    """
    hierarchy = Hierarchy.detect()
    config = subject.config or Config()
    asked = limits.decide(Limits(), config.limits)
    wanted = GroupLimits(
        memory_bytes=_TRIAL_BYTES,
        tasks=1,
        cpu_weight=asked.cpu_weight,
        cpu_quota_percent=asked.cpu_quota_percent,
        io_weight=asked.io_weight,
        huge_pages=huge_pages.limits_for(None, huge_pages.pools_mib()),
    )
    tag, parent = subject.host.paths.tag, config.cgroup.parent
    group = hierarchy.create(tag, trial_groups.name_for(processes.myself()), parent, wanted)
    group.remove()
    tolerable = config.confinement.may_be_missing
    tolerated = [one for one in group.lacks if limits.is_tolerated(one, tolerable)]
    refused = [one for one in group.lacks if one not in tolerated]
    if refused:
        found = "; ".join([hierarchy.layout or "none is mounted", *map(str, refused)])
        yield error(f"{found}: no instance can start", limits.NoCgroup(refused).hint)
    elif tolerated:
        found = "; ".join([hierarchy.layout or "none is mounted", *map(str, tolerated)])
        yield ok(f"{found} (kvmsec.toml says that it may be missing)")
    else:
        yield ok(hierarchy.layout)
    yield from _cgroups_on_demand(hierarchy)


def check_cgroup_parent(subject: Subject) -> Iterator[Answer]:
    """Below which group instances are, and whether systemd, where it is there, knows of that."""
    if not mounted():
        return  # The check of control groups tells.
    parent = (subject.config or Config()).cgroup.parent
    origin = "kvmsec's own: cgroup.parent is not set" if parent is None else "cgroup.parent"
    found = f"instances are below {parent or DEFAULT_PARENT} ({origin})"
    if not _SYSTEMD.is_dir():
        yield ok(f"{found}, and systemd does not manage this host")
        return
    try:
        is_delegated = _is_of_a_delegated_unit(parent or DEFAULT_PARENT)
    except (OSError, CommandFailed, CommandTimedOut) as failure:
        yield ok(f"{found}; whether systemd has delegated that could not be asked ({failure})")
        return
    if is_delegated:
        yield ok(f"{found}, which systemd has delegated")
    else:
        yield warning(
            f"{found}, which systemd has not delegated: it holds the group for its own and may "
            "take its controllers away",
            _PARENT_HINT if parent is None else f"{_UNIT_HINT}; or {_PARENT_HINT}",
        )


def _is_of_a_delegated_unit(group: str) -> bool:
    """Whether a group is of a unit that is active with Delegate=yes; only these two kinds can be.

    systemd is asked, for a unit that has had no process yet has no group that could bear its mark.
    """
    units = [step for step in group.split("/") if step.endswith((".service", ".scope"))]
    if not units:
        return False
    asked = ("systemctl", "show", "--property=Delegate,ActiveState", units[-1])
    said = command.run(asked, timeout_s=_SYSTEMD_S).stdout.decode().split()
    return {"Delegate=yes", "ActiveState=active"} <= set(said)


def _cgroups_on_demand(hierarchy: Hierarchy) -> Iterator[Answer]:
    """For information: what a definition may not ask for here."""
    missing = [one.piece.removeprefix("cgroup-") for one in hierarchy.lacks(("cpu", "io"))]
    names = [name for name in missing if name != "cgroup"]
    if names:
        yield ok(f"no {' and no '.join(names)} controller: a definition that wants one is refused")
