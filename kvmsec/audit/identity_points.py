"""Judgements about who a process is and what it is allowed (pure)."""

from typing import Final

from kvmsec.audit.facts import Facts
from kvmsec.audit.verdicts import Verdict, exposed, listed, note, sealed, unknown

# Accounts that many guests of one host run as, by their packagers' choice.
_COMMON_ACCOUNTS: Final = ("libvirt-qemu", "qemu", "nobody", "kvm", "vdsm")
_PRIVILEGED_GROUPS: Final = frozenset(
    {
        *("root", "adm", "disk", "docker", "kmem", "libvirt", "libvirt-qemu", "lxd", "incus"),
        *("incus-admin", "shadow", "staff", "sudo", "systemd-journal", "tty", "video", "wheel"),
    }
)
# linux/capability.h, bit by bit.
_CAPABILITIES: Final = (
    *("chown", "dac_override", "dac_read_search", "fowner", "fsetid", "kill", "setgid", "setuid"),
    *("setpcap", "linux_immutable", "net_bind_service", "net_broadcast", "net_admin", "net_raw"),
    *("ipc_lock", "ipc_owner", "sys_module", "sys_rawio", "sys_chroot", "sys_ptrace", "sys_pacct"),
    *("sys_admin", "sys_boot", "sys_nice", "sys_resource", "sys_time", "sys_tty_config", "mknod"),
    *("lease", "audit_write", "audit_control", "setfcap", "mac_override", "mac_admin", "syslog"),
    *("wake_alarm", "block_suspend", "audit_read", "perfmon", "bpf", "checkpoint_restore"),
)
# Those that give nothing of the host away by themselves: what some QEMUs are given.
_MILD: Final = frozenset(("net_bind_service", "ipc_lock", "sys_nice", "wake_alarm", "lease"))


def uid(facts: Facts) -> Verdict:
    who = facts.credentials
    if who is None:
        return unknown(facts, "credentials")
    if who.uid == 0:
        return exposed("it runs as root")
    shown = f"uid {who.uid}" + (f" ({who.user})" if who.user else "")
    if len(who.uids) > 1:
        return exposed(f"its real, effective and saved uids differ: {_numbers(who.uids)}", 0.5)
    if who.has_login_shell:
        return exposed(f"it runs as {shown}, an account that people log in with", 0.4)
    return sealed(f"it runs as {shown}")


def _numbers(numbers: tuple[int, ...]) -> str:
    return listed([str(number) for number in numbers])


def shared_uid(facts: Facts) -> Verdict:
    who, sharers = facts.credentials, facts.sharers
    if who is None or sharers is None:
        return unknown(facts, "credentials", "sharers")
    if who.uid == 0:
        return exposed("root's uid is everybody's: each service of the host has it")
    if sharers.qemus:
        return exposed(f"{_counted(sharers.qemus, 'other QEMU')} with this uid")
    if sharers.processes:
        return exposed(f"{_counted(sharers.processes, 'other process')} with this uid", 0.8)
    if who.user in _COMMON_ACCOUNTS:
        return exposed(f"{who.user} is what every guest here runs as", 0.5)
    return sealed("no other process has its uid")


def _counted(count: int, what: str) -> str:
    ending = "es" if what.endswith("s") else "s"
    return f"1 {what} runs" if count == 1 else f"{count} {what}{ending} run"


def groups(facts: Facts) -> Verdict:
    who = facts.credentials
    if who is None:
        return unknown(facts, "credentials")
    if 0 in who.gids or 0 in who.groups:
        return exposed("it has root's group")
    own = who.own_group_names
    privileged = [name for name in (*own, *who.group_names) if name in _PRIVILEGED_GROUPS]
    if privileged:
        names = listed(list(dict.fromkeys(privileged)))
        return exposed(f"it is in {names}: as good as root, or close to it")
    others = [name for name in who.group_names if name != who.user and name not in own]
    if not others and "kvm" not in own:
        return sealed("it is in no supplementary group")
    if others in ([], ["kvm"]):
        return exposed("it is in the group kvm, as everybody who may open the host's /dev/kvm", 0.3)
    return exposed(f"it is in {listed(others)}", 0.6)


def capabilities(facts: Facts) -> Verdict:
    who = facts.credentials
    if who is None:
        return unknown(facts, "credentials")
    inheritable, permitted, effective, _, ambient = who.capabilities
    held = names_of(permitted | effective | ambient | inheritable)
    if not held:
        return sealed("its inheritable, permitted, effective and ambient sets are empty")
    strong = [name for name in held if name not in _MILD]
    if strong:
        return exposed(f"it has {len(held)} capabilities: {listed(strong)}")
    return exposed(f"it has {listed(held)}", 0.3)


