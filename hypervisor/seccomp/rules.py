"""Which system calls a jailed process may not make: one table, each rule with its reason.

Everything is allowed but what stands here. QEMU, its libraries and the C library call what they
like of the harmless rest, so that no update of theirs ends a guest; a list of what is allowed
would have to be right for every version of each of them.

There are three kinds of answer.

KILL where QEMU never makes the call under our command lines, and no library that it loads does:
whoever makes it has taken the process over, and gets no second try. The process ends with SIGSYS,
the instance is shown as crashed by it, and the kernel's log has a line (audit type 1326) with uid,
pid and the call's number. QEMU's own filter does the same with what it denies.

An error where the call is made, or will be, by code that only asks whether it may: QEMU tries
bpf(2) for a tap's receive-side scaling and userfaultfd(2) before a migration, and can do without
either. The error is the one that a kernel gives which has the call switched off (EPERM) or left
out (ENOSYS): what programs are written to live with. Nothing is logged then, for a taken-over
process could fill the node's log with it.

Not here, on purpose: `fork`. QEMU's own filter ends it at one (spawn=deny), the PID namespace and
the control group end what comes of it. `execve` isn't here either, since no comparison of this
table tells the first one from the second: see `hypervisor.seccomp.gate`. `ioctl` with TIOCSTI and
its like: no terminal can be had in the jail, neither by a path nor as a descriptor. The rules for
`ioctl` cost every KVM_RUN some 50 ns, for the kernel remembers only which calls are always
allowed.

Not here either: a filter of the process's own that has each of its calls logged (seccomp(2),
SECCOMP_RET_LOG). What a filter answers is in memory, and QEMU has to load its own. The node's
setting kernel.seccomp.actions_logged decides, at which `kvmsec doctor` looks.
"""

import errno
import fcntl
import socket
from enum import Enum
from typing import Final, Literal

from attrs import frozen

from kvmsec.linux import namespaces

_SECCOMP_RET_ERRNO: Final = 0x00050000  # linux/seccomp.h

NEWEST: Final = 456
"""The last call that was looked at (futex_requeue, Linux 6.7); later ones don't exist inside.

They are ENOSYS, as on an older kernel, until somebody has thought about them.
"""


class Answer(Enum):
    """What the kernel answers a call; the values are its own (linux/seccomp.h)."""

    KILL = 0x80000000
    NOT_PERMITTED = _SECCOMP_RET_ERRNO | errno.EPERM
    NO_SUCH_CALL = _SECCOMP_RET_ERRNO | errno.ENOSYS
    NO_LOCKS = _SECCOMP_RET_ERRNO | errno.ENOLCK
    NO_SUCH_FAMILY = _SECCOMP_RET_ERRNO | errno.EAFNOSUPPORT

    @property
    def errno(self) -> int | None:
        """The error that the caller gets, None for one that is killed."""
        return None if self is Answer.KILL else self.value & 0xFFFF


@frozen
class Comparison:
    """One of a call's arguments (from 0) held against a number, all 64 bits of it.

    "masked": equal once only the bits of `mask` are left. The kernel looks at 32 bits of an `int`:
    where the rest must not matter, the mask is to leave it out.
    """

    argument: int
    operator: Literal["equal", "greater", "masked"]
    value: int
    mask: int = 0


@frozen
class Rule:
    """Calls that get one answer, and why.

    when: at least one of these must hold; without any, the calls are denied as such.
    source: what says what the call does.
    """

    calls: tuple[str, ...]
    answer: Answer
    reason: str
    source: str
    when: tuple[Comparison, ...] = ()


_NAMESPACES: Final = (
    namespaces.CLONE_NEWNS,
    namespaces.CLONE_NEWCGROUP,
    namespaces.CLONE_NEWUTS,
    namespaces.CLONE_NEWIPC,
    namespaces.CLONE_NEWUSER,
    namespaces.CLONE_NEWPID,
    namespaces.CLONE_NEWNET,
)
_TYPE_BITS: Final = 0xF  # include/linux/net.h, SOCK_TYPE_MASK; the other bits are flags

