"""How a start in the jail fails, and how jailed processes end."""

import errno
import os
import select
import signal
import struct
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from attrs import evolve

from hypervisor import jail as jails
from hypervisor import process
from hypervisor.errors import JailFailed
from hypervisor.jail import BootFile
from hypervisor.newborn import spawn
from hypervisor.steps import Step
from kvmsec.linux import processes
from kvmsec.linux.errors import ManyThreads
from tests.root.hypervisor.jailed import (
    DEADLINE_S,
    PROGRAMS,
    Build,
    binds_of,
    failure_of,
    newborn,
    orphans_come_here,
    running,
    said,
)

pytestmark = [pytest.mark.root, pytest.mark.usefixtures("the_launcher_is_as_before")]


def test_a_missing_file_is_told_with_its_step_and_number(build: Build) -> None:
    binds = (*binds_of(*PROGRAMS), ("/nowhere/library.so", "/lib/library.so"))
    with pytest.raises(JailFailed, match="/nowhere/library") as raised:
        build(binds=binds)
    assert (raised.value.step, raised.value.errno) == ("files", errno.ENOENT)


def test_a_boot_file_that_shrinks_is_told(build: Build) -> None:
    firmware = os.memfd_create("firmware")
    os.write(firmware, b"x" * 1000)
    jail = build(boot_files=(BootFile(firmware, 5000, "firmware"),))
    error = failure_of(jail, "/bin/true")
    os.close(firmware)
    assert (error.step, error.errno) == ("boot files", errno.ENODATA)
    assert "firmware became shorter" in error.message


def test_a_boot_file_that_grows_is_copied_as_long_as_it_was(build: Build) -> None:
    firmware = os.memfd_create("firmware")
    os.write(firmware, b"x" * 9000)
    jail = build(boot_files=(BootFile(firmware, 5000, "firmware"),))
    assert said(jail, "/bin/cat", "/boot/firmware") == (0, "x" * 5000)
    os.close(firmware)


def test_a_tree_or_an_output_that_is_none_is_told(build: Build) -> None:
    jail = build()
    error = failure_of(evolve(jail, cell=evolve(jail.cell, tree=jail.log)), "/bin/true")
    assert (error.step, error.errno) == ("namespaces", errno.EINVAL)
    error = failure_of(evolve(jail, output=jail.log), "/bin/true")
    assert (error.step, error.errno) == ("output", errno.EINVAL)


def test_an_output_is_attached_for_one_child(build: Build) -> None:
    jail = build()
    assert said(jail, "/bin/true")[0] == 0
    error = failure_of(jail, "/bin/true")
    assert (error.step, error.errno) == ("output", errno.EINVAL)


def test_a_host_name_that_is_too_long_is_told(build: Build) -> None:
    error = failure_of(evolve(build(), name="x" * 65), "/bin/true")
    assert error.step == "host name"


@pytest.mark.parametrize(
    ("program", "number"),
    [("/bin/missing", errno.ENOENT), ("/data", errno.EACCES), ("/text", errno.ENOEXEC)],
)
def test_a_program_that_cannot_be_executed_is_told(
    build: Build, tmp_path: Path, program: str, number: int
) -> None:
    (tmp_path / "data").write_text("data")
    (tmp_path / "text").write_text("text")
    (tmp_path / "data").chmod(0o644)
    (tmp_path / "text").chmod(0o755)
    extra = tuple((str(tmp_path / name), f"/{name}") for name in ("data", "text"))
    error = failure_of(build(binds=(*binds_of(*PROGRAMS), *extra)), program)
    assert (error.step, error.errno) == ("exec", number)


def test_one_that_is_killed_before_it_is_released_is_never_taken_for_started(
    build: Build,
) -> None:
    for delay_ms in range(12):
        with newborn(build(), "/bin/sleep", "60") as child:
            time.sleep(delay_ms / 1000)
            processes.kill(child.pidfd)
            child.release()
            with pytest.raises(JailFailed, match="killed before it could start"):
                child.executed()


def test_a_program_that_ends_at_once_was_started_all_the_same(build: Build) -> None:
    with newborn(build(), "/bin/true") as child:
        child.release()
        assert select.select([child.pidfd], [], [], DEADLINE_S)[0]
        child.executed()
        assert process.reap(child.pidfd) == process.Ended(0, None)


def test_one_that_is_not_released_ends_when_its_launcher_lets_go(build: Build) -> None:
    with newborn(build(), "/bin/sleep", "60") as child:
        child.close()
        assert select.select([child.pidfd], [], [], DEADLINE_S)[0]
        assert process.reap(child.pidfd) == process.Ended(125, None)


