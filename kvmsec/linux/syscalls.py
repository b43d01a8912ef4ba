"""The system calls that Python 3.11 has no name for, each as a function that raises `OSError`.

The calls above 423 have the same number on every architecture; the others go by the C library.
"""

import ctypes
import mmap
import os
import signal
from collections.abc import Iterable, Sequence
from functools import cache
from typing import Any, Final

_libc: Final = ctypes.CDLL(None, use_errno=True)
_libc.prctl.argtypes = (ctypes.c_int, *[ctypes.c_ulong] * 4)
_libc.mount.argtypes = (*[ctypes.c_char_p] * 3, ctypes.c_ulong, ctypes.c_char_p)
_libc.signal.argtypes = (ctypes.c_int, ctypes.c_void_p)
_libc.signal.restype = ctypes.c_void_p

_NR_EXECVE: Final = {"x86_64": 59, "aarch64": 221, "riscv64": 221, "s390x": 11, "ppc64le": 11}
_NR_OPEN_TREE: Final = 428
_NR_MOVE_MOUNT: Final = 429
_NR_FSOPEN: Final = 430
_NR_FSCONFIG: Final = 431
_NR_FSMOUNT: Final = 432
_NR_CLONE3: Final = 435
_NR_CLOSE_RANGE: Final = 436
_NR_OPENAT2: Final = 437
_NR_MOUNT_SETATTR: Final = 442
_NR_ADD_KEY: Final = {"x86_64": 248, "aarch64": 217, "riscv64": 217, "s390x": 278, "ppc64le": 269}
_NR_REQUEST_KEY: Final = {
    "x86_64": 249,
    "aarch64": 218,
    "riscv64": 218,
    "s390x": 279,
    "ppc64le": 270,
}
_NR_KEYCTL: Final = {"x86_64": 250, "aarch64": 219, "riscv64": 219, "s390x": 280, "ppc64le": 271}

_IPC_RMID: Final = 0
_OPEN_TREE_CLONE: Final = 1
_MOVE_MOUNT_F_EMPTY_PATH: Final = 4
_FSOPEN_CLOEXEC: Final = 1
_FSCONFIG_CMD_CREATE: Final = 6
_FSMOUNT_CLOEXEC: Final = 1

_FALLOC_FL_KEEP_SIZE: Final = 1
AT_FDCWD: Final = -100
_AT_EMPTY_PATH: Final = 0x1000
_AT_RECURSIVE: Final = 0x8000
_MS_PRIVATE: Final = 1 << 18
MOUNT_ATTR_RDONLY: Final = 0x01
MOUNT_ATTR_NOSUID: Final = 0x02
MOUNT_ATTR_NODEV: Final = 0x04
MOUNT_ATTR_NOEXEC: Final = 0x08
RESOLVE_NO_XDEV: Final = 0x01
RESOLVE_NO_MAGICLINKS: Final = 0x02
RESOLVE_NO_SYMLINKS: Final = 0x04
RESOLVE_BENEATH: Final = 0x08

_CLONE_PARENT: Final = 0x00008000
_CLONE_PIDFD: Final = 0x1000
_CLONE_INTO_CGROUP: Final = 0x200000000

_PR_SET_PDEATHSIG: Final = 1
_PR_GET_PDEATHSIG: Final = 2
_PR_GET_SECCOMP: Final = 21
_PR_SET_SECCOMP: Final = 22
SECCOMP_MODE_FILTER: Final = 2
_CLOSE_RANGE_CLOEXEC: Final = 4
_CAPABILITY_VERSION_3: Final = 0x20080522


def _checked(result: int, path: str | None = None) -> int:
    if result >= 0:
        return result
    number = ctypes.get_errno()
    raise OSError(number, os.strerror(number), path)


def _syscall(number: int, *arguments: Any, path: str | None = None) -> int:
    words = [
        ctypes.c_long(argument) if isinstance(argument, int) else argument for argument in arguments
    ]
    return _checked(_libc.syscall(ctypes.c_long(number), *words), path)


def unshare(flags: int) -> None:
    """Leave namespaces (`unshare(2)`)."""
    _checked(_libc.unshare(ctypes.c_int(flags)))


def setns(descriptor: int, kind: int) -> None:
    """Enter the namespace that a descriptor stands for (`setns(2)`); `kind` 0 takes any."""
    _checked(_libc.setns(ctypes.c_int(descriptor), ctypes.c_int(kind)))