def names_of(mask: int) -> list[str]:
    """A set's capabilities by name, the most telling ones first."""
    numbers = [number for number in range(64) if mask >> number & 1]
    names = [_CAPABILITIES[n] if n < len(_CAPABILITIES) else f"cap_{n}" for n in numbers]
    telling = ("sys_admin", "sys_ptrace", "sys_module", "sys_rawio", "dac_override", "net_admin")
    return sorted(names, key=lambda name: (name not in telling, name))


def bounding_set(facts: Facts) -> Verdict:
    who = facts.credentials
    if who is None:
        return unknown(facts, "credentials")
    bounding = names_of(who.capabilities[3])
    if not bounding:
        return sealed("its bounding set is empty: no program can give it a capability")
    message = f"its bounding set has {len(bounding)} capabilities"
    if who.no_new_privs:
        return exposed(f"{message}; no_new_privs keeps it from getting one", 0.5)
    return exposed(message)


def no_new_privs(facts: Facts) -> Verdict:
    who = facts.credentials
    if who is None:
        return unknown(facts, "credentials")
    if who.no_new_privs:
        return sealed("no_new_privs is set on every thread")
    return exposed("no_new_privs is not set")


def set_uid_programs(facts: Facts) -> Verdict:
    who, tree = facts.credentials, facts.tree
    if who is not None and who.no_new_privs:
        return sealed("no_new_privs takes the effect from set-uid and set-gid programs")
    if who is None or tree is None:
        return unknown(facts, "credentials", "tree")
    if tree.kind == "host":
        return exposed("the host's set-uid and set-gid programs are in its tree")
    if tree.set_uid:
        return exposed(f"its tree has {listed(tree.set_uid)}")
    if tree.kind == "chroot" or tree.is_cut:
        return exposed("its tree was not searched to its end", 0.5)
    return sealed("its tree has no set-uid or set-gid program")


def umask(facts: Facts) -> Verdict:
    who = facts.credentials
    if who is None or who.umask is None:
        return unknown(facts, "credentials")
    shown = f"its umask is {who.umask:04o}"
    if who.umask & 0o002 == 0:
        return exposed(f"{shown}: all may write to what it creates")
    if who.umask & 0o077 != 0o077:
        return exposed(f"{shown}: others may read what it creates", 0.5)
    return sealed(shown)


def seccomp(facts: Facts) -> Verdict:
    who = facts.credentials
    if who is None:
        return unknown(facts, "credentials")
    if who.seccomp == 0:
        return exposed("no seccomp filter: the whole kernel can be called")
    if who.seccomp == 1:
        return sealed("strict seccomp: read, write and exit are all that it may call")
    if who.seccomp_filters is None:
        return exposed("it has seccomp filters; this kernel doesn't say how many", 0.3)
    if who.seccomp_filters < 2:
        message = "one seccomp filter: QEMU's own lets vsock, netlink, io_uring and keys through"
        return exposed(message, 0.2)
    return sealed(f"{who.seccomp_filters} seccomp filters, one upon the other")


def sandbox(facts: Facts) -> Verdict:
    said, who = facts.arguments, facts.credentials
    if said is None or who is None:
        return unknown(facts, "arguments", "credentials")
    if said.sandbox is None:
        return exposed("-sandbox is off")
    if who.seccomp != 2:
        return exposed("-sandbox on is among its arguments, but the kernel shows no filter")
    # `obsolete` is denied unless told otherwise (qemu(1)).
    wanted = {"obsolete": ("", "deny")}
    open_ones = [
        name for name, value in said.sandbox.items() if value not in wanted.get(name, ("deny",))
    ]
    if open_ones:
        return exposed(f"-sandbox does not deny {listed(open_ones)}", 0.5)
    return sealed("-sandbox denies all that it can")


def tracer(facts: Facts) -> Verdict:
    who = facts.credentials
    if who is None:
        return unknown(facts, "credentials")
    if who.tracer_pid:
        return exposed(f"process {who.tracer_pid} traces it")
    return sealed("no process traces it")


def dumpable(facts: Facts) -> Verdict:
    is_dumpable, sharers = facts.is_dumpable, facts.sharers
    if is_dumpable is None or sharers is None:
        return unknown(facts, "is_dumpable", "sharers")
    if not is_dumpable:
        return sealed("it is not dumpable")
    if sharers.processes:
        return exposed("it is dumpable: other processes of its uid may trace it, read its memory")
    return sealed("it is dumpable, but no other process has its uid")


def security_module(facts: Facts) -> Verdict:
    if not facts.label or facts.label.startswith("unconfined"):
        return note("no AppArmor or SELinux label confines it")
    return note(f"its security label is {facts.label}")
