"""Every point that is judged, with its weight; docs/audit.md tells them to people.

The points above the line weigh 10.0 together: a QEMU that root starts by hand has nearly all of
that. Those below it come on top where they apply.
"""

from typing import Final

from kvmsec.audit import identity_points as identity
from kvmsec.audit import reach_points as reach
from kvmsec.audit import resource_points as resource
from kvmsec.audit.facts import Facts
from kvmsec.audit.score import Finding
from kvmsec.audit.verdicts import Point

_JAIL_HINT: Final = "start it with `kvmsec instance start`, or by hand under unshare(1) or bwrap(1)"
_SANDBOX: Final = "on,obsolete=deny,elevateprivileges=deny,spawn=deny,resourcecontrol=deny"

CONFINEMENT: Final = (
    Point(
        code="uid",
        weight=1.0,
        why="Whoever breaks out of the guest has this uid: root's opens every file of root's.",
        hint="run each QEMU as an unprivileged user that nobody logs in with "
        "(kvmsec's security model `pool`)",
        judge=identity.uid,
    ),
    Point(
        code="uid-shared",
        weight=0.7,
        why="Processes of one uid may trace and signal each other and open each other's files.",
        hint="give each guest a uid of its own (kvmsec's security model `pool`)",
        judge=identity.shared_uid,
    ),
    Point(
        code="groups",
        weight=0.3,
        why="A group opens what its members share; some of them are as good as root.",
        hint="start it with no supplementary group, and a group of its own",
        judge=identity.groups,
    ),
    Point(
        code="capabilities",
        weight=1.0,
        why="A capability is a part of root's power, whatever the uid is.",
        hint="drop all of them before QEMU is executed (setpriv --inh-caps=-all)",
        judge=identity.capabilities,
    ),
    Point(
        code="bounding-set",
        weight=0.2,
        why="A program with file capabilities gives what the bounding set lets through.",
        hint="empty the bounding set before the uid is dropped (setpriv --bounding-set=-all)",
        judge=identity.bounding_set,
    ),
    Point(
        code="no-new-privs",
        weight=0.4,
        why="Without it, an exec of a set-uid program gives another user's rights.",
        hint="set it before QEMU is executed (setpriv --no-new-privs)",
        judge=identity.no_new_privs,
    ),
    Point(
        code="set-uid-programs",
        weight=0.2,
        why="Each set-uid or set-gid program in reach is a way to another user's rights.",
        hint="set no_new_privs, and mount what it sees nosuid",
        judge=identity.set_uid_programs,
    ),
    Point(
        code="umask",
        weight=0.1,
        why="What QEMU creates (logs, sockets, dumps of memory) gets this mode.",
        hint="start it with umask 077",
        judge=identity.umask,
    ),
    Point(
        code="seccomp",
        weight=1.2,
        why="Each system call that is left is a way to attack the kernel.",
        hint=f"start QEMU with `-sandbox {_SANDBOX}`, and a filter of the launcher's below it",
        judge=identity.seccomp,
    ),
    Point(
        code="sandbox",
        weight=0.3,
        why="Without its denials QEMU may start programs and change its own privileges.",
        hint=f"start QEMU with `-sandbox {_SANDBOX}`",
        judge=identity.sandbox,
    ),
    Point(
        code="namespace-mnt",
        weight=0.2,
        why="In the host's mount namespace every mount of the host is in sight.",
        hint=_JAIL_HINT,
        judge=reach.namespace("mnt"),
    ),
    Point(
        code="namespace-net",
        weight=0.4,
        why="In the host's network it may connect to all that the host can, loopback included, "
        "and to abstract unix sockets.",
        hint="give it an empty network namespace, and taps as descriptors",
        judge=reach.namespace("net"),
    ),
    Point(
        code="namespace-pid",
        weight=0.3,
        why="It sees every process of the host, and may signal and trace those of its uid.",
        hint=_JAIL_HINT,
        judge=reach.namespace("pid"),
    ),
    Point(
        code="namespace-ipc",
        weight=0.2,
        why="System V and POSIX IPC objects of the host are in its reach.",
        hint=_JAIL_HINT,
        judge=reach.namespace("ipc"),
    ),
    Point(
        code="namespace-uts",
        weight=0.1,
        why="It knows the host by name, and could rename it with a capability.",
        hint=_JAIL_HINT,
        judge=reach.namespace("uts"),
    ),
    Point(
        code="namespace-cgroup",
        weight=0.1,
        why="It sees where it stands among the host's control groups.",
        hint=_JAIL_HINT,
        judge=reach.namespace("cgroup"),
    ),
    Point(
        code="namespace-user",
        weight=0.1,
        why="Root and capabilities count in the user namespace that they are held in.",
        hint="drop root and every capability, or give it a user namespace of its own",
        judge=reach.user_namespace,
    ),
    Point(
        code="namespace-time",
        weight=0.0,
        why="A time namespace shifts two clocks; it keeps nothing apart.",
        hint="nothing to do",
        judge=reach.time_namespace,
    ),
    Point(
        code="root-tree",
        weight=0.6,
        why="What has no path can't be opened, whatever its mode is.",
        hint="give it a root tree with nothing but what QEMU needs, by pivot_root(2)",
        judge=reach.root_tree,
    ),
    Point(
        code="writable-paths",
        weight=0.6,
        why="Where it may write it can fill the filesystem, and plant what others will trust.",
        hint="mount its tree read-only, with one small tmpfs for its own output",
        judge=reach.writable_paths,
    ),
    Point(
        code="devices",
        weight=0.6,
        why="A device node is a driver's whole interface: a disk, a tap of others, memory.",
        hint="give it a /dev of its own with null, random and kvm, and the rest as descriptors",
        judge=reach.devices,
    ),
    Point(
        code="packet-rules",
        weight=0.8,
        why="A second lock on the network, that holds where the namespace is shared or left.",
        hint="drop all that its uid sends, IPv4 and IPv6 (`kvmsec firewall apply` for the pool)",
        judge=reach.packet_rules,
    ),
    Point(
        code="cgroup-memory",
        weight=0.2,
        why="Without a bound a guest can take the host's memory, and have others killed for it.",
        hint="give it a control group with memory.max (memory.limit_in_bytes)",
        judge=resource.cgroup_memory,
    ),
    Point(
        code="cgroup-pids",
        weight=0.1,
        why="Without a bound it can use up the host's process ids.",
        hint="give it a control group with pids.max",
        judge=resource.cgroup_pids,
    ),
    Point(
        code="cgroup-cpu",
        weight=0.1,
        why="Without a bound or a weight it takes CPU time from everybody else.",
        hint="give it a control group of its own with cpu.weight or cpu.max",
        judge=resource.cgroup_cpu,
    ),
    Point(
        code="rlimits",
        weight=0.1,
        why="Descriptors, locked memory, queues and files are limits of the host's own, too.",
        hint="set hard limits: nofile, nproc, memlock, fsize, msgqueue (prlimit(1))",
        judge=resource.resource_limits,
    ),
    Point(
        code="core-dumps",
        weight=0.05,
        why="A core holds the guest's memory, keys and passwords among it.",
        hint="set the hard limit of core files to 1 byte (prlimit --core=1:1)",
        judge=resource.core_dumps,
    ),
    Point(
        code="oom-score",
        weight=0.05,
        why="A process that the kernel is told to spare outlives better ones.",
        hint="set its oom_score_adj to 0 or more (choom(1))",
        judge=resource.oom_score,
    ),
)

