"""Every process of a uid is found and ended, whatever it does, and nobody else's is."""

import contextlib
import ctypes
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from kvmsec.linux import processes
from kvmsec.linux.children import Child, start_child
from kvmsec.linux.credentials import Credentials, become
from kvmsec.linux.errors import ChildFailed
from kvmsec.linux.forking import fork_init
from kvmsec.linux.processes import pids
from uidpool.errors import NotSweepable
from uidpool.processes import end_processes, find_processes, uids_that_run
from uidpool.usage import Usage, inspect

pytestmark = pytest.mark.root
Spawn = Callable[..., Child]
Cleaner = Callable[..., Usage]
libc = ctypes.CDLL(None, use_errno=True)


def was_killed(child: Child) -> bool:
    try:
        child.collect(10)
    except ChildFailed as failure:
        return "signal 9" in failure.detail
    return False


def test_a_process_of_the_uid_is_found_and_ended(uid: int, spawn: Spawn, cleaner: Cleaner) -> None:
    child = spawn(uid)
    found = inspect(uid)
    assert [one.pid for one in found.processes] == [child.pid]
    assert f"{child.pid} ('" in found.reason()
    assert "pytest" in found.reason()  # the command line, which says more than "python"
    assert cleaner(uid).is_clean
    assert was_killed(child)


def test_one_look_tells_all_uids_that_run(uid: int, spawn: Spawn) -> None:
    child = spawn(uid)
    assert uids_that_run()[uid].pid == child.pid
    assert uid + 100 not in uids_that_run()


@pytest.mark.parametrize("which", ["real", "effective", "saved", "filesystem"])
def test_any_of_the_four_uids_counts(uid: int, spawn: Spawn, which: str) -> None:
    def take_it() -> None:
        if which == "filesystem":
            libc.setfsuid(uid)
        else:
            os.setresuid(*(uid if which == one else -1 for one in ("real", "effective", "saved")))

    child = spawn(None, take_it)
    assert [one.pid for one in find_processes(uid)] == [child.pid]


def test_whom_another_uid_is_settled_for_is_not_looked_at(uid: int, spawn: Spawn) -> None:
    ours, others = spawn(uid), spawn(uid + 100)
    settled = {ours.pid: uid, others.pid: uid + 100}

    assert [one.pid for one in find_processes(uid, settled=lambda: settled)] == [ours.pid]
    assert not find_processes(uid + 200, settled=lambda: settled, at_most=len(pids()) - 2)
    with pytest.raises(OSError, match="too long"):
        find_processes(uid, settled=lambda: settled, at_most=len(pids()) - 2)


def test_who_is_settled_is_asked_after_the_processes_were_listed(
    uid: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else one could end in between, and its pid be another process's in the list."""
    asked = []

    def listed() -> list[int]:
        asked.append("processes")
        return []

    def settled() -> dict[int, int]:
        asked.append("settled")
        return {}

    monkeypatch.setattr(processes, "pids", listed)
    find_processes(uid, settled=settled)
    assert asked == ["processes", "settled"]


def test_a_wrong_word_hides_no_process_that_runs_as_the_uid(uid: int, spawn: Spawn) -> None:
    child = spawn(uid)
    with pytest.raises(ProcessLookupError, match="can't be caught"):
        find_processes(uid, settled=lambda: {child.pid: uid + 1})


def test_a_root_process_that_acts_as_the_uid_is_reported_and_not_killed(
    uid: int, spawn: Spawn, cleaner: Cleaner
) -> None:
    child = spawn(None, lambda: os.setresuid(0, uid, 0))
    assert [one.pid for one in cleaner(uid, timeout_s=0.3).processes] == [child.pid]
    os.kill(child.pid, 0)


@contextlib.contextmanager
def forked_into_a_new_pid_namespace(function: Callable[[], object]) -> Iterator[int]:
    """A child that is PID 1 of a namespace of its own, once its function has returned."""
    reader, writer = os.pipe()
    pid, pidfd = fork_init()
    if pid == 0:
        try:
            function()
            os.write(writer, b"!")
            signal.pause()
        finally:
            os._exit(1)
    os.close(pidfd)
    os.close(writer)
    try:
        assert os.read(reader, 1) == b"!"
        yield pid
    finally:
        os.close(reader)
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)


def test_processes_in_another_pid_namespace_are_found_and_ended(uid: int, cleaner: Cleaner) -> None:
    def fork_three() -> None:
        become(Credentials(uid, uid))
        for _ in range(3):
            if os.fork() == 0:
                signal.pause()

    with forked_into_a_new_pid_namespace(fork_three) as first:
        assert len(inspect(uid).processes) == 4
        left = cleaner(uid)
        assert left.is_clean
        assert [one.pid for one in left.zombies] == [first]


