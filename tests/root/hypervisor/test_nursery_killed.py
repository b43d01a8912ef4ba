"""A nursery that is killed, and a launcher that is, at every moment: nothing may be left."""

import os
import random
import signal
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from hypervisor import child as child_side
from hypervisor import jail as jails
from hypervisor import process
from hypervisor.errors import JailFailed
from hypervisor.jail import Jail
from hypervisor.nursery import Nursery
from hypervisor.steps import Step
from kvmsec.linux import forking, processes, syscalls
from kvmsec.linux.readiness import is_readable
from tests.root.hypervisor.jailed import (
    DEADLINE_S,
    SOMEBODY,
    Build,
    asked,
    born,
    children_of,
    end,
    execute,
    heard,
    kill,
    kill_spares,
    nursery_pid,
    orphans_come_here,
    others_than,
    wait_for_spare,
    wait_until,
)

pytestmark = [pytest.mark.root, pytest.mark.usefixtures("the_launcher_is_as_before")]

ENDING_S = 2.0


# The nursery ---------------------------------------------------------------------------------


def test_one_that_is_killed_between_two_births_is_made_anew(nursery: Nursery, build: Build) -> None:
    with born(nursery, build(), "/bin/sleep", "60") as first:
        execute(first)
        nursery.prepare()
        killed = (nursery_pid(nursery), *wait_for_spare(nursery))
        kill(killed[0])
        with born(nursery, build(), "/bin/true") as second:
            assert nursery_pid(nursery) != killed[0]
            assert [*map(processes.identify, killed)] == [None, None], "no zombie of them is left"
            execute(second)
        assert processes.is_alive(first.process)


def test_one_that_is_killed_with_an_order_in_its_queue_fails_the_start(
    nursery: Nursery, build: Build
) -> None:
    jail = build()
    nursery.begin()
    before = set(os.listdir("/proc/self/fd"))
    wait_for_spare(nursery)
    os.kill(nursery_pid(nursery), signal.SIGSTOP)
    kill_spares(nursery)
    orders = [asked(nursery, jail) for _ in range(3)]
    kill(nursery_pid(nursery))
    for child in orders:
        with pytest.raises(JailFailed, match="process that was to make a child is gone") as raised:
            heard(child)
        assert raised.value.step == "fork"
        assert not child.is_known
    assert set(os.listdir("/proc/self/fd")) == before
    assert others_than(nursery) == []
    with born(nursery, jail, "/bin/true") as child:
        execute(child)


def test_one_that_is_killed_beside_a_used_spare_tells_who_waits_at_once(
    nursery: Nursery, build: Build
) -> None:
    """What a spare holds until its child's exec keeps no other start's channels open."""
    waits, asks = build(), build()
    with born(nursery, waits, "/bin/true") as first:
        os.kill(nursery_pid(nursery), signal.SIGSTOP)
        second = asked(nursery, asks)
        kill(nursery_pid(nursery))
        assert is_readable(second.line.fileno(), 1)
        with pytest.raises(JailFailed, match="is gone"):
            heard(second)
        execute(first)


@pytest.mark.parametrize("is_forked", [False, True])
def test_one_that_is_killed_while_it_forks_makes_a_whole_child_or_none(
    nursery: Nursery, build: Build, monkeypatch: pytest.MonkeyPatch, *, is_forked: bool
) -> None:
    """Right before the call, and right after it: the spare is there then, whoever made it."""
    clone = forking.clone_sibling

    def clone_and_die() -> tuple[int, int]:
        made = clone() if is_forked else (1, -1)
        if made[0]:
            os.kill(os.getpid(), signal.SIGKILL)
        return made

    monkeypatch.setattr(forking, "clone_sibling", clone_and_die)
    jail = build()
    before = set(os.listdir("/proc/self/fd"))
    child = asked(nursery, jail)
    if not is_forked:
        with pytest.raises(JailFailed, match="is gone"):
            heard(child)
    else:
        heard(child).become(jail, "/bin/true", ("true",))
        execute(child)
        end(child)
    nursery.close()
    assert set(os.listdir("/proc/self/fd")) == before
    assert children_of(os.getpid()) == []


def test_one_that_is_killed_at_any_moment_leaves_a_whole_child_or_none(
    nursery: Nursery, build: Build
) -> None:
    jail = build()
    chance = random.Random(seed := random.randrange(1 << 32))
    for _ in range(60):
        nursery.begin()
        child = asked(nursery, jail)
        time.sleep(chance.uniform(0, 0.004))
        os.kill(nursery_pid(nursery), signal.SIGKILL)
        try:
            end(heard(child))
        except JailFailed as error:
            assert error.step == "fork", f"seed {seed}"
            assert "gone" in error.detail, f"seed {seed}"
        nursery.close()
        assert children_of(os.getpid()) == [], f"seed {seed}"


