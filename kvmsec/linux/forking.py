"""Forking so that only what the child does next runs in the child.

The calling process must have one thread: a fork copies only the caller's.
"""

import ctypes
import gc
import os
import signal
import time
from collections.abc import Callable
from typing import Final

from kvmsec.linux import in_place, syscalls
from kvmsec.linux.errors import ManyThreads
from kvmsec.linux.namespaces import CLONE_NEWPID, CLONE_PARENT

_THREAD_ENDS_WITHIN_S: Final = 0.1
_SIGNALS: Final = signal.valid_signals() - {signal.SIGKILL, signal.SIGSTOP}
ALL_SIGNALS: Final = b"\xff" * 128
"""A mask of every signal: a sigset_t of glibc's and musl's."""
_NO_SIGNAL: Final = b"\x00" * 128


def fork() -> int:
    """`os.fork`, after which only what the child does next runs in the child.

    Signals wait until the child has dropped the parent's handlers: an interrupt in between would
    raise there, and unwind the parent's code (its undoing of files and locks) a second time. The
    parent's garbage stays the parent's: its finalizers would close descriptors by number. The
    child has every signal at the kernel's default and none blocked.

    Raises ManyThreads: what another thread holds (a lock of the allocator's) is held for ever in
    the child. OSError when the kernel refuses.
    """
    return _fork_by(os.fork, _forget_handlers)


def fork_init() -> tuple[int, int]:
    """Fork the first process of a new PID namespace; returns its pid and pidfd, in it (0, -1).

    It is the caller's own child, with no process in between. Otherwise as `fork`. Raises
    ManyThreads, and OSError. See clone(2), `clone3`.
    """
    return _fork_init_by(_clone_as_python, _forget_handlers)


def clone_init() -> tuple[int, int]:
    """As `fork_init`, for a child of a few system calls that then becomes another program.

    Nothing that Python and libraries registered for a fork is called, in neither process. It puts
    right what other threads may have held, and there are none; and each page that it touches has
    to be copied first: it was two fifths of all that such a child touched.
    """
    return _fork_init_by(_clone, syscalls.reset_signals)


def clone_sibling() -> tuple[int, int]:
    """As `clone_init`, for a child of the caller's own parent (CLONE_PARENT).

    That is told of its end as it would be of the caller's, and may wait for it. The child is in the
    caller's PID namespace.

    The caller is a process that does nothing else: signals stay as it has them, and it collects no
    garbage. Raises OSError. See clone(2), `clone3`.
    """
    return syscalls.clone3(CLONE_PARENT)


def become_sibling_init(cgroup: str | None = None) -> None:
    """Go on as the first process of a new PID namespace, a child of the caller's own parent.

    See `in_place.become_child` for what becomes of the caller, which is as `clone_sibling` asks.
    The child is a member of the version 2 control group at `cgroup` from its birth: to join one
    later takes a grace period of the kernel's, 5 to 10 ms on an idle host. Raises OSError, which
    names the group where that is what was refused.
    """
    group = -1 if cgroup is None else os.open(cgroup, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        in_place.become_child(CLONE_NEWPID | CLONE_PARENT, group)
    except OSError as error:
        raise OSError(error.errno, error.strerror, cgroup) from None
    finally:
        if group >= 0:
            os.close(group)


def _fork_init_by(
    clone: Callable[[], tuple[int, int]], forget_signals: Callable[[], None]
) -> tuple[int, int]:
    pidfd = -1

    def fork() -> int:
        nonlocal pidfd
        pid, pidfd = clone()
        return pid

    return _fork_by(fork, forget_signals), pidfd


def _clone() -> tuple[int, int]:
    return syscalls.clone3(CLONE_NEWPID)


def _clone_as_python() -> tuple[int, int]:
    """What os.fork does around the system call, since Python has no name for this one."""
    ctypes.pythonapi.PyOS_BeforeFork()
    pid, pidfd = -1, -1
    try:
        pid, pidfd = _clone()
    finally:
        if pid == 0:
            ctypes.pythonapi.PyOS_AfterFork_Child()
        else:
            ctypes.pythonapi.PyOS_AfterFork_Parent()
    return pid, pidfd


def _fork_by(clone: Callable[[], int], forget_signals: Callable[[], None]) -> int:
    require_one_thread()
    # What had come before runs its handler no later than at the next call, still in the parent.
    blocked = syscalls.set_signal_mask(ALL_SIGNALS)
    collects = gc.isenabled()
    gc.disable()
    pid = -1
    try:
        pid = clone()
        if pid == 0:
            gc.freeze()
            _call_or_end(forget_signals)
        return pid
    finally:
        if collects:
            gc.enable()
        syscalls.set_signal_mask(_NO_SIGNAL if pid == 0 else blocked)


def require_one_thread() -> None:
    """Raise ManyThreads when there are more; one that was just joined is seen a moment longer.

    The kernel tells nobody when it is gone, so this looks again every millisecond.
    """
    deadline = time.monotonic() + _THREAD_ENDS_WITHIN_S
    while (threads := len(os.listdir("/proc/self/task"))) > 1:
        if time.monotonic() >= deadline:
            raise ManyThreads(threads)
        time.sleep(0.001)


def _call_or_end(function: Callable[[], None]) -> None:
    try:
        function()
    except BaseException:
        os._exit(1)  # Anything else would let it into the parent's code.


def _forget_handlers() -> None:
    """Every signal as the kernel has it, for who goes on in Python."""
    signal.set_wakeup_fd(-1)
    for number in _SIGNALS:
        if signal.getsignal(number) is not signal.SIG_DFL:
            signal.signal(number, signal.SIG_DFL)