# Few comparisons, for the kernel's work at each load grows with them. What has bits set above an
# int's is greater than any number here, and so denied.
_OTHER_FAMILIES: Final = (  # all but AF_UNIX (1), AF_INET (2) and AF_INET6 (10)
    *(Comparison(0, "equal", family) for family in (0, 3, 8, 9)),
    Comparison(0, "masked", 4, 4),  # 4 to 7
    Comparison(0, "greater", 10),
)
_OTHER_TYPES: Final = (  # all but SOCK_STREAM (1) and SOCK_DGRAM (2): raw, packet, SCTP's, DCCP's
    *(Comparison(1, "masked", kind, _TYPE_BITS) for kind in (0, 3)),
    Comparison(1, "masked", 4, 4),  # 4 to 7
    Comparison(1, "masked", 8, 8),  # 8 to 15
)
_OTHER_PROTOCOLS: Final = (  # all but the family's own (0), TCP (6) and UDP (17)
    *(Comparison(2, "equal", protocol) for protocol in (1, 2, 3, 4, 5, 7, 16)),
    Comparison(2, "masked", 8, 8),  # 8 to 15
    Comparison(2, "greater", 17),
)

_INT: Final = 0xFFFFFFFF
_BINDING: Final = (socket.SO_BINDTODEVICE, 62)  # SO_BINDTOIFINDEX, asm-generic/socket.h
_LOCKS_OF_FILES: Final = tuple(
    Comparison(1, "masked", command, _INT)
    for command in (fcntl.F_SETLK, fcntl.F_SETLKW, fcntl.F_OFD_SETLK, fcntl.F_OFD_SETLKW)
)

# linux/if_tun.h, _IOW('T', NUMBER, int)
_TUNSETDEBUG: Final = 0x400454C9
_TUNSETIFF: Final = 0x400454CA
_TUNSETPERSIST: Final = 0x400454CB
_TUNSETOWNER: Final = 0x400454CC
_TUNSETGROUP: Final = 0x400454CE
_TUNSETCARRIER: Final = 0x400454E2
_OF_TAPS: Final = (
    *(_TUNSETDEBUG, _TUNSETIFF, _TUNSETPERSIST, _TUNSETOWNER, _TUNSETGROUP, _TUNSETCARRIER),
)

# The second byte of a request says what it is for (userspace-api/ioctl/ioctl-number.rst).
_KIND_BITS: Final = 0xFF00
_OF_SOCKETS: Final = 0x8900  # linux/sockios.h; a tap knows the one for its address as well
_OF_WIRELESS: Final = 0x8B00  # linux/wireless.h
_OF_RESERVATIONS: Final = 0x7000  # linux/pr.h
_OF_LOOPS: Final = 0x4C00  # linux/loop.h

