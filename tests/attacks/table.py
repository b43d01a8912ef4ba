"""The table of attacks: what is tried from inside an instance, and which lock refuses it."""

from typing import Final

from tests.attacks import host
from tests.attacks.attack import Attack, Control, Refusal, Without, in_room
from tests.attacks.networks import NETWORKS
from tests.attacks.refusals import (
    CAPABILITIES,
    KILLED,
    NETWORK,
    NO_LOCKS,
    NO_SUCH_CALL,
    NOEXEC,
    NOT_PERMITTED,
    OPEN,
    OWNER,
    OWNER_OF_PROCESS,
    PIDS,
    TREE,
)

OTHER_INSTANCE: Final = in_room(
    "another instance",
    Attack("signal", "signal {pid}", PIDS, uid=OWNER_OF_PROCESS),
    Attack("signal-by-descriptor", "signal-by-descriptor {pid}", PIDS, uid=OWNER_OF_PROCESS),
    Attack("ptrace", "trace {pid}", KILLED, second=PIDS, uid=OWNER_OF_PROCESS),
    Attack("read-memory", "read-memory {pid} {address}", KILLED, second=PIDS, uid=OWNER_OF_PROCESS),
    Attack("take-descriptor", "take-descriptor {pid} 1", PIDS, uid=OWNER_OF_PROCESS),
    Attack("proc-mem", "read /proc/{pid}/mem {address}", TREE, uid=OWNER),
    Attack("proc-environ", "read /proc/{pid}/environ", TREE, uid=OWNER),
    Attack("proc-fd", "list /proc/{pid}/fd", TREE, uid=OWNER),
    Attack("proc-maps", "read /proc/{pid}/maps", TREE, uid=OWNER),
    Attack("proc-cmdline", "read /proc/{pid}/cmdline", TREE),
    Attack("open-disk", "open-to-write {disk}", TREE, uid=OWNER),
    Attack("connect-qmp", "connect {qmp}", TREE, uid=OWNER),
    Attack("connect-serial", "connect {serial}", TREE, uid=OWNER),
    Attack("open-log", "read {log}", TREE, uid=OWNER),
    Attack("open-output", "list {output}", TREE, uid=OWNER),
    Attack(
        "connect-abstract",
        "connect-abstract {abstract} /proc/{pid}/ns/net",
        Refusal("network namespace", "ECONNREFUSED"),
    ),
    Attack(
        "connect-abstract-of-host",
        "connect-abstract {host_abstract} none",
        Refusal("network namespace", "ECONNREFUSED"),
    ),
    # Its monitor's socket was made outside: it finds that name, and is in use for good.
    Attack(
        "connect-abstract-by-granted",
        "connect-abstract-by-granted {host_abstract}",
        Refusal("descriptors", "EINVAL|EISCONN"),
    ),
    Attack("join-by-path", "join-by-path {pid}", TREE, second=TREE, uid=OWNER),
    Attack("join-by-descriptor", "join-by-descriptor {pid}", PIDS, uid=OWNER_OF_PROCESS),
    Attack(
        "shared-memory",
        "attach-shared-memory {segment} /proc/{pid}/ns/ipc",
        NO_SUCH_CALL,
        second=Refusal("IPC namespace", "ENOENT"),
    ),
    Attack(
        "message-queue",
        "open-message-queue {queue} /proc/{pid}/ns/ipc",
        NO_SUCH_CALL,
        second=Refusal("IPC namespace", "ENOENT"),
    ),
    Attack(
        "semaphore",
        "open-semaphore {segment} /proc/{pid}/ns/ipc",
        NO_SUCH_CALL,
        second=Refusal("IPC namespace", "ENOENT"),
    ),
    Attack(
        "read-key",
        "read-key {key}",
        NO_SUCH_CALL,
        second=Refusal("uid", "ENOKEY"),
        shared_second="user|none",
        control=Control(attacker="victim"),
    ),
    Attack(
        "drain-inotify",
        "drain-inotify",
        Refusal("seccomp", "UNHURT"),
        second=Refusal("uid", "UNHURT"),
        shared_second="user|none",
        control=Control(attacker="victim"),
    ),
    Attack(
        "drain-keys",
        "drain-keys",
        Refusal("seccomp", "UNHURT"),
        second=Refusal("uid", "UNHURT"),
        shared_second="user",
        control=Control(attacker="victim"),
    ),
    Attack(
        "drain-message-queues",
        "drain-message-queues",
        Refusal("seccomp", "UNHURT"),
        second=Refusal("limits", "UNHURT"),
        control=Control(attacker="victim"),
    ),
    *(
        Attack(
            f"drain-{what}",
            f"drain-{what}",
            Refusal("a uid of its own", "UNHURT"),
            shared="user|none",
            control=Control(attacker="victim"),
        )
        for what in ("signals", "pipes", "inflight")
    ),
    Attack(
        "drain-processes",
        "drain-processes 1500 all",
        Refusal("control group", "UNHURT"),
        # That the victim notices what isn't bounded is to be seen, too.
        control=Control("drain-processes 1500", attacker="victim"),
    ),
)

