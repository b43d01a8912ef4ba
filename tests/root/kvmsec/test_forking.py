"""The first process of a PID namespace, the caller's child: what it has, and what is refused."""

import errno
import gc
import os
import signal
import tempfile
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from hypervisor.cgroup_mounts import mounted
from kvmsec.linux import forking
from kvmsec.linux.errors import ManyThreads

pytestmark = pytest.mark.root

STATUS = 7


Fork = Callable[[], tuple[int, int]]
EITHER = pytest.mark.parametrize("fork", [forking.fork_init, forking.clone_init])


def told_by_init(function: Callable[[], object], fork: Fork = forking.fork_init) -> str:
    """What a new first process returns from the function; its end is seen by its pidfd."""
    reader, writer = os.pipe()
    pid, pidfd = fork()
    if pid == 0:
        try:
            os.write(writer, str(function()).encode())
        finally:
            os._exit(STATUS)
    os.close(writer)
    try:
        told = os.read(reader, 4096).decode()
        ended = os.waitid(os.P_PIDFD, pidfd, os.WEXITED)
    finally:
        os.close(pidfd)
        os.close(reader)
    assert ended is not None
    assert (ended.si_pid, ended.si_status) == (pid, STATUS)
    return told


@pytest.fixture
def group() -> Iterator[Path]:
    """A version 2 control group of the test's own."""
    (top,) = [mount.path for mount in mounted() if mount.version == 2]
    path = Path(tempfile.mkdtemp(prefix="kvmsec-forking-", dir=top))
    yield path
    path.rmdir()


@EITHER
def test_it_is_the_first_of_its_namespace_and_the_callers_own_child(fork: Fork) -> None:
    assert told_by_init(lambda: (os.getpid(), os.getppid()), fork=fork) == "(1, 0)"


def test_the_callers_later_children_are_born_where_it_is() -> None:
    own = os.readlink("/proc/self/ns/pid")
    told_by_init(lambda: "")
    assert os.readlink("/proc/self/ns/pid_for_children") == own


def test_a_group_that_is_missing_or_of_version_one_is_named(tmp_path: Path) -> None:
    before = os.listdir("/proc/self/fd")
    for path, number in ((tmp_path / "none", errno.ENOENT), (tmp_path, errno.EBADF)):
        with pytest.raises(OSError) as caught:
            forking.become_sibling_init(str(path))
        assert (caught.value.errno, caught.value.filename) == (number, str(path))
    assert os.listdir("/proc/self/fd") == before
    assert told_by_init(lambda: "still able to") == "still able to"


def test_a_group_that_takes_no_process_is_named(group: Path) -> None:
    """Beside a threaded group another is neither threaded nor a domain (cgroups(7))."""
    threaded, neither = group / "threaded", group / "neither"
    threaded.mkdir()
    (threaded / "cgroup.type").write_text("threaded")
    neither.mkdir()
    try:
        with pytest.raises(OSError, match=str(neither)) as caught:
            forking.become_sibling_init(str(neither))
    finally:
        neither.rmdir()
        threaded.rmdir()
    assert caught.value.errno == errno.EOPNOTSUPP


def test_signals_are_the_kernels_and_none_waits() -> None:
    def look() -> object:
        blocked = signal.pthread_sigmask(signal.SIG_BLOCK, ())
        return (
            signal.getsignal(signal.SIGUSR1) is signal.SIG_DFL,
            blocked == set(),
            gc.isenabled(),
        )

    before = signal.signal(signal.SIGUSR1, lambda *_: None)
    try:
        assert told_by_init(look) == "(True, True, True)"
    finally:
        signal.signal(signal.SIGUSR1, before)
    assert signal.pthread_sigmask(signal.SIG_BLOCK, ()) == set()


def test_python_knows_that_it_was_forked() -> None:
    """What registered for a fork is told, as by os.fork: locks and random states are anew."""
    seen: list[str] = []
    os.register_at_fork(after_in_child=lambda: seen.append("child"))
    assert told_by_init(lambda: seen) == "['child']"
    assert seen == []


def test_a_child_that_becomes_another_program_calls_nothing_that_is_registered() -> None:
    seen: list[str] = []
    os.register_at_fork(
        before=lambda: seen.append("before"),
        after_in_parent=lambda: seen.append("parent"),
        after_in_child=lambda: seen.append("child"),
    )
    assert told_by_init(lambda: seen, fork=forking.clone_init) == "[]"
    assert seen == []
    told_by_init(lambda: seen)
    assert seen == ["before", "parent"], "the control: by fork_init each is called"


def test_the_kernel_takes_every_signal_as_at_the_beginning() -> None:
    """Those that Python ignores, and those that the parent handles, past Python (faulthandler).

    glibc keeps 32 and 33 to itself, and catches 33 once there was a second thread (nptl(7)).
    """
    glibcs = 1 << 31 | 1 << 32

    def look() -> object:
        lines = Path("/proc/self/status").read_text().splitlines()
        masks = [line.split() for line in lines if line.startswith(("SigBlk", "SigIgn", "SigCgt"))]
        return [f"{name}\t{int(mask, 16) & ~glibcs:016x}" for name, mask in masks]

    before = signal.signal(signal.SIGUSR1, lambda *_: None)
    signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGUSR2])
    try:
        told = told_by_init(look, fork=forking.clone_init)
    finally:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, [signal.SIGUSR2])
        signal.signal(signal.SIGUSR1, before)
    none = "0" * 16
    assert told == str([f"SigBlk:\t{none}", f"SigIgn:\t{none}", f"SigCgt:\t{none}"])


@EITHER
def test_a_process_with_several_threads_is_refused(fork: Fork) -> None:
    stop = threading.Event()
    thread = threading.Thread(target=stop.wait)
    thread.start()
    try:
        with pytest.raises(ManyThreads):
            fork()
    finally:
        stop.set()
        thread.join()
