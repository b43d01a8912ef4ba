"""A lock has one holder, whoever dies, and costs those who wait one child each."""

import fcntl
import os
import random
import select
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from kvmsec.linux import children
from kvmsec.linux.errors import LockBusy
from kvmsec.linux.locks import FileLock

RIVAL = """
import os, sys, time
from pathlib import Path
from kvmsec.linux.locks import FileLock

path, counter, mode = Path(sys.argv[1]), sys.argv[2], sys.argv[3]
turns = int(sys.argv[4])
for _ in range(turns):
    lock = FileLock(path)
    lock.acquire(30)
    held = os.open(counter + ".held", os.O_CREAT | os.O_EXCL | os.O_WRONLY | os.O_CLOEXEC)
    count = int(open(counter).read())
    time.sleep(0.001)
    with open(counter, "r+") as file:
        file.write(str(count + 1))
    os.close(held)
    os.unlink(counter + ".held")
    lock.discard() if mode == "discard" else lock.release()
"""


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "lock"


def in_child(function: Callable[[], object]) -> object:
    return children.run_in_child(function, what="trying", timeout_s=10)


def is_free(path: Path) -> bool:
    def attempt() -> bool:
        lock = FileLock(path)
        return lock.try_acquire()

    return bool(in_child(attempt))


def test_a_held_lock_is_refused_to_others_and_free_again_after_release(path: Path) -> None:
    with FileLock(path):
        assert not is_free(path)
        with pytest.raises(LockBusy, match="locked by another process"):
            in_other = FileLock(path)
            in_other.acquire(0)
    assert is_free(path)
    assert path.stat().st_mode & 0o777 == 0o600


def test_taking_it_twice_is_a_mistake_of_the_callers(path: Path) -> None:
    with FileLock(path) as lock, pytest.raises(RuntimeError):
        lock.try_acquire()


def test_a_discarded_lock_leaves_no_file(path: Path) -> None:
    lock = FileLock(path)
    lock.acquire()
    lock.discard()
    assert not path.exists()
    lock.discard()
    lock.release()


def test_a_link_in_its_place_is_not_followed(path: Path, tmp_path: Path) -> None:
    path.symlink_to(tmp_path / "elsewhere")
    with pytest.raises(OSError, match="symbolic links"):
        FileLock(path).try_acquire()
    assert not (tmp_path / "elsewhere").exists()


