"""Forking so that only what the child does next runs in the child.

The calling process must have one thread: a fork copies only the caller's.
"""

import ctypes
import gc
import os
import signal
import time
from collections.abc import Callable, Collection
from typing import Final

from kvmsec.linux import syscalls
from kvmsec.linux.errors import ManyThreads
from kvmsec.linux.namespaces import CLONE_NEWPID

_THREAD_ENDS_WITHIN_S: Final = 0.1
_SIGNALS: Final = signal.valid_signals() - {signal.SIGKILL, signal.SIGSTOP}
_ALL_SIGNALS: Final = b"\xff" * 128  # a sigset_t of glibc's and musl's
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
    return _fork_by(os.fork)


def fork_init(cgroup: str | None = None) -> tuple[int, int]:
    """Fork the first process of a new PID namespace; returns its pid and pidfd, in it (0, -1).

    It is the caller's own child, with no process in between, and a member of the version 2 control
    group at `cgroup` from its birth: to join one later takes a grace period of the kernel's, 5 to
    10 ms on an idle host. Otherwise as `fork`. Raises ManyThreads, and OSError, which names the
    group where that is what was refused. See clone(2), `clone3`, Linux 5.7.
    """
    group = -1 if cgroup is None else os.open(cgroup, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    pidfd = -1

    def clone() -> int:
        nonlocal pidfd
        # What os.fork does around the system call, since Python has no name for this one.
        ctypes.pythonapi.PyOS_BeforeFork()
        try:
            pid, pidfd = syscalls.clone3(CLONE_NEWPID, group)
        except OSError as error:
            ctypes.pythonapi.PyOS_AfterFork_Parent()
            raise OSError(error.errno, error.strerror, cgroup) from None
        if pid == 0:
            ctypes.pythonapi.PyOS_AfterFork_Child()
        else:
            ctypes.pythonapi.PyOS_AfterFork_Parent()
        return pid

    try:
        return _fork_by(clone), pidfd
    finally:
        if group >= 0:
            os.close(group)


def _fork_by(clone: Callable[[], int]) -> int:
    _require_one_thread()
    blocked = syscalls.set_signal_mask(_ALL_SIGNALS)
    taken = [number for number in _SIGNALS if signal.getsignal(number) is not signal.SIG_DFL]
    collects = gc.isenabled()
    gc.disable()
    pid = -1
    try:
        pid = clone()
        if pid == 0:
            gc.freeze()
            _forget_signals(taken)
        return pid
    finally:
        if collects:
            gc.enable()
        syscalls.set_signal_mask(_NO_SIGNAL if pid == 0 else blocked)


def _require_one_thread() -> None:
    """Refuse when there are more; one that was joined just now is seen a moment longer.

    The kernel tells nobody when it is gone, so this looks again every millisecond.
    """
    deadline = time.monotonic() + _THREAD_ENDS_WITHIN_S
    while (threads := len(os.listdir("/proc/self/task"))) > 1:
        if time.monotonic() >= deadline:
            raise ManyThreads(threads)
        time.sleep(0.001)


def _forget_signals(taken: Collection[int]) -> None:
    try:
        signal.set_wakeup_fd(-1)
        for number in taken:
            signal.signal(number, signal.SIG_DFL)
    except BaseException:
        os._exit(1)  # Anything else would let it into the parent's code.