def test_a_neighbour_survives_the_sweep(uid: int, spawn: Spawn, cleaner: Cleaner) -> None:
    neighbour, roots_own, child = spawn(uid + 100), spawn(None), spawn(uid)
    assert cleaner(uid).is_clean
    assert was_killed(child)
    os.kill(neighbour.pid, 0)
    os.kill(roots_own.pid, 0)
    assert [one.pid for one in find_processes(uid + 100)] == [neighbour.pid]


def fork_for_ever() -> None:
    for _ in range(4):
        if os.fork() == 0:
            while True:
                with contextlib.suppress(OSError):
                    if os.fork():
                        os._exit(0)


def test_a_fork_loop_does_not_outrun_the_sweep(uid: int, spawn: Spawn, cleaner: Cleaner) -> None:
    spawn(uid, fork_for_ever)
    started = time.monotonic()
    left = cleaner(uid)
    assert left.is_clean, left.reason()
    assert time.monotonic() - started < 5
    time.sleep(0.05)
    assert not [one for one in find_processes(uid) if not one.is_zombie]


def test_a_fork_loop_is_never_taken_for_nothing(uid: int, spawn: Spawn, cleaner: Cleaner) -> None:
    child = spawn(uid, fork_for_ever)
    child.kill()
    for _ in range(20):
        found = inspect(uid)
        assert found.processes or found.incomplete or found.zombies
    assert cleaner(uid).is_clean


def kill_for_ever() -> None:
    if os.fork() == 0:
        os.closerange(3, 256)  # or whoever waits for the parent's words waits for ever
        while True:
            with contextlib.suppress(OSError):
                os.kill(-1, 9)


def test_an_instance_can_not_kill_its_sweeper(uid: int, cleaner: Cleaner) -> None:
    for _ in range(5):
        credentials = Credentials(uid, uid)
        child = start_child(kill_for_ever, what="the killer", credentials=credentials)
        with contextlib.suppress(ChildFailed):
            child.collect(10)
        assert find_processes(uid)
        left = cleaner(uid)
        assert left.is_clean, left.reason()


def test_a_zombie_is_told_apart_and_leaves_the_uid_clean(uid: int, cleaner: Cleaner) -> None:
    pid = os.fork()
    if pid == 0:
        os.setresuid(uid, uid, uid)
        os._exit(0)
    try:
        os.waitid(os.P_PID, pid, os.WEXITED | os.WNOWAIT)
        found = cleaner(uid)
        assert found.is_clean
        assert [one.pid for one in found.zombies] == [pid]
    finally:
        os.waitpid(pid, 0)


def test_a_process_whose_first_thread_has_ended_is_no_zombie(
    uid: int, spawn: Spawn, cleaner: Cleaner
) -> None:
    def leave_a_thread() -> None:
        if os.fork() == 0:
            threading.Thread(target=time.sleep, args=(60,)).start()
            libc.syscall(60, 0)  # exit(2), which ends the calling thread alone

    spawn(uid, leave_a_thread)
    time.sleep(0.2)
    assert len(inspect(uid).processes) == 2
    assert cleaner(uid).is_clean


def test_a_proc_of_another_pid_namespace_proves_nothing(uid: int, tmp_path: Path) -> None:
    answer = tmp_path / "answer"
    with forked_into_a_new_pid_namespace(
        lambda: answer.write_text(inspect(uid).incomplete or "clean")
    ):
        assert "/proc is not that of this PID namespace" in answer.read_text()


@pytest.mark.parametrize("unfit", [0, 1, 33, 999, 65534, 61184, 211999, 2**31, 2**32 - 1])
def test_a_uid_that_is_no_pools_is_never_swept(unfit: int, reaper_uid: int, tmp_path: Path) -> None:
    with pytest.raises(NotSweepable) as caught:
        end_processes(unfit, reaper_uid=reaper_uid, lock=tmp_path / "lock", timeout_s=1)
    assert caught.value.hint


@pytest.mark.parametrize("file", ["subuid", "subgid"])
def test_a_uid_of_somebodys_containers_is_never_swept(
    uid: int, reaper_uid: int, tmp_path: Path, file: str
) -> None:
    path = Path("/etc", file)
    before = path.read_bytes() if path.exists() else b""
    path.write_bytes(before + f"somebody:{uid}:1\n".encode())
    try:
        with pytest.raises(NotSweepable, match=f"/etc/{file} gives to somebody"):
            end_processes(uid, reaper_uid=reaper_uid, lock=tmp_path / "lock", timeout_s=1)
    finally:
        path.write_bytes(before)


@pytest.mark.parametrize("reaper", [0, -1, 211150])
def test_an_unfit_reaper_is_refused(reaper: int, reaper_uid: int, tmp_path: Path) -> None:
    with pytest.raises(NotSweepable, match="can't be the reaper"):
        end_processes(211150, reaper_uid=reaper, lock=tmp_path / "lock", timeout_s=1)