HOST_FILES: Final = in_room(
    "the node's files",
    Attack(
        "anything-writable",
        "walk-writable / {place} {devices}",
        Refusal("read-only tree", "NONE"),
        control=Control("walk-writable /etc"),
    ),
    Attack(
        "any-set-uid",
        "walk-set-uid / {place}",
        Refusal("root tree", "NONE"),
        control=Control("walk-set-uid /usr/bin"),
    ),
    Attack(
        "any-device",
        "walk-devices / {devices}",
        Refusal("root tree", "NONE"),
        control=Control("walk-devices /dev"),
    ),
    Attack("make-device", "make-device {place}", CAPABILITIES),
    Attack("proc-sys", "open-to-write /proc/sys/kernel/core_pattern", TREE),
    Attack("proc-root", "list /proc/1/root", TREE),
    Attack("sys", "list /sys/kernel", TREE),
    Attack("cgroup-files", "open-to-write {cgroup}", TREE, uid=OWNER),
    Attack("shadow", "read /etc/shadow", TREE, uid=OWNER),
    Attack("mount", "mount {place}", KILLED, second=CAPABILITIES),
    Attack("mount-proc", "mount-proc {place}", KILLED, second=CAPABILITIES),
    Attack("mount-new-way", "mount-new-way", KILLED, second=CAPABILITIES),
    Attack("clone-tree", "clone-tree", KILLED, second=CAPABILITIES),
    Attack(
        "escape-chroot",
        "escape-chroot {place} /etc/shadow",
        KILLED,
        second=CAPABILITIES,
        control=Control("escape-chroot / /etc/shadow", changes_root=True),
    ),
    Attack(
        "dot-dot",
        "dot-dot {place} /etc/shadow",
        Refusal("root tree", "ENOENT"),
        control=Control(changes_root=True),
    ),
    Attack(
        "dot-dot-of-descriptors",
        "dot-dot-of-descriptors {place} /etc/shadow",
        Refusal("descriptors", "ENOTDIR"),
        control=Control(changes_root=True),
    ),
    Attack("open-by-handle", "open-by-handle {program}", NOT_PERMITTED, second=CAPABILITIES),
    Attack("io-uring", "make-io-uring", NOT_PERMITTED, second=OPEN),
    Attack("execute-memory", "execute-memory", KILLED, second=OPEN),
    Attack("execute-output", "execute-output {place}", KILLED, second=NOEXEC),
    Attack("add-key", "add-key", NO_SUCH_CALL, second=OPEN),
    Attack(
        "request-key",
        "request-key {key}",
        NO_SUCH_CALL,
        second=Refusal("session keyring", "ENOKEY"),
        control=Control("request-key {key} login", attacker="victim"),
    ),
    Attack("persistent-keyring", "persistent-keyring", NO_SUCH_CALL, second=OPEN),
    Attack("session-keyring", "session-keyring", NO_SUCH_CALL, second=OPEN),
)