RULES: Final = (
    # Namespaces
    Rule(
        ("clone",),
        Answer.KILL,
        "a user namespace gives all capabilities within it, and with them most kernel bugs",
        "clone(2), user_namespaces(7)",
        tuple(Comparison(0, "masked", flag, flag) for flag in _NAMESPACES),
    ),
    Rule(
        ("clone3",),
        Answer.NO_SUCH_CALL,
        "its flags are in memory, where no filter sees them; the C library takes clone then",
        "clone(2)",
    ),
    Rule(("setns",), Answer.KILL, "no namespace but the jail's", "setns(2)"),
    Rule(
        ("unshare",),
        Answer.NOT_PERMITTED,
        "as clone; an error, for the jail tries itself with it",
        "unshare(2)",
    ),
    # The tree
    Rule(
        (
            *("mount", "umount2", "pivot_root", "chroot"),
            *("open_tree", "move_mount", "mount_setattr"),
            *("fsopen", "fsconfig", "fsmount", "fspick"),
        ),
        Answer.KILL,
        "the tree is what it is: the old and the new way to mount, and another root",
        "mount(2), pivot_root(2), chroot(2), fsopen(2), mount_setattr(2)",
    ),
    Rule(
        ("open_by_handle_at",),
        Answer.KILL,
        "opens a file of any tree by its inode, past the root",
        "open_by_handle_at(2)",
    ),
    Rule(
        ("name_to_handle_at",),
        Answer.NOT_PERMITTED,
        "of use for the above alone; libraries ask by it whether two mounts are one",
        "open_by_handle_at(2)",
    ),
    Rule(
        ("fanotify_init", "fanotify_mark"),
        Answer.NOT_PERMITTED,
        "watches what others do with files",
        "fanotify(7)",
    ),
    # Programs and other processes
    Rule(
        ("execveat",),
        Answer.KILL,
        "starts a program from a descriptor, a memfd's too: no file of the tree is needed",
        "execveat(2)",
    ),
    Rule(
        ("ptrace", "process_vm_readv", "process_vm_writev", "kcmp", "pidfd_getfd"),
        Answer.KILL,
        "reach into another process, which under `user` may be another guest's",
        "ptrace(2), process_vm_readv(2), kcmp(2), pidfd_getfd(2)",
    ),
    Rule(
        ("process_madvise", "process_mrelease", "migrate_pages", "move_pages"),
        Answer.NOT_PERMITTED,
        "move another process's memory; allocators try them on their own",
        "process_madvise(2), migrate_pages(2), move_pages(2)",
    ),
    # What outlives a process, or is shared beyond it
    Rule(
        ("add_key", "request_key", "keyctl"),
        Answer.NO_SUCH_CALL,
        "keys stay with a uid after its processes, for its next holder to find",
        "keyrings(7)",
    ),
    Rule(
        (
            *("shmget", "shmat", "shmctl", "shmdt", "semget", "semop", "semctl", "semtimedop"),
            *("msgget", "msgsnd", "msgrcv", "msgctl"),
        ),
        Answer.NO_SUCH_CALL,
        "System V objects outlive their maker and are found by number",
        "sysvipc(7)",
    ),
    Rule(
        (
            *("mq_open", "mq_unlink", "mq_notify", "mq_getsetattr"),
            *("mq_timedsend", "mq_timedreceive"),
        ),
        Answer.NO_SUCH_CALL,
        "queues outlive their maker",
        "mq_overview(7)",
    ),
    # What the kernel keeps for a process and charges to nobody
    Rule(
        ("fcntl",),
        Answer.NO_LOCKS,
        "a lock for each byte of a file, 200 bytes of the kernel's each, past the control group; "
        "flock(2) has one a file. Images are locked for QEMU: see hypervisor.images.locks",
        "fcntl(2), F_OFD_SETLK",
        _LOCKS_OF_FILES,
    ),
    Rule(
        ("ioctl",),
        Answer.NOT_PERMITTED,
        "a tap is the node's, and its holder needs no capability to have the kernel log each "
        "ioctl on it, at no rate (200,000 lines a second), to make it stay and give it away, to "
        "have its link go up and down, or, once somebody has deleted it, to take another one that "
        "nobody holds",
        "ioctl(2); drivers/net/tun.c, tun_chr_ioctl, tun_set_iff",
        tuple(Comparison(1, "masked", request, _INT) for request in _OF_TAPS),
    ),
    Rule(
        ("ioctl",),
        Answer.NOT_PERMITTED,
        "the sockets that it was granted are of the node's network, and tell its interfaces, "
        "addresses and counters; a tap takes one of these for the address of the node's end: a "
        "bridge takes its ports' lowest for its own, and what is sent to any of them",
        "netdevice(7); net/socket.c, sock_ioctl; net/bridge/br_if.c",
        tuple(Comparison(1, "masked", kind, _KIND_BITS) for kind in (_OF_SOCKETS, _OF_WIRELESS)),
    ),
    Rule(
        ("ioctl",),
        Answer.NOT_PERMITTED,
        "a block device for a disk may be a part of something larger, and whoever may write to it "
        "reserves all of what is below a logical volume, for other nodes too and beyond a reboot "
        "(since Linux 6.5 without a capability), or has a loop device show all of the file that it "
        "is a window of",
        "ioctl(2); Documentation/block/pr.rst; block/ioctl.c, blkdev_pr_allowed; "
        "drivers/block/loop.c, lo_ioctl",
        tuple(Comparison(1, "masked", kind, _KIND_BITS) for kind in (_OF_RESERVATIONS, _OF_LOOPS)),
    ),
    # Parts of the kernel with a history of holes, none of which QEMU needs
    Rule(
        ("bpf", "perf_event_open", "userfaultfd"),
        Answer.NOT_PERMITTED,
        "programs in the kernel, its counters, and page faults that an attacker times",
        "bpf(2), perf_event_open(2), userfaultfd(2)",
    ),
    Rule(
        ("io_uring_setup", "io_uring_enter", "io_uring_register"),
        Answer.NOT_PERMITTED,
        "whatever is asked for in a ring is done past this filter, sockets included",
        "io_uring(7); Documentation/admin-guide/sysctl/kernel.rst, io_uring_disabled",
    ),
    Rule(
        ("inotify_init", "inotify_init1"),
        Answer.NOT_PERMITTED,
        "the kernel counts them by uid, so that one instance of a user could use up all of them",
        "inotify(7), max_user_instances",
    ),
    Rule(
        ("memfd_secret",),
        Answer.NOT_PERMITTED,
        "memory that root of the node can't look at",
        "memfd_secret(2)",
    ),
    # The machine itself: without a capability all of it is refused anyway
    Rule(
        (
            *("init_module", "finit_module", "delete_module", "kexec_load", "kexec_file_load"),
            *("reboot", "swapon", "swapoff", "acct", "quotactl", "quotactl_fd", "syslog"),
            *("sethostname", "setdomainname", "vhangup", "iopl", "ioperm"),
            *("settimeofday", "clock_settime", "clock_adjtime", "adjtimex"),
        ),
        Answer.KILL,
        "the node's kernel, power, clock, swap, log, quotas, terminals and ports",
        "capabilities(7)",
    ),
    Rule(
        (
            *("setuid", "setgid", "setreuid", "setregid", "setresuid", "setresgid"),
            *("setfsuid", "setfsgid", "setgroups", "capset"),
        ),
        Answer.KILL,
        "the uid is final before QEMU's first instruction",
        "credentials(7)",
    ),
    # Old ways
    Rule(
        ("personality",),
        Answer.NOT_PERMITTED,
        "switches address randomization off for what is executed next, and readable to executable",
        "personality(2)",
    ),
    Rule(
        ("modify_ldt", "remap_file_pages", "lookup_dcookie", "ustat", "sysfs"),
        Answer.NO_SUCH_CALL,
        "nothing of today calls them, and a kernel may have left them out",
        "modify_ldt(2), remap_file_pages(2), lookup_dcookie(2), ustat(2), sysfs(2)",
    ),
    # Sockets
    Rule(
        ("socket",),
        Answer.NO_SUCH_FAMILY,
        "no vsock (which no packet rule covers), netlink, packet, crypto or other family; of the "
        "Internet's protocols TCP and UDP: to ask for another has the kernel load its module",
        "socket(2), address_families(7)",
        (*_OTHER_FAMILIES, *_OTHER_TYPES, *_OTHER_PROTOCOLS),
    ),
    Rule(
        ("setsockopt",),
        Answer.NOT_PERMITTED,
        "a socket that was granted is of the node's network, and bound to an interface by number "
        "it tells that one's name",
        "socket(7), SO_BINDTODEVICE; net/core/sock.c, sock_bindtoindex",
        # Of other levels these numbers are nothing that QEMU sets.
        tuple(Comparison(2, "masked", option, _INT) for option in _BINDING),
    ),
    Rule(
        ("socketpair",),
        Answer.NO_SUCH_FAMILY,
        "as socket; pairs are AF_UNIX's (1)",
        "socketpair(2)",
        (Comparison(0, "equal", 0), Comparison(0, "greater", 1)),
    ),
)
