"""What a nursery and its children have of their launcher's: nothing but what they are told."""

import asyncio
import fcntl
import os
import signal
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from hypervisor import process
from hypervisor.cgroup_mounts import mounted
from hypervisor.errors import JailFailed
from hypervisor.nursery import Nursery
from kvmsec.linux import processes
from kvmsec.linux.errors import ManyThreads
from kvmsec.node.waiting import readable
from tests.root.hypervisor.jailed import (
    DEADLINE_S,
    Build,
    asked,
    born,
    children_of,
    end,
    execute,
    field,
    heard,
    held_files,
    nursery_pid,
    spares_of,
    status_of_end,
    wait_for_spare,
    wait_until,
)

pytestmark = [pytest.mark.root, pytest.mark.usefixtures("the_launcher_is_as_before")]


def test_neither_the_nursery_nor_a_waiting_child_holds_anything_of_the_launchers(
    nursery: Nursery, build: Build, tmp_path: Path
) -> None:
    with _many_open(tmp_path / "before"):
        nursery.begin()
        with _many_open(tmp_path / "after"):
            child = heard(asked(nursery, build()))
            try:
                pid = child.process.pid
                made, (spare,) = nursery_pid(nursery), spares_of(nursery)
                wait_until(lambda: len(held_files(made)) == 5)
                wait_until(lambda: len(held_files(pid)) == 5)
                found = {one: sorted(held_files(one).values()) for one in (made, spare, pid)}
                for held in found.values():
                    assert held[:3] == ["/dev/null"] * 3
                kinds = {
                    one: [what.partition(":")[0] for what in held[3:]]
                    for one, held in found.items()
                }
                assert kinds == {
                    made: ["pipe", "socket"],
                    spare: ["anon_inode", "pipe", "pipe", "socket"],
                    pid: ["pipe", "socket"],
                }
                # Neither end of the launcher's, nor what the nursery takes its orders by.
                own = {os.readlink(f"/proc/self/fd/{name}") for name in os.listdir("/proc/self/fd")
                       if os.path.lexists(f"/proc/self/fd/{name}")}  # fmt: skip
                sockets = {what for what in own if what.startswith("socket:")}
                for held in found.values():
                    assert not sockets & {*held}
                assert not set(found[made][3:]) & {*found[spare][3:], *found[pid][3:]}
                # The spare has the child's channels until its exec, and then nothing.
                assert set(found[pid][3:]) < set(found[spare][3:])
            finally:
                end(child)


@contextmanager
def _many_open(lock: Path) -> Iterator[None]:
    """Locks, sockets, pipes and files of every kind that are inherited."""
    sockets = [*socket.socketpair(), socket.socket()]
    descriptors = [os.open(lock, os.O_RDWR | os.O_CREAT), os.open("/", os.O_RDONLY)]
    descriptors += [*os.pipe(), os.memfd_create("x", 0), os.pidfd_open(os.getpid())]
    fcntl.flock(descriptors[0], fcntl.LOCK_EX)
    for number in (*descriptors, *(one.fileno() for one in sockets)):
        os.set_inheritable(number, True)
    try:
        yield
    finally:
        for number in descriptors:
            os.close(number)
        for one in sockets:
            one.close()
    again = os.open(lock, os.O_RDWR)
    fcntl.flock(again, fcntl.LOCK_EX | fcntl.LOCK_NB)
    os.close(again)


def test_a_lock_is_free_as_soon_as_the_launcher_lets_it_go(
    nursery: Nursery, build: Build, tmp_path: Path
) -> None:
    with _many_open(tmp_path / "lock"):
        nursery.begin()
        child = heard(asked(nursery, build()))
    end(child)


def test_a_child_may_run_on_the_processors_that_its_cpuset_is_given_later(
    nursery: Nursery, build: Build
) -> None:
    """As one that was forked plainly: a mask that somebody set would be remembered."""
    own = os.sched_getaffinity(0)
    with _cpuset_of({min(own)}) as give_all:
        nursery.begin()
        wait_for_spare(nursery)
        with born(nursery, build(), "/bin/sleep", "60") as child:
            execute(child)
            assert os.sched_getaffinity(child.process.pid) == os.sched_getaffinity(0)
            give_all(child.process.pid)
            assert os.sched_getaffinity(child.process.pid) == own
        nursery.close()


@contextmanager
def _cpuset_of(processors: set[int]) -> Iterator[Callable[[int], None]]:
    """Be in a cpuset of version 1 until the end, where there is one; yields what puts one back."""
    tops = [Path(one.path) for one in mounted() if "cpuset" in one.controllers and one.version == 1]
    if not tops:
        yield lambda _: None
        return
    named = next(
        line for line in Path("/proc/self/cgroup").read_text().split("\n") if ":cpuset:" in line
    )
    top = tops[0] / named.split(":", 2)[2].lstrip("/")
    group = top / f"kvmsec_test_{os.getpid()}"
    group.mkdir()
    try:
        (group / "cpuset.mems").write_text((top / "cpuset.mems").read_text())
        (group / "cpuset.cpus").write_text(",".join(map(str, processors)))
        (group / "tasks").write_text(f"{os.getpid()}")
        yield lambda pid: _put(top / "tasks", pid)
    finally:
        _put(top / "tasks", os.getpid())
        group.rmdir()