def set_signal_mask(mask: bytes) -> bytes:
    """Block the signals of a mask, and no others; returns the former mask (`sigprocmask(2)`).

    Both as the C library has a sigset_t. `signal.pthread_sigmask` makes an object of each signal,
    which takes half a millisecond for all of them.
    """
    former = ctypes.create_string_buffer(len(mask))
    _checked(_libc.sigprocmask(signal.SIG_SETMASK, mask, former))
    return former.raw


def reset_signals() -> None:
    """Take every signal as the kernel does (`signal(2)`), whatever Python believes from then on."""
    for number in range(1, signal.NSIG):
        _libc.signal(number, None)  # SIGKILL and the C library's own two can't be changed.


class CloneArguments(ctypes.Structure):
    """What clone3(2) is told (`struct clone_args`, Linux 5.7)."""

    _fields_ = tuple(
        (name, ctypes.c_uint64)
        for name in (
            *("flags", "pidfd", "child_tid", "parent_tid", "exit_signal", "stack", "stack_size"),
            *("tls", "set_tid", "set_tid_size", "cgroup"),
        )
    )

    @classmethod
    def of(cls, flags: int, cgroup: int, pidfd: int = 0) -> "CloneArguments":
        """`cgroup` is a descriptor, or -1; `pidfd` the address of a place for one, where wanted."""
        into = _CLONE_INTO_CGROUP if cgroup >= 0 else 0
        # A sibling has the caller's own, and the kernel takes no other for it.
        exit_signal = 0 if flags & _CLONE_PARENT else signal.SIGCHLD
        flags |= into | (_CLONE_PIDFD if pidfd else 0)
        return cls(flags=flags, pidfd=pidfd, exit_signal=exit_signal, cgroup=max(cgroup, 0))


def clone3(flags: int, cgroup: int = -1) -> tuple[int, int]:
    """Fork (`clone3(2)`, Linux 5.7); returns the child's pid and pidfd, in the child (0, -1).

    `cgroup` is a descriptor of a version 2 control group to be born in, or -1. The interpreter's
    own preparation for a fork is the caller's affair.
    """
    pidfd = ctypes.c_int(-1)
    arguments = CloneArguments.of(flags, cgroup, ctypes.addressof(pidfd))
    size = ctypes.c_size_t(ctypes.sizeof(arguments))
    libc = _libc_that_keeps_the_lock()
    pid = _checked(libc.syscall(ctypes.c_long(_NR_CLONE3), ctypes.byref(arguments), size))
    return pid, pidfd.value if pid else -1


@cache
def _libc_that_keeps_the_lock() -> ctypes.PyDLL:
    """For a call that returns twice: the interpreter's lock is not given back meanwhile."""
    return ctypes.PyDLL(None, use_errno=True)


def protect(address: int, size_bytes: int, protection: int) -> None:
    """Say what may be done with some of the caller's memory (`mprotect(2)`)."""
    _checked(_libc.mprotect(ctypes.c_void_p(address), ctypes.c_size_t(size_bytes), protection))


def advise(address: int, size_bytes: int, advice: int) -> bool:
    """Tell the kernel what some of the caller's memory is for (`madvise(2)`); whether it could."""
    return not _libc.madvise(ctypes.c_void_p(address), ctypes.c_size_t(size_bytes), advice)