@pytest.mark.parametrize("after_ms", [0, 1, 2, 4, 8, 30])
def test_a_launcher_that_is_killed_before_the_release_leaves_no_process(
    build: Build, after_ms: int
) -> None:
    jail = build()
    reader, writer = os.pipe()
    launcher = os.fork()
    if launcher == 0:
        try:
            os.close(reader)
            child = spawn(jail, "/bin/sleep", ["sleep", "60"])
            os.write(writer, struct.pack("i", child.process.pid))
            signal.pause()
        finally:
            os._exit(1)
    os.close(writer)
    with orphans_come_here():
        pid = struct.unpack("i", os.read(reader, 4))[0]
        os.close(reader)
        pidfd = os.pidfd_open(pid)
        time.sleep(after_ms / 1000)
        os.kill(launcher, signal.SIGKILL)
        os.waitpid(launcher, 0)
        assert select.select([pidfd], [], [], DEADLINE_S)[0], "the child is still there"
        ended = process.reap(pidfd)
        assert ended in (process.Ended(125, None), process.Ended(None, signal.SIGKILL))
        os.close(pidfd)


def test_a_child_that_hangs_in_its_jail_ends_with_its_launcher(
    build: Build, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It reads no pipe there, and would go on to take the uid later."""
    jail = build()
    hang = Step("hang", lambda _: signal.pause(), "for the test")
    monkeypatch.setattr(jails, "CELL_STEPS", (hang, *jails.CELL_STEPS))
    reader, writer = os.pipe()
    launcher = os.fork()
    if launcher == 0:
        try:
            child = spawn(jail, "/bin/sleep", ["sleep", "60"])
            os.write(writer, struct.pack("i", child.process.pid))
            _wait_until_it_pauses(child.process.pid)
        finally:
            os._exit(1)
    os.close(writer)
    with orphans_come_here():
        pidfd = os.pidfd_open(struct.unpack("i", os.read(reader, 4))[0])
        os.close(reader)
        os.waitpid(launcher, 0)
        assert select.select([pidfd], [], [], DEADLINE_S)[0], "the child is still there"
        process.reap(pidfd)
        os.close(pidfd)


def _wait_until_it_pauses(pid: int) -> None:
    pause = "34"  # linux/arch/x86/entry/syscalls/syscall_64.tbl
    deadline = time.monotonic() + DEADLINE_S
    while Path(f"/proc/{pid}/syscall").read_text().split()[0] != pause:
        if time.monotonic() > deadline:
            raise TimeoutError(f"process {pid} does not pause")
        time.sleep(0.01)


def test_a_launcher_that_ignores_its_children_is_told_what_failed(build: Build) -> None:
    jail = evolve(build(), name="x" * 65)
    before = signal.signal(signal.SIGCHLD, signal.SIG_IGN)
    try:
        for _ in range(10):
            with pytest.raises(JailFailed, match="host name"):
                child = spawn(jail, "/bin/true", ["true"])
                child.release()
                try:
                    child.executed()
                finally:
                    process.kill_and_wait(child.pidfd, DEADLINE_S)
                    assert process.reap(child.pidfd) is None
                    child.close()
                    os.close(child.pidfd)
    finally:
        signal.signal(signal.SIGCHLD, before)


def test_a_launcher_with_several_threads_starts_nothing(build: Build) -> None:
    jail = build()
    before = set(os.listdir("/proc/self/fd"))
    done = threading.Event()
    other = threading.Thread(target=done.wait)
    other.start()
    try:
        with pytest.raises(ManyThreads, match="2 threads"):
            spawn(jail, "/bin/true", ["true"])
    finally:
        done.set()
        other.join()
    assert set(os.listdir("/proc/self/fd")) == before
    with pytest.raises(ChildProcessError):
        os.waitpid(-1, os.WNOHANG)


def test_a_later_child_of_the_launchers_is_born_outside(build: Build) -> None:
    with running(build(), "/bin/sleep", "60"):
        told = subprocess.run(
            [sys.executable, "-c", "import os; print(os.readlink('/proc/self/ns/pid'))"],
            capture_output=True,
            text=True,
            check=True,
        )
    assert told.stdout.strip() == os.readlink("/proc/self/ns/pid")


def test_every_process_inside_ends_with_the_first(build: Build) -> None:
    with newborn(build(), "/bin/sh", "-c", "/bin/sleep 60 & /bin/sleep 60 & wait") as child:
        child.release()
        child.executed()
        inside = os.readlink(f"/proc/{child.process.pid}/ns/pid")
        deadline = time.monotonic() + DEADLINE_S
        while len(_processes_in(inside)) < 3 and time.monotonic() < deadline:
            os.sched_yield()
        assert len(_processes_in(inside)) == 3
        assert process.kill_and_wait(child.pidfd, DEADLINE_S)
        assert process.reap(child.pidfd) == process.Ended(None, signal.SIGKILL)
        assert _processes_in(inside) == []


def _processes_in(namespace: str) -> list[int]:
    found = []
    for pid in processes.pids():
        try:
            if os.readlink(f"/proc/{pid}/ns/pid") == namespace:
                found.append(pid)
        except (FileNotFoundError, ProcessLookupError):
            continue
    return found