ON_TOP: Final = (
    Point(
        code="inet-sockets",
        weight=0.3,
        why="A socket of the host's network that was inherited or made works past every namespace.",
        hint="close what QEMU doesn't need before it is executed; use unix sockets",
        judge=reach.inet_sockets,
    ),
    Point(
        code="tcp-listeners",
        weight=1.0,
        why="Whoever connects to a monitor owns the machine and its process; who connects to a "
        "display sees and types.",
        hint="put QMP, monitors, consoles and displays on unix sockets (-qmp unix:PATH, "
        "-vnc unix:PATH), -display none where nobody looks",
        judge=reach.tcp_listeners,
    ),
    Point(
        code="unix-listeners",
        weight=0.7,
        why="Whoever may write to a socket's file may give orders through it.",
        hint="put sockets into a directory of mode 0700, with mode 0600",
        judge=reach.unix_listeners,
    ),
    Point(
        code="disk-paths",
        weight=0.5,
        why="Who may read a disk has the guest's data; who may write to it has the guest.",
        hint="chmod 0600 the image, and 0700 its directory",
        judge=reach.disk_paths,
    ),
    Point(
        code="accelerator",
        weight=0.5,
        why="QEMU's developers don't treat a hole in TCG as a hole: emulation is no boundary.",
        hint="run it under KVM (-accel kvm), or treat the guest as if it had broken out",
        judge=resource.accelerator,
    ),
    Point(
        code="secrets",
        weight=0.5,
        why="Every user of the host can read a process's arguments.",
        hint="hand secrets over in files or descriptors (-object secret,file=…; password-secret=)",
        judge=resource.secrets,
    ),
    Point(
        code="environment",
        weight=0.1,
        why="What is in QEMU's environment is in the hands of who breaks out of the guest.",
        hint="start it with a clean environment (env -i)",
        judge=resource.environment,
    ),
    Point(
        code="executable",
        weight=0.3,
        why="A process keeps the holes that an update has closed until it is started anew.",
        hint="stop and start the guest, or migrate it",
        judge=resource.executable,
    ),
    Point(
        code="terminal",
        weight=0.1,
        why="What it types there is run by the shell of whoever started it.",
        hint="start it in a session of its own (setsid(1))",
        judge=resource.terminal,
    ),
    Point(
        code="dumpable",
        weight=0.1,
        why="A dumpable process can be traced by others of its uid.",
        hint="give it a uid of its own",
        judge=identity.dumpable,
    ),
    Point(
        code="tracer",
        weight=0.2,
        why="A tracer reads and changes all of it.",
        hint="end the tracer, unless you debug this guest yourself",
        judge=identity.tracer,
    ),
    Point(
        code="security-module",
        weight=0.0,
        why="AppArmor or SELinux can confine it once more; kvmsec does not rely on them.",
        hint="nothing to do",
        judge=identity.security_module,
    ),
    Point(
        code="tolerated",
        weight=0.0,
        why="confinement.may_be_missing lets an instance start without a piece of its jail.",
        hint="nothing to do",
        judge=resource.tolerated,
    ),
)

POINTS: Final = (*CONFINEMENT, *ON_TOP)


def judge(facts: Facts) -> tuple[Finding, ...]:
    """Every point's finding, in the order of POINTS."""
    return tuple(_find(point, facts) for point in POINTS)


def _find(point: Point, facts: Facts) -> Finding:
    verdict = point.judge(facts)
    is_open = verdict.state in ("exposed", "unknown")
    return Finding(
        code=point.code,
        exposure=round(point.weight * verdict.part, 2),
        weight=point.weight,
        state=verdict.state,
        message=verdict.message,
        why=point.why,
        hint=verdict.hint or (point.hint if is_open else None),
    )