def test_one_that_is_closed_with_an_order_in_its_queue_fails_the_start(
    nursery: Nursery, build: Build
) -> None:
    jail = build()
    nursery.begin()
    os.kill(nursery_pid(nursery), signal.SIGSTOP)
    child = asked(nursery, jail)
    nursery.close()
    with pytest.raises(JailFailed, match="is gone"):
        heard(child)


# The launcher --------------------------------------------------------------------------------

Mark = Callable[[str], None]


def start_one(jail: Jail, mark: Mark) -> None:
    """A whole start, which says where it is."""
    made = Nursery()
    mark("begin")
    made.begin()
    mark("birth")
    child = asked(made, jail)
    mark("hear")
    heard(child)
    mark("become")
    child.become(jail, "/bin/sleep", ("sleep", "60"))
    mark("release")
    child.release()
    mark("execute")
    is_readable(child.fileno(), DEADLINE_S)
    mark("executed")


MARKS = ("begin", "birth", "hear", "become", "release", "execute", "executed")


def launch(work: Callable[[], None]) -> int:
    """Do `work` in a launcher, a child of this process's, and have it wait for its end."""
    pid = os.fork()
    if pid == 0:
        try:
            work()
            signal.pause()
        finally:
            os._exit(1)
    return pid


def settle(*, may_run: bool) -> tuple[set[int], list[int]]:
    """Wait for the orphans' end; the uids that only then were taken, and who goes on.

    may_run: one program may go on, and is waited for no longer than it takes to execute.
    """
    as_root = {pid for pid in children_of(os.getpid()) if _uid_of(pid) == 0}
    taken = set()
    deadline = time.monotonic() + ENDING_S
    while (left := children_of(os.getpid())) and time.monotonic() < deadline:
        taken |= {pid for pid in left if pid in as_root and _uid_of(pid) == SOMEBODY.uid}
        while any(os.waitpid(pid, os.WNOHANG)[0] for pid in children_of(os.getpid())):
            continue
        if may_run and [_program_of(pid) for pid in left] == ["sleep"]:
            return taken, left
    return taken, left


def _uid_of(pid: int) -> int:
    status = processes.read_status(pid)
    return -1 if status is None else status.uids[1]


def _program_of(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/comm").read_text().strip()
    except (FileNotFoundError, ProcessLookupError):
        return ""


def end_all(pids: list[int]) -> None:
    for pid in pids:
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)


@pytest.mark.parametrize("last", MARKS)
def test_a_launcher_that_is_killed_between_two_steps_leaves_no_process(
    build: Build, last: str
) -> None:
    jail = build()

    def mark(name: str) -> None:
        if name == last:
            os.kill(os.getpid(), signal.SIGKILL)

    with orphans_come_here():
        os.waitpid(launch(lambda: start_one(jail, mark)), 0)
        taken, left = settle(may_run=last in ("execute", "executed"))
        running = [_program_of(pid) for pid in left]
        end_all(left)
    assert not taken, "it took the uid after its launcher's end"
    assert running in ([], ["sleep"])
    assert bool(running) == (last == "executed") or last == "execute"


def test_a_launcher_that_is_killed_at_any_moment_leaves_no_process(build: Build) -> None:
    chance = random.Random(seed := random.randrange(1 << 32))
    reached = set()
    with orphans_come_here():
        for _ in range(60):
            jail = build()
            reader, writer = os.pipe()
            launcher = launch(lambda j=jail, w=writer: start_one(j, lambda n: _say(w, n)))
            os.close(writer)
            time.sleep(chance.uniform(0, 0.25))
            os.kill(launcher, signal.SIGKILL)
            os.waitpid(launcher, 0)
            said = _everything(reader).split()
            reached.add(said[-1] if said else "")
            taken, left = settle(may_run="execute" in said or "release" in said)
            running = [_program_of(pid) for pid in left]
            end_all(left)
            assert not taken, f"seed {seed}: it took the uid after its launcher's end"
            assert running in ([], ["sleep"]), f"seed {seed}, after {said}"
            if "release" not in said:
                assert running == [], f"seed {seed}, after {said}"
    assert len(reached) > 2, reached


def _say(writer: int, name: str) -> None:
    os.write(writer, f"{name} ".encode())


