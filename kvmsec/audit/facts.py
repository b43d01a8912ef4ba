"""What was read of a process: plain values, bounded, every foreign text in them escaped.

A part that could not be read is None, and `Facts.unread` says why: it is never taken for fine.
"""

from collections.abc import Mapping
from typing import Final, Literal

from attrs import field, frozen

CoreSink = Literal["file", "program", "socket"]
"""What the kernel hands the core of a process that crashes to (core(5))."""
NAMESPACES: Final = ("mnt", "net", "pid", "ipc", "uts", "cgroup", "user", "time")


@frozen(kw_only=True)
class Credentials:
    """Who it is; of threads that differ, the most that any of them has.

    `uids` and `gids` hold every real, effective, saved and filesystem id of any thread; `user` is
    None for a uid without a name. `group_names` are those of `groups`, `own_group_names` those of
    `gids`. `capabilities` are five masks: inheritable, permitted, effective,
    bounding, ambient. `seccomp_filters` is None where the kernel doesn't count them (before 5.9).
    """

    uids: tuple[int, ...]
    gids: tuple[int, ...]
    groups: tuple[int, ...]
    capabilities: tuple[int, int, int, int, int]
    no_new_privs: bool
    seccomp: int
    seccomp_filters: int | None
    umask: int | None = None
    tracer_pid: int = 0
    user: str | None = None
    has_login_shell: bool = False
    group_names: tuple[str, ...] = ()
    own_group_names: tuple[str, ...] = ()

    @property
    def uid(self) -> int:
        """The lowest of its uids: root where any of them is."""
        return min(self.uids)


@frozen
class Sharers:
    """Other processes with one of its uids, outside the process's own PID namespace."""

    processes: int
    qemus: int


@frozen
class Namespaces:
    """Kinds of namespaces (namespaces(7)) that it shares with the host, and that are its own.

    `interfaces` are those of its own network namespace, None where it shares the host's.
    """

    shared: tuple[str, ...]
    own: tuple[str, ...]
    interfaces: tuple[str, ...] | None = None


@frozen(kw_only=True)
class File:
    """A file or block device that it has open: its permissions are those of the file itself.

    `is_reachable`: every directory above lets anybody pass, as far as that could be told.
    """

    path: str
    mode: int
    uid: int
    is_written: bool
    is_block_device: bool = False
    is_reachable: bool = True


@frozen(kw_only=True)
class Descriptors:
    """What it holds open; `devices` are character devices beyond the harmless ones."""

    has_kvm_machine: bool
    files: tuple[File, ...] = ()
    devices: tuple[str, ...] = ()


@frozen(kw_only=True)
class UnixListener:
    """A unix socket that it listens on; `mode` is None when its file was not found.

    `is_open` says whether anybody on the host can connect; None when the search was given up.
    """

    path: str
    mode: int | None
    is_open: bool | None


@frozen(kw_only=True)
class Sockets:
    """The sockets that it holds; addresses are `tcp 127.0.0.1:5900` and the like.

    `of_host` are those in the host's network namespace, `unplaced` counts those that no table of
    either namespace lists (vsock, or a third namespace).
    """

    tcp_listeners: tuple[str, ...] = ()
    of_host: tuple[str, ...] = ()
    unix_listeners: tuple[UnixListener, ...] = ()
    unplaced: int = 0


@frozen(kw_only=True)
class Tree:
    """What it can reach by path.

    `kind`: the host's own root, another directory of the host's mounts (chroot), or a tree of its
    own. `writable` are paths that its ids may write, `sized` those of them on a tmpfs of limited
    size where nothing can be executed; `devices` are nodes that it may open beyond the harmless
    ones; `set_uid` are set-uid and set-gid programs; `kernel` are mounts of proc, sysfs and the
    like. `is_cut` says that there was more than the reader looks at.
    """

    kind: Literal["host", "chroot", "own"]
    writable: tuple[str, ...] = ()
    sized: tuple[str, ...] = ()
    devices: tuple[str, ...] = ()
    set_uid: tuple[str, ...] = ()
    kernel: tuple[str, ...] = ()
    is_cut: bool = False


@frozen(kw_only=True)
class ControlGroup:
    """Its control groups: the least of each limit from its own group up to the top.

    `memory_bytes`, `pids` and `cpus` are None without a limit; `has_cpu_share` says that a weight
    other than the default is set; `others` are further processes in the group of its own.
    """

    paths: tuple[str, ...]
    memory_bytes: int | None = None
    pids: int | None = None
    cpus: float | None = None
    has_cpu_share: bool = False
    others: int = 0


@frozen
class Limit:
    """A resource limit (getrlimit(2)); None is unlimited."""

    soft: int | None
    hard: int | None


@frozen(kw_only=True)
class Arguments:
    """What its arguments say; it can rewrite them, so they prove nothing by themselves.

    `sandbox` are the settings of -sandbox, None without one; `secrets` name options that hold one,
    never its value; `exposed` are options that ask for a listener on TCP.
    """

    name: str | None = None
    sandbox: Mapping[str, str] | None = None
    secrets: tuple[str, ...] = ()
    exposed: tuple[str, ...] = ()
    hides_memory_from_cores: bool = False


@frozen(kw_only=True)
class Coverage:
    """Whether rules of the host drop all that its uid sends, by family, and which tables do."""

    ipv4: bool
    ipv6: bool
    rules: tuple[str, ...] = ()


@frozen(kw_only=True)
class Canary:
    """What became of packets that were sent as its uid: `sent` are those that were not refused."""

    refused: tuple[str, ...]
    sent: tuple[str, ...]


@frozen(kw_only=True)
class Facts:
    """One process at one moment; `start_ticks` tells it from another with its pid."""

    pid: int
    start_ticks: int
    comm: str
    executable: str | None = None
    is_executable_deleted: bool = False
    instance: str | None = None
    tolerated: tuple[str, ...] = ()
    credentials: Credentials | None = None
    sharers: Sharers | None = None
    namespaces: Namespaces | None = None
    descriptors: Descriptors | None = None
    sockets: Sockets | None = None
    tree: Tree | None = None
    control_group: ControlGroup | None = None
    limits: Mapping[str, Limit] | None = None
    core_goes_to: CoreSink | None = None
    is_dumpable: bool | None = None
    oom_score_adj: int | None = None
    has_terminal: bool = False
    label: str | None = None
    arguments: Arguments | None = None
    secret_variables: tuple[str, ...] | None = None
    coverage: Coverage | None = None
    canary: Canary | None = None
    unread: Mapping[str, str] = field(factory=dict)

    @property
    def name(self) -> str:
        """The instance's name, else the one in its arguments, else the process's."""
        claimed = self.arguments.name if self.arguments else None
        return self.instance or claimed or self.comm
