"""Judgements about what a process may use up, and about the program and its words (pure)."""

from typing import Final

from kvmsec.audit.facts import Facts, Limit
from kvmsec.audit.verdicts import Verdict, exposed, listed, note, sealed, unknown

_MIB: Final = 1 << 20
# What a QEMU needs, with room: more than these is as good as no limit.
_BOUNDS: Final = {
    "open files": 65_536,
    "processes": 4_096,
    "locked memory": 1 << 40,
    "file size": 1 << 60,
    "msgqueue size": 819_200,  # The kernel's default, linux/resource.h MQ_BYTES_MAX.
}
_MISSING_HINT: Final = (
    "give the host what it lacks, and take out of confinement.may_be_missing what `kvmsec doctor` "
    "finds to be there"
)


def cgroup_memory(facts: Facts) -> Verdict:
    group = facts.control_group
    if group is None:
        return unknown(facts, "control_group")
    if group.memory_bytes is None:
        return exposed("no control group bounds its memory")
    return sealed(f"its control group bounds memory to {group.memory_bytes // _MIB} MiB")


def cgroup_pids(facts: Facts) -> Verdict:
    group = facts.control_group
    if group is None:
        return unknown(facts, "control_group")
    if group.pids is None:
        return exposed("no control group bounds its processes and threads")
    return sealed(f"its control group bounds processes and threads to {group.pids}")


def cgroup_cpu(facts: Facts) -> Verdict:
    group = facts.control_group
    if group is None:
        return unknown(facts, "control_group")
    if group.cpus is not None:
        return sealed(f"its control group bounds it to {group.cpus:g} CPUs")
    if group.has_cpu_share:
        return sealed("its control group has a CPU weight of its own")
    if not group.paths:
        return exposed("it is in the host's root control groups")
    if group.others:
        return exposed(f"it shares its control group with {group.others} other processes", 0.8)
    return exposed("no control group bounds its CPU time", 0.5)


def resource_limits(facts: Facts) -> Verdict:
    limits = facts.limits
    if limits is None:
        return unknown(facts, "limits")
    wide = [name for name, bound in _BOUNDS.items() if _is_above(limits.get(name), bound)]
    if wide:
        return exposed(f"no bound that counts: {listed(wide)}", len(wide) / len(_BOUNDS))
    return sealed("open files, processes, locked memory, file size and queues are bounded")


def _is_above(limit: Limit | None, bound: int) -> bool:
    return limit is None or limit.hard is None or limit.hard > bound


def core_dumps(facts: Facts) -> Verdict:
    limits, said = facts.limits, facts.arguments
    if limits is None or "core file size" not in limits:
        return unknown(facts, "limits")
    limit = limits["core file size"]
    # Zero forbids a file, but only one has no program that cores are piped to started (core(5)).
    # A socket is handed every core, whatever the limit (coredump_socket in fs/coredump.c).
    enough = {"file": (0, 1), "program": (1,), "socket": (), None: ()}[facts.core_goes_to]
    is_held_back = limit.soft in enough
    if is_held_back and limit.hard in (0, 1):
        return sealed("a crash leaves no core, and the limit is fixed")
    if is_held_back:
        return exposed("a crash leaves no core, but it may raise that limit", 0.5)
    if said is not None and said.hides_memory_from_cores:
        return exposed("a crash leaves a core, without the guest's memory", 0.5)
    return exposed("a crash leaves a core with the guest's memory in it")


def oom_score(facts: Facts) -> Verdict:
    value = facts.oom_score_adj
    if value is None:
        return unknown(facts, "oom_score_adj")
    if value < 0:
        return exposed(f"its oom_score_adj is {value}: others are killed in its stead")
    return sealed(f"its oom_score_adj is {value}")


def terminal(facts: Facts) -> Verdict:
    if facts.has_terminal:
        return exposed("it has a controlling terminal: it can type into that (TIOCSTI)")
    return sealed("it has no controlling terminal")


def accelerator(facts: Facts) -> Verdict:
    held = facts.descriptors
    if held is None:
        return unknown(facts, "descriptors")
    if held.has_kvm_machine:
        return sealed("its guest runs under KVM")
    return exposed("it has no KVM machine: its guest is emulated (TCG), or it isn't a guest yet")


def executable(facts: Facts) -> Verdict:
    if facts.executable is None:
        return unknown(facts, "executable")
    if facts.is_executable_deleted:
        message = f"{facts.executable} was replaced since: what runs is not what is installed"
        return exposed(message)
    return sealed(f"it runs {facts.executable}")


def secrets(facts: Facts) -> Verdict:
    said = facts.arguments
    if said is None:
        return unknown(facts, "arguments")
    if said.secrets:
        return exposed(f"its arguments hold a secret: {listed(said.secrets)}")
    return sealed("no secret was found in its arguments")


def environment(facts: Facts) -> Verdict:
    names = facts.secret_variables
    if names is None:
        return unknown(facts, "secret_variables")
    if names:
        return exposed(f"its environment has {listed(names)}")
    return sealed("no variable that looks like a secret")


def tolerated(facts: Facts) -> Verdict:
    if facts.instance is None:
        return note("it is no instance of this root: kvmsec.toml says nothing about it")
    if facts.tolerated:
        pieces = listed(facts.tolerated)
        return note(
            f"this node's configuration lets a start do without: {pieces}", hint=_MISSING_HINT
        )
    return note("this node's configuration lets no piece of confinement be missing")