def _everything(reader: int) -> str:
    words = b""
    while chunk := os.read(reader, 4096):
        words += chunk
    os.close(reader)
    return words.decode()


@pytest.mark.parametrize("step", ["session", "namespaces", "privileges", "system calls"])
def test_a_child_that_is_released_early_takes_no_step_after_its_launchers_end(
    build: Build, monkeypatch: pytest.MonkeyPatch, step: str
) -> None:
    """It was told all that it needs; it is just slow at one step."""
    slow = Step("slow", lambda _: time.sleep(0.1), "for the test")
    for name in ("CELL_STEPS", "JAIL_STEPS"):
        steps = getattr(jails, name)
        wanted = [two for one in steps for two in ((slow, one) if one.name == step else (one,))]
        monkeypatch.setattr(jails, name, tuple(wanted))
    jail = build()

    def mark(name: str) -> None:
        if name == "execute":
            time.sleep(0.03)
            os.kill(os.getpid(), signal.SIGKILL)

    with orphans_come_here():
        os.waitpid(launch(lambda: start_one(jail, mark)), 0)
        taken, left = settle(may_run=False)
        end_all(left)
    assert (taken, left) == (set(), [])


@pytest.mark.parametrize("where", ["made by the spare", "asked whether its launcher is there"])
def test_a_child_that_is_born_after_its_launchers_end_ends_by_itself(
    build: Build, monkeypatch: pytest.MonkeyPatch, where: str
) -> None:
    """Nothing signals its launcher's end to it: that was before it asked to be told."""
    late_end = child_side._end_with_launcher
    late_birth = forking.become_sibling_init

    def end_with_launcher(line: int) -> None:
        time.sleep(0.1)
        late_end(line)

    def be_born_late(group: str | None) -> None:
        syscalls.outlive_parent()  # It would be killed before it could make it.
        signal.alarm(1)
        Path("/proc/self/comm").write_text("late")
        time.sleep(0.1)
        late_birth(group)

    def has_come_there() -> bool:
        found = children_of(os.getpid())
        return len(found) > 2 or "late" in map(_program_of, found)

    if where == "made by the spare":
        monkeypatch.setattr(forking, "become_sibling_init", be_born_late)
    else:
        monkeypatch.setattr(child_side, "_end_with_launcher", end_with_launcher)
    jail = build()

    def mark(name: str) -> None:
        if name == "hear":
            wait_until(has_come_there)
            os.kill(os.getpid(), signal.SIGKILL)

    with orphans_come_here():
        os.waitpid(launch(lambda: start_one(jail, mark)), 0)
        ended = _ends_of_children()
    assert process.Ended(125, None) in ended
    assert len(ended) == 3, "the others are the nursery and its spare"


def _ends_of_children() -> list[process.Ended | None]:
    ended = []
    deadline = time.monotonic() + ENDING_S
    while (left := children_of(os.getpid())) and time.monotonic() < deadline:
        for pid in left:
            pidfd = os.pidfd_open(pid)
            if is_readable(pidfd, ENDING_S):
                ended.append(process.reap(pidfd))
            os.close(pidfd)
    assert children_of(os.getpid()) == []
    return ended


def test_signals_to_the_launchers_group_end_neither_the_nursery_nor_a_waiting_child(
    build: Build,
) -> None:
    first, second = build(), build()
    told, tell = os.pipe()
    heard_of, say = os.pipe()

    def work() -> None:
        os.setpgid(0, 0)
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT):
            signal.signal(number, lambda *_: None)
        made = Nursery()
        child = heard(asked(made, first))
        before = nursery_pid(made)
        os.write(say, b"w")
        os.read(told, 1)
        child.become(first, "/bin/sh", ("sh", "-c", "exit 5"))
        child.release()
        child.executed()
        is_readable(child.pidfd, DEADLINE_S)
        assert process.reap(child.pidfd) == process.Ended(5, None)
        with born(made, second, "/bin/true") as another:
            another.release()
            another.executed()
        assert nursery_pid(made) == before
        os.write(say, b"d")

    with orphans_come_here():
        launcher = launch(work)
        for descriptor in (told, say):
            os.close(descriptor)
        try:
            assert os.read(heard_of, 1) == b"w"
            for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT):
                os.killpg(launcher, number)
            os.write(tell, b"g")
            assert os.read(heard_of, 1) == b"d"
        finally:
            os.kill(launcher, signal.SIGKILL)
            os.waitpid(launcher, 0)
            for descriptor in (tell, heard_of):
                os.close(descriptor)
            _, left = settle(may_run=False)
            end_all(left)
    assert left == []