def _put(tasks: Path, pid: int) -> None:
    tasks.write_text(f"{pid}")


def test_it_has_a_name_and_keeps_no_directory_busy(nursery: Nursery, tmp_path: Path) -> None:
    before = os.getcwd()
    os.chdir(tmp_path)
    try:
        nursery.begin()
    finally:
        os.chdir(before)
    pid = nursery_pid(nursery)
    wait_until(lambda: Path(f"/proc/{pid}/comm").read_text() == "kvmsec-nursery\n")
    assert os.readlink(f"/proc/{pid}/cwd") == "/"


# What the launcher is like -------------------------------------------------------------------


def test_a_launcher_that_has_threads_by_then_has_children_made_all_the_same(
    nursery: Nursery, build: Build
) -> None:
    nursery.begin()
    jail = build()
    done = threading.Event()
    other = threading.Thread(target=done.wait)
    other.start()
    try:
        with born(nursery, jail, "/bin/sh", "-c", "exit 9") as child:
            execute(child)
            assert status_of_end(child) == process.Ended(9, None)
    finally:
        done.set()
        other.join()


@pytest.mark.parametrize("was_killed", [False, True])
def test_a_launcher_that_has_threads_begins_no_nursery(
    nursery: Nursery, build: Build, *, was_killed: bool
) -> None:
    jail = build()
    before = set(os.listdir("/proc/self/fd"))
    if was_killed:
        nursery.begin()
        os.kill(nursery_pid(nursery), signal.SIGKILL)
        os.waitid(os.P_PID, nursery_pid(nursery), os.WEXITED | os.WNOWAIT)
    done = threading.Event()
    other = threading.Thread(target=done.wait)
    other.start()
    try:
        with pytest.raises(ManyThreads, match="2 threads"):
            asked(nursery, jail)
    finally:
        done.set()
        other.join()
    assert set(os.listdir("/proc/self/fd")) == before
    assert children_of(os.getpid()) == []
    with born(nursery, jail, "/bin/true") as child:
        execute(child)


def test_a_program_takes_every_signal_as_the_kernel_does(nursery: Nursery, build: Build) -> None:
    odd = (signal.SIGUSR1, signal.SIGHUP, signal.SIGPIPE, signal.SIGRTMAX)
    before = {number: signal.signal(number, signal.SIG_IGN) for number in odd}
    signal.signal(signal.SIGTERM, lambda *_: None)
    signal.pthread_sigmask(signal.SIG_BLOCK, signal.valid_signals())
    try:
        nursery.begin()
        with born(nursery, build(), "/bin/sleep", "60") as child:
            execute(child)
            pid = child.process.pid
            shown = {name: field(pid, name) for name in ("SigBlk", "SigIgn", "SigCgt", "SigPnd")}
        assert {name: int(mask, 16) for name, mask in shown.items()} == dict.fromkeys(shown, 0)
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, ())
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        for number, handler in before.items():
            signal.signal(number, handler)


def test_a_launcher_that_ignores_the_end_of_its_children_has_them_made(
    build: Build, nursery: Nursery
) -> None:
    before = signal.signal(signal.SIGCHLD, signal.SIG_IGN)
    try:
        with born(nursery, build(), "/bin/sleep", "60") as child:
            execute(child)
            assert processes.is_alive(child.process)
            assert process.kill_and_wait(child.pidfd, DEADLINE_S)
            assert process.reap(child.pidfd) is None
        with pytest.raises(JailFailed, match="No such file"):
            heard(nursery.birth("/sys/fs/cgroup/nowhere"))
        asked(nursery, build()).close()
        pid = nursery_pid(nursery)
        os.kill(pid, signal.SIGKILL)
        wait_until(lambda: processes.identify(pid) is None)
        with born(nursery, build(), "/bin/true") as child:
            execute(child)
    finally:
        signal.signal(signal.SIGCHLD, before)


def test_a_launcher_whose_loop_runs_waits_for_many_at_once(nursery: Nursery, build: Build) -> None:
    async def start(number: int) -> process.Ended | None:
        jail = build()
        child = asked(nursery, jail)
        assert await readable(child.line.fileno(), DEADLINE_S)
        child.hear()
        child.become(jail, "/bin/sh", ("sh", "-c", f"exit {number}"))
        child.release()
        assert await readable(child.fileno(), DEADLINE_S)
        child.executed()
        assert await readable(child.pidfd, DEADLINE_S)
        ended = process.reap(child.pidfd)
        end(child)
        return ended

    async def start_all() -> list[process.Ended | None]:
        command = await asyncio.create_subprocess_exec("/bin/true")  # It may start a thread.
        ended = await asyncio.gather(*map(start, range(8)))
        await command.wait()
        return ended

    nursery.begin()
    assert asyncio.run(start_all()) == [process.Ended(number, None) for number in range(8)]