def resident_pages(address: int, size_bytes: int) -> bytes:
    """A byte for each page of some of the caller's memory: odd where it is there (`mincore(2)`).

    Raises OSError for what is mapped no more.
    """
    found = ctypes.create_string_buffer(-(-size_bytes // mmap.PAGESIZE))
    _checked(_libc.mincore(ctypes.c_void_p(address), ctypes.c_size_t(size_bytes), found))
    return found.raw


def mount(source: str | None, target: str, kind: str | None, flags: int, data: str = "") -> None:
    """Mount a filesystem or change a mount (`mount(2)`)."""
    result = _libc.mount(
        os.fsencode(source) if source else None,
        os.fsencode(target),
        kind.encode() if kind else None,
        flags,
        data.encode() if data else None,
    )
    _checked(result, target)


def umount(target: str, flags: int = 0) -> None:
    """Unmount a filesystem (`umount2(2)`)."""
    _checked(_libc.umount2(os.fsencode(target), ctypes.c_int(flags)), target)


def pivot_root(new: str, old: str) -> None:
    """Make `new` the root and put the former one on `old` (`pivot_root(2)`)."""
    _checked(_libc.pivot_root(os.fsencode(new), os.fsencode(old)), new)


def mount_detached(kind: str) -> int:
    """Mount a filesystem nowhere; returns a descriptor of its root (`fsmount(2)`, Linux 5.2)."""
    context = _syscall(_NR_FSOPEN, kind.encode(), _FSOPEN_CLOEXEC)
    try:
        _syscall(_NR_FSCONFIG, context, _FSCONFIG_CMD_CREATE, None, None, 0)
        return _syscall(_NR_FSMOUNT, context, _FSMOUNT_CLOEXEC, 0)
    finally:
        os.close(context)


def detached_copy(path: str) -> int:
    """A mount of what `path` leads to, mounted nowhere: its descriptor, close-on-exec.

    It is private, whatever the mount shares that it is a copy of, and ends with its last
    descriptor unless it is attached (`open_tree(2)`, `mount_setattr(2)`, Linux 5.12).
    """
    flags = _OPEN_TREE_CLONE | os.O_CLOEXEC
    copy = _syscall(_NR_OPEN_TREE, AT_FDCWD, os.fsencode(path), flags, path=path)
    try:
        _set_mount_attributes(copy, "", _AT_EMPTY_PATH, propagation=_MS_PRIVATE)
    except BaseException:
        os.close(copy)
        raise
    return copy


def attach(mount: int, target: str) -> None:
    """Mount a detached mount on `target` (`move_mount(2)`, Linux 5.2)."""
    place = os.fsencode(target)
    flags = _MOVE_MOUNT_F_EMPTY_PATH
    _syscall(_NR_MOVE_MOUNT, mount, b"", AT_FDCWD, place, flags, path=target)


class _MountAttributes(ctypes.Structure):
    _fields_ = (
        ("attr_set", ctypes.c_uint64),
        ("attr_clr", ctypes.c_uint64),
        ("propagation", ctypes.c_uint64),
        ("userns_fd", ctypes.c_uint64),
    )


def set_mount_attributes(target: str, attributes: int) -> None:
    """Add attributes to a mount and every mount below it (`mount_setattr(2)`, Linux 5.12)."""
    _set_mount_attributes(AT_FDCWD, target, _AT_RECURSIVE, attributes=attributes)


def _set_mount_attributes(
    directory: int, path: str, flags: int, *, attributes: int = 0, propagation: int = 0
) -> None:
    wanted = ctypes.byref(_MountAttributes(attributes, 0, propagation, 0))
    size = ctypes.sizeof(_MountAttributes)
    _syscall(_NR_MOUNT_SETATTR, directory, os.fsencode(path), flags, wanted, size, path=path)


def reserve_space(descriptor: int, size_bytes: int) -> None:
    """Set room aside for a file without changing its size (`fallocate(2)`, KEEP_SIZE)."""
    offset, length = ctypes.c_longlong(0), ctypes.c_longlong(size_bytes)
    _checked(_libc.fallocate(ctypes.c_int(descriptor), _FALLOC_FL_KEEP_SIZE, offset, length))


def remove_sysv_object(kind: str, number: int) -> None:
    """Remove a `shm`, `msg` or `sem` object (`shmctl(2)`, `msgctl(2)`, `semctl(2)`)."""
    if kind == "sem":
        _checked(_libc.semctl(ctypes.c_int(number), 0, _IPC_RMID))
    else:
        control = _libc.shmctl if kind == "shm" else _libc.msgctl
        _checked(control(ctypes.c_int(number), _IPC_RMID, None))


def keyctl(operation: int, *arguments: int | None) -> int:
    """Operate on the kernel's keys (`keyctl(2)`)."""
    return _syscall(_NR_KEYCTL[os.uname().machine], operation, *arguments)


def add_no_key() -> int:
    """Call add_key(2) with nothing: EFAULT where there is such a call. Raises OSError."""
    return _syscall(_NR_ADD_KEY[os.uname().machine], None, None, None, 0, 0)


def request_no_key() -> int:
    """Call request_key(2) with nothing: EFAULT where there is such a call. Raises OSError."""
    return _syscall(_NR_REQUEST_KEY[os.uname().machine], None, None, None, 0)


def prctl(option: int, argument: int = 0) -> int:
    """Operate on the calling process (`prctl(2)`)."""
    return _checked(_libc.prctl(option, argument, 0, 0, 0))


def end_with_parent(number: int = signal.SIGKILL) -> None:
    """Be sent a signal when the parent ends (`PR_SET_PDEATHSIG(2const)`)."""
    prctl(_PR_SET_PDEATHSIG, number)


def signal_at_parents_end() -> int:
    """Which signal that is, 0 without one."""
    number = ctypes.c_int(0)
    prctl(_PR_GET_PDEATHSIG, ctypes.addressof(number))
    return number.value


def outlive_parent() -> None:
    """Take `end_with_parent` back."""
    prctl(_PR_SET_PDEATHSIG, 0)


class _FilterProgram(ctypes.Structure):
    """linux/filter.h, struct sock_fprog."""

    _fields_ = (("length", ctypes.c_ushort), ("instructions", ctypes.c_char_p))


def filter_system_calls(program: bytes) -> None:
    """Have the kernel hold every later call against a program (`seccomp(2)`, SET_MODE_FILTER).

    `program` is struct sock_filter, 8 bytes each. It stays for good, over an exec too, and takes
    no_new_privs.
    """
    given = _FilterProgram(len(program) // 8, program)
    address = ctypes.addressof(given)
    _checked(_libc.prctl(_PR_SET_SECCOMP, SECCOMP_MODE_FILTER, address, 0, 0))


def seccomp_mode() -> int:
    """0, or SECCOMP_MODE_FILTER once there is a filter (`PR_GET_SECCOMP(2const)`)."""
    return prctl(_PR_GET_SECCOMP)


Strings = ctypes.Array[ctypes.c_char_p]
"""Strings as a program is handed them, with a null at their end."""


def strings(texts: Iterable[str]) -> Strings:
    """An argument list or an environment, laid out for `execute`."""
    encoded = [os.fsencode(text) for text in texts]
    return (ctypes.c_char_p * (len(encoded) + 1))(*encoded)


def execute(program: str, argv: Strings, environment: Strings, extra: Sequence[int]) -> None:
    """Become another program (`execve(2)`), with three words in the registers that it ignores.

    Only a filter of system calls sees those. Returns never, or raises.
    """
    first, second, third = extra
    _syscall(
        _NR_EXECVE[os.uname().machine],
        os.fsencode(program),
        argv,
        environment,
        *(ctypes.c_ulong(word) for word in (first, second, third)),
        path=program,
    )


def close_on_exec(first: int) -> None:
    """Mark every descriptor from `first` on close-on-exec (`close_range(2)`, Linux 5.11)."""
    last = ctypes.c_uint(0xFFFFFFFF)
    flags = ctypes.c_uint(_CLOSE_RANGE_CLOEXEC)
    _syscall(_NR_CLOSE_RANGE, ctypes.c_uint(first), last, flags)


class _OpenHow(ctypes.Structure):
    _fields_ = (
        ("flags", ctypes.c_uint64),
        ("mode", ctypes.c_uint64),
        ("resolve", ctypes.c_uint64),
    )


def openat2(directory: int, path: str, flags: int, *, resolve: int) -> int:
    """Open a path that is there under rules of resolution (`openat2(2)`, Linux 5.6)."""
    how = _OpenHow(flags | os.O_CLOEXEC, 0, resolve)
    size = ctypes.sizeof(how)
    return _syscall(_NR_OPENAT2, directory, os.fsencode(path), ctypes.byref(how), size, path=path)


class _CapHeader(ctypes.Structure):
    _fields_ = (("version", ctypes.c_uint32), ("pid", ctypes.c_int))


class _CapData(ctypes.Structure):
    _fields_ = (
        ("effective", ctypes.c_uint32),
        ("permitted", ctypes.c_uint32),
        ("inheritable", ctypes.c_uint32),
    )


def set_capabilities(effective: int, permitted: int, inheritable: int) -> None:
    """Set the caller's capability sets, each a 64-bit mask (`capset(2)`)."""
    header = _CapHeader(_CAPABILITY_VERSION_3, 0)
    low, high = 0xFFFFFFFF, 32
    data = (_CapData * 2)(
        _CapData(effective & low, permitted & low, inheritable & low),
        _CapData(effective >> high, permitted >> high, inheritable >> high),
    )
    _checked(_libc.capset(ctypes.byref(header), ctypes.byref(data)))


def get_capabilities() -> tuple[int, int, int]:
    """The caller's effective, permitted and inheritable sets, each a mask (`capget(2)`)."""
    header = _CapHeader(_CAPABILITY_VERSION_3, 0)
    data = (_CapData * 2)()
    _checked(_libc.capget(ctypes.byref(header), ctypes.byref(data)))
    low, high = data
    return (
        low.effective | high.effective << 32,
        low.permitted | high.permitted << 32,
        low.inheritable | high.inheritable << 32,
    )
