"""A process is known by more than its pid, and can't forge what is read about it."""

import ctypes
import errno
import os
import select
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest
from attrs import evolve

from kvmsec.linux import processes

_PR_SET_NAME = 15
_libc = ctypes.CDLL(None, use_errno=True)


@contextmanager
def child(behave: Callable[[], None]) -> Iterator[int]:
    """A child that behaves, says so, and stays until it is killed."""
    ready, say = os.pipe()
    pid = os.fork()
    if pid == 0:
        try:
            behave()
            os.write(say, b".")
            signal.pause()
        finally:
            os._exit(1)
    os.close(say)
    try:
        assert os.read(ready, 1) == b"."
        yield pid
    finally:
        os.close(ready)
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)


def take_name(name: bytes) -> Callable[[], None]:
    def take() -> None:
        assert _libc.prctl(_PR_SET_NAME, name, 0, 0, 0) == 0

    return take


HOSTILE_NAMES = [
    b") R 1 2 3",
    b"a) Z 1 (b",
    b"x\nUid:\t0\t0\t0",
    b"\x0cState:\tZ",
    b"\x0cUid:\t0 0 0 0",
    b"\rThreads:\t1",
    b"\x1cCapEff:\t0",
    b"\xc2\x85Gid:\t0",
    b"\xff\xfe",
    b"",
]


@pytest.mark.parametrize("name", HOSTILE_NAMES)
def test_no_name_of_a_process_changes_what_is_read_of_it(name: bytes) -> None:
    own = processes.read_status(os.getpid())
    assert own is not None
    with child(lambda: None) as plain, child(take_name(name)) as hostile:
        wanted, found = processes.read_status(plain), processes.read_status(hostile)
        assert wanted is not None and found is not None
        assert found.state in ("S", "R")
        assert evolve(found, name="", state="") == evolve(wanted, name="", state="")
        identity = processes.identify(hostile)
        assert identity is not None
        assert processes.is_alive(identity)
        # Both were started just now: a field of the forged name would be far from it.
        assert abs(identity.start_ticks - processes.myself().start_ticks) < 3600 * 100


def test_status_has_the_ids_capabilities_and_threads_of_this_process() -> None:
    status = processes.read_status(os.getpid())
    assert status is not None
    assert status.uids == (*os.getresuid(), os.geteuid())
    assert status.gids == (*os.getresgid(), os.getegid())
    assert set(status.groups) == set(os.getgroups())
    assert len(status.capabilities) == 5
    assert status.threads == threading.active_count()


def test_a_missing_line_about_capabilities_is_no_empty_set(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def without_capabilities(path: str) -> bytes:
        kept = [line for line in read(path).split(b"\n") if not line.startswith(b"Cap")]
        return b"\n".join(kept)

    read = processes._read
    monkeypatch.setattr(processes, "_read", without_capabilities)
    with pytest.raises(KeyError):
        processes.read_status(os.getpid())


@pytest.mark.parametrize("read", [processes.identify, processes.read_status])
def test_a_pid_that_nobody_has_is_none(read: Callable[[int], object]) -> None:
    pid = os.fork()
    if pid == 0:
        os._exit(0)
    os.waitpid(pid, 0)
    assert read(pid) is None


def test_a_zombie_has_ended_and_still_has_its_identity() -> None:
    pid = os.fork()
    if pid == 0:
        os._exit(0)
    os.waitid(os.P_PID, pid, os.WEXITED | os.WNOWAIT)
    identity, status = processes.identify(pid), processes.read_status(pid)
    assert identity is not None and status is not None
    assert status.is_zombie
    assert not processes.is_alive(identity)
    os.waitpid(pid, 0)
    assert not processes.is_alive(identity)


def test_a_leader_that_ended_before_its_threads_is_alive() -> None:
    """Else a QEMU could pass for dead by ending its first thread alone."""

    def end_the_first_thread() -> None:
        threading.Thread(
            target=lambda: (time.sleep(0.1), os.write(say, b"."), signal.pause())
        ).start()
        _libc.syscall(ctypes.c_long(60), ctypes.c_long(0))  # exit(2), not exit_group

    heard, say = os.pipe()
    pid = os.fork()
    if pid == 0:
        end_the_first_thread()
        os._exit(1)
    try:
        os.close(say)
        assert os.read(heard, 1) == b"."
        identity, status = processes.identify(pid), processes.read_status(pid)
        assert identity is not None and status is not None
        assert status.state == "Z"
        assert not status.is_zombie
        assert processes.is_alive(identity)
    finally:
        os.close(heard)
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)


def test_another_process_with_the_same_pid_is_not_taken_for_the_first() -> None:
    with child(lambda: None) as pid:
        identity = processes.identify(pid)
        assert identity is not None
        for other in (
            evolve(identity, start_ticks=identity.start_ticks - 1),
            evolve(identity, boot_id="11111111-2222-3333-4444-555555555555"),
        ):
            assert not processes.is_alive(other)
            before = os.listdir("/proc/self/fd")
            assert processes.open_pidfd(other) is None
            assert len(os.listdir("/proc/self/fd")) == len(before)


def test_a_pid_that_is_a_thread_s_by_now_is_no_process() -> None:
    """Both are taken from the same numbers."""
    let_end = threading.Event()
    thread = threading.Thread(target=let_end.wait)
    thread.start()
    try:
        assert thread.native_id is not None
        identity = processes.identify(thread.native_id)
        assert identity is not None
        assert processes.pidfd_of(thread.native_id) is None
        assert processes.open_pidfd(identity) is None
    finally:
        let_end.set()
        thread.join()


@pytest.mark.parametrize("number", [errno.ESRCH, errno.EINVAL, errno.ENOENT])
def test_what_a_kernel_says_of_a_process_that_is_being_reaped_is_no_error(
    monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    monkeypatch.setattr(os, "pidfd_open", raising(OSError(number, os.strerror(number))))
    assert processes.pidfd_of(os.getpid()) is None


def test_that_no_pidfd_can_be_had_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    error = OSError(errno.EMFILE, os.strerror(errno.EMFILE))
    monkeypatch.setattr(os, "pidfd_open", raising(error))
    with pytest.raises(OSError, match="open files"):
        processes.pidfd_of(os.getpid())


def raising(error: BaseException) -> Callable[[int], int]:
    def call(_: int) -> int:
        raise error

    return call


def test_a_pidfd_ends_that_very_process_and_is_not_inherited() -> None:
    pid = os.fork()
    if pid == 0:
        signal.pause()
        os._exit(1)
    identity = processes.identify(pid)
    assert identity is not None
    pidfd = processes.open_pidfd(identity)
    assert pidfd is not None
    assert not os.get_inheritable(pidfd)
    processes.kill(pidfd)
    assert select.select([pidfd], [], [], 10)[0]
    os.waitpid(pid, 0)
    processes.kill(pidfd)  # One that has ended is fine.
    assert processes.open_pidfd(identity) is None
    os.close(pidfd)


def test_the_list_of_pids_has_this_process() -> None:
    assert os.getpid() in processes.pids()
    assert sys.maxsize not in processes.pids()