def test_a_file_that_was_replaced_after_it_was_opened_is_no_lock(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    replaced = []

    def lock_a_file_that_goes(descriptor: int, operation: int) -> None:
        flock(descriptor, operation)
        if not replaced:
            path.unlink()
            replaced.append(path)

    flock = fcntl.flock
    monkeypatch.setattr("kvmsec.linux.locks.fcntl.flock", lock_a_file_that_goes)
    lock = FileLock(path)
    assert lock.try_acquire()
    monkeypatch.undo()
    assert path.exists()
    assert not is_free(path)
    lock.release()


def test_waiting_ends_in_time(path: Path) -> None:
    before = len(os.listdir("/proc/self/fd"))
    with FileLock(path):
        started = time.monotonic()
        with pytest.raises(LockBusy):
            FileLock(path).acquire(0.2)
        assert 0.15 < time.monotonic() - started < 5
    assert is_free(path)
    assert len(os.listdir("/proc/self/fd")) == before


def hold_elsewhere(path: Path) -> subprocess.Popen[bytes]:
    program = (
        "import sys\nfrom pathlib import Path\nfrom kvmsec.linux.locks import FileLock\n"
        "lock = FileLock(Path(sys.argv[1]))\nlock.acquire(10)\nprint('held', flush=True)\n"
        "getattr(lock, sys.stdin.readline().strip() or 'release')()\n"
    )
    holder = subprocess.Popen(
        [sys.executable, "-c", program, str(path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    assert holder.stdout is not None
    assert holder.stdout.readline() == b"held\n"
    return holder


@pytest.mark.parametrize("end", [b"release\n", b"discard\n", None])
def test_who_waits_gets_it_when_it_is_released_discarded_or_its_holder_killed(
    path: Path, end: bytes | None
) -> None:
    holder = hold_elsewhere(path)
    lock = FileLock(path)
    waiter = lock.waiter()
    if end is None:
        holder.kill()
        holder.communicate()
    else:
        holder.communicate(end)
    waiter.collect(10)
    assert lock.try_acquire()
    assert path.exists()
    assert not is_free(path)
    lock.release()
    assert is_free(path)


def test_a_lock_that_came_by_waiting_is_never_free_in_between(path: Path) -> None:
    holder = hold_elsewhere(path)
    lock = FileLock(path)
    waiter = lock.waiter()
    holder.communicate(b"release\n")
    waiter.collect(10)
    assert not is_free(path), "it was given back before its waiter took it"
    assert lock.try_acquire()
    lock.release()


@pytest.mark.parametrize("has_won", [False, True])
def test_a_waiter_that_is_given_up_leaves_nothing(path: Path, has_won: bool) -> None:
    before = len(os.listdir("/proc/self/fd"))
    holder = hold_elsewhere(path)
    waiter = FileLock(path).waiter()
    if has_won:
        holder.communicate(b"release\n")
    waiter.close()
    if not has_won:
        holder.communicate(b"release\n")
    for stream in (holder.stdin, holder.stdout):
        assert stream is not None
        stream.close()
    assert is_free(path)
    assert len(os.listdir("/proc/self/fd")) == before


def test_a_waiter_ends_with_the_process_that_waits(path: Path) -> None:
    """Else it would take the lock for nobody, long after a launcher was killed."""
    program = (
        "import sys\nfrom pathlib import Path\nfrom kvmsec.linux.locks import FileLock\n"
        "lock = FileLock(Path(sys.argv[1]))\nchild = lock.waiter()\n"
        "print(child.pid, flush=True)\nchild.collect(30)\n"
    )
    with FileLock(path):
        waiting = subprocess.Popen(
            [sys.executable, "-c", program, str(path)], stdout=subprocess.PIPE
        )
        assert waiting.stdout is not None
        child = os.pidfd_open(int(waiting.stdout.readline()))
        waiting.kill()
        waiting.communicate()
        assert select.select([child], [], [], 10)[0], "the waiter is still there"
        os.close(child)


def test_a_lock_does_not_reach_programs_nor_children(path: Path) -> None:
    with FileLock(path):
        listing = f"ls -l /proc/self/fd | grep -c {path.name}"
        told = subprocess.run(["sh", "-c", listing], capture_output=True, check=False)
        assert told.stdout.strip() == b"0"
        targets = in_child(
            lambda: [
                os.readlink(f"/proc/self/fd/{name}")
                for name in os.listdir("/proc/self/fd")
                if os.path.exists(f"/proc/self/fd/{name}")
            ]
        )
        assert str(path) not in str(targets)


@pytest.mark.parametrize("mode", ["release", "discard"])
def test_eight_rivals_hold_it_one_at_a_time(path: Path, tmp_path: Path, mode: str) -> None:
    counter = tmp_path / "counter"
    counter.write_text("0")
    argv = [sys.executable, "-c", RIVAL, str(path), str(counter), mode, "12"]
    rivals = [subprocess.Popen(argv) for _ in range(8)]
    assert [rival.wait(60) for rival in rivals] == [0] * 8
    assert counter.read_text() == "96"
    assert is_free(path)


@pytest.mark.parametrize("mode", ["release", "discard"])
def test_rivals_that_are_killed_anywhere_leave_it_free(
    path: Path, tmp_path: Path, mode: str
) -> None:
    counter = tmp_path / "counter"
    counter.write_text("0")
    argv = [sys.executable, "-c", RIVAL, str(path), str(counter), mode, "1000"]
    chance = random.Random(7)
    for _ in range(2):
        rivals = [subprocess.Popen(argv, stderr=subprocess.DEVNULL) for _ in range(8)]
        time.sleep(0.5)
        for rival in rivals:
            time.sleep(chance.random() * 0.01)
            rival.send_signal(signal.SIGKILL)
        for rival in rivals:
            rival.wait()
        lock = FileLock(path)
        lock.acquire(5)
        lock.release()