PRIVILEGES: Final = in_room(
    "privileges",
    Attack("become-root", "become-root", KILLED, second=CAPABILITIES),
    Attack("become-another", "become-another {other_uid}", KILLED, second=CAPABILITIES),
    Attack("take-group", "take-group", KILLED, second=CAPABILITIES),
    Attack(
        "execute-set-uid",
        "execute-set-uid {place}/program",
        KILLED,
        second=NOEXEC,
        control=Control("execute-set-uid {set_uid}", attacker="somebody"),
    ),
    Attack("file-capability", "set-file-capability {place}/program", CAPABILITIES),
    Attack("user-namespace", "user-namespace", NOT_PERMITTED, second=OPEN),
    Attack("user-namespace-by-clone", "user-namespace-by-clone", KILLED, second=OPEN),
    Attack("user-namespace-by-clone3", "user-namespace-by-clone3", NO_SUCH_CALL, second=OPEN),
    Attack(
        "mount-in-user-namespace", "mount-in-user-namespace {place}", NOT_PERMITTED, second=OPEN
    ),
    Attack("network-in-user-namespace", "network-in-user-namespace", NOT_PERMITTED, second=OPEN),
    Attack(
        "newuidmap",
        "execute /usr/bin/newuidmap",
        TREE,
        control=Control(
            unless=Without(
                "ENOENT", "no package of this host has newuidmap", host.has_no_newuidmap
            ),
        ),
    ),
    Attack("uid-map", "open-to-write /proc/self/uid_map", TREE),
    Attack(
        "load-module",
        "load-module",
        KILLED,
        second=Refusal("no capability", host.of_modules),
        # What is loaded is no module: whoever may load one is told so.
        control=Control(
            answers="ENOEXEC",
            unless=Without("ENOSYS", "this kernel loads no modules", host.has_no_modules),
        ),
    ),
    Attack("bpf", "make-bpf-map", NOT_PERMITTED, second=CAPABILITIES),
    Attack(
        "perf",
        "watch-by-perf",
        NOT_PERMITTED,
        second=Refusal("kernel.perf_event_paranoid", host.of_perf),
        control=Control(
            unless=Without("ENOSYS", "this kernel has no perf", host.has_no_perf),
        ),
    ),
    Attack("userfaultfd", "handle-faults", NOT_PERMITTED, second=OPEN),
    Attack(
        "kernel-log",
        "read-kernel-log",
        KILLED,
        second=Refusal("kernel.dmesg_restrict", host.of_kernel_log),
    ),
    Attack(
        "raise-limit",
        "raise-limit",
        CAPABILITIES,
        control=Control(
            unless=Without(
                "EPERM", "root may raise no limit in this container", host.raises_no_limit
            )
        ),
    ),
    Attack("run-first", "run-first", CAPABILITIES),
)

LAUNCHER: Final = in_room(
    "the launcher",
    *(
        Attack(
            f"plant-{what}",
            f"plant {{paths_of_{what}}}",
            TREE,
            uid=OWNER,
            # Each has a place of its own: what one planted, the next would write through.
            control=Control(f"plant {{scratch}}-{what}"),
        )
        for what in ("record", "sockets", "logs", "jail", "locks", "leases", "state")
    ),
    Attack("hold-lease", "hold-lock {lease}", TREE, uid=OWNER),
    Attack("hold-instance-lock", "hold-lock {instance_lock}", TREE, uid=OWNER),
    Attack("drop-locks", "drop-locks", Refusal("records", "HELD")),
)

RESOURCES: Final = in_room(
    "resources",
    Attack("fill-output", "fill {place} 64", Refusal("sized tmpfs", "ENOSPC")),
    Attack("fill-with-files", "fill-with-files {place} 4000", Refusal("sized tmpfs", "ENOSPC")),
    Attack("core", "dump-core {place}", Refusal("limits", "EPERM")),
    Attack(
        "descriptor-hog",
        "hog-descriptors 150000",
        Refusal("limits", "EMFILE"),
        control=Control("hog-descriptors {many}"),
    ),
    # The second lock would be the control group's, and the kernel charges it nothing for these.
    Attack("lock-hog", "hog-locks 2000", NO_LOCKS, second=OPEN),
    Attack("aio-hog", "hog-requests 128", NO_SUCH_CALL, second=OPEN),
    Attack(
        "log-flood",
        "flood-log {ipv4} {ipv6} 2000",
        NETWORK,
        rules=Refusal("rate of the log rule", "LIMITED"),
        control=Control(attacker="somebody"),
    ),
    Attack("fork-bomb", "fork-bomb 4000", Refusal("control group", "EAGAIN")),
    # The last: it may end the whole instance.
    Attack("memory-hog", "hog-memory 2048", Refusal("control group", host.of_memory)),
)

ATTACKS: Final = (*OTHER_INSTANCE, *HOST_FILES, *PRIVILEGES, *NETWORKS, *LAUNCHER, *RESOURCES)
