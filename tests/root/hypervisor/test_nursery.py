"""Children of a nursery: whose they are, and how they are shut in.

What they have of their launcher's is in test_nursery_apart.py, how a nursery and its launcher are
killed in test_nursery_killed.py, and how a child is told what to become in test_newborn.py.
"""

import errno
import os
import random
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from hypervisor import jail as jails
from hypervisor import process
from hypervisor.cgroups import Hierarchy, InstanceCgroup
from hypervisor.errors import JailFailed
from hypervisor.jail import Cell, Jail
from hypervisor.limits import ProcessLimits
from hypervisor.nursery import Nursery
from hypervisor.seccomp import find_filter
from hypervisor.steps import Step
from kvmsec.linux import processes
from tests.root.hypervisor.jailed import (
    SOMEBODY,
    Build,
    asked,
    born,
    children_of,
    end,
    execute,
    field,
    heard,
    held_files,
    is_asleep,
    mounts_of,
    newborn,
    nursery_pid,
    status_of_end,
    wait_until,
)

pytestmark = [pytest.mark.root, pytest.mark.usefixtures("the_launcher_is_as_before")]

OF_STATUS = (
    *("Umask", "TracerPid", "Uid", "Gid", "Groups", "NoNewPrivs", "Seccomp", "Threads"),
    *("SigPnd", "ShdPnd", "SigBlk", "SigIgn", "SigCgt", *processes.CAPABILITY_SETS),
)
KINDS = ("mnt", "net", "ipc", "uts", "pid", "pid_for_children", "cgroup", "user", "time")


@pytest.fixture
def group() -> Iterator[InstanceCgroup]:
    made = Hierarchy.detect().create(f"kvmsec_test_{os.getpid()}", "guest")
    yield made
    made.kill(5)
    made.remove()


# Whose it is ---------------------------------------------------------------------------------


def test_a_child_is_the_launchers_own_and_ends_as_such(nursery: Nursery, build: Build) -> None:
    with born(nursery, build(), "/bin/sh", "-c", "exit 7") as child:
        pid = child.process.pid
        assert processes.pid_of(child.pidfd) == pid
        assert processes.identify(pid) == child.process
        assert int(field(pid, "PPid")) == os.getpid()
        assert field(pid, "NSpid").split() == [str(pid), "1"]
        assert children_of(nursery_pid(nursery)) == []
        execute(child)
        assert status_of_end(child) == process.Ended(7, None)
        assert processes.identify(pid) is None, "it was reaped"


def test_a_child_is_born_in_its_group_and_joins_it_nowhere(
    nursery: Nursery, build: Build, group: InstanceCgroup, monkeypatch: pytest.MonkeyPatch
) -> None:
    hang = Step("hang", lambda _: signal.pause(), "for the test")
    monkeypatch.setattr(jails, "CELL_STEPS", (hang, *jails.CELL_STEPS))
    child = heard(asked(nursery, build(cgroups=group.tasks_files), group.unified))
    try:
        assert str(child.process.pid) in Path(f"{group.unified}/cgroup.procs").read_text().split()
    finally:
        end(child)


def test_a_child_is_in_all_of_its_groups_when_it_runs(
    nursery: Nursery, build: Build, group: InstanceCgroup
) -> None:
    jail = build(cgroups=group.tasks_files)
    with born(nursery, jail, "/bin/sleep", "60", group=group.unified) as child:
        execute(child)
        assert group.problems_of(child.process.pid) == []


def test_it_is_shut_in_as_one_that_the_launcher_forks(nursery: Nursery, build: Build) -> None:
    limits = ProcessLimits(open_files=333, processes=44, file_bytes=1 << 20, oom_score_adjust=321)
    wanted: dict[str, Any] = {"limits": limits, "system_calls": find_filter()}

    def look(pid: int, jail: Jail) -> dict[str, Any]:
        namespaces_ = {kind: os.readlink(f"/proc/{pid}/ns/{kind}") for kind in KINDS}
        shared = {k for k, v in namespaces_.items() if v == os.readlink(f"/proc/self/ns/{k}")}
        assert jail.limits.problems_of(pid) == []
        return {
            "status": {name: field(pid, name) for name in OF_STATUS},
            "namespaces shared": shared,
            "limits": Path(f"/proc/{pid}/limits").read_text(),
            "environment": Path(f"/proc/{pid}/environ").read_bytes(),
            "session and group": [field(pid, name).split()[1] for name in ("NSsid", "NSpgid")],
            "mounts": mounts_of(pid),
            "descriptors": {name: what.partition("[")[0] for name, what in held_files(pid).items()},
            "directory": os.readlink(f"/proc/{pid}/cwd"),
            "groups": Path(f"/proc/{pid}/cgroup").read_text(),
            "oom": Path(f"/proc/{pid}/oom_score_adj").read_text(),
            "core": Path(f"/proc/{pid}/coredump_filter").read_text(),
        }

    with newborn(jail := build(**wanted), "/bin/sleep", "60") as child:
        execute(child)
        wait_until(lambda: is_asleep(child.process.pid))
        of_spawn = look(child.process.pid, jail)
    with born(nursery, jail := build(**wanted), "/bin/sleep", "60") as child:
        execute(child)
        wait_until(lambda: is_asleep(child.process.pid))
        of_nursery = look(child.process.pid, jail)
    assert of_nursery == of_spawn
    assert of_nursery["namespaces shared"] == {"user", "time"}
    assert of_nursery["status"]["Uid"].split() == [str(SOMEBODY.uid)] * 4
    assert of_nursery["session and group"] == ["1", "1"]


def test_twenty_births_at_once_in_any_order_each_on_its_own_line(
    nursery: Nursery, build: Build
) -> None:
    jails_ = [build() for _ in range(20)]
    births = [asked(nursery, jail) for jail in jails_]
    chance = random.Random(seed := random.randrange(1 << 32))
    order = list(range(20))
    known = []
    try:
        for number in chance.sample(order, 20):
            known.append(heard(births[number]))
        assert len({child.process.pid for child in births}) == 20, f"seed {seed}"
        for number in chance.sample(order, 20):
            argv = ("/bin/sh", "-c", f"exit {number}")
            births[number].become(jails_[number], argv[0], argv)
        for number in chance.sample(order, 20):
            births[number].release()
        for number in chance.sample(order, 20):
            births[number].executed()
            assert status_of_end(births[number]) == process.Ended(number, None), f"seed {seed}"
    finally:
        for child in known:
            end(child)


# The process ---------------------------------------------------------------------------------


def test_one_process_makes_all_of_them(nursery: Nursery, build: Build) -> None:
    nursery.begin()
    first = nursery_pid(nursery)
    for _ in range(2):
        with born(nursery, build(), "/bin/true"):
            nursery.begin()
            assert nursery_pid(nursery) == first


def test_its_end_leaves_running_programs_and_waiting_children_alone(
    nursery: Nursery, build: Build
) -> None:
    waiting_jail = build()
    with (
        born(nursery, build(), "/bin/sleep", "60") as runs,
        born(nursery, waiting_jail, "/bin/sh", "-c", "exit 3") as waits,
    ):
        execute(runs)
        pid = nursery_pid(nursery)
        nursery.close()
        assert processes.identify(pid) is None
        assert processes.is_alive(runs.process)
        execute(waits)
        assert status_of_end(waits) == process.Ended(3, None)
        with born(nursery, build(), "/bin/true") as another:
            execute(another)


def test_it_is_closed_twice_and_without_a_beginning() -> None:
    made = Nursery()
    made.close()
    made.begin()
    made.close()
    made.close()
    assert children_of(os.getpid()) == []


def test_a_nursery_does_not_grow_with_its_births(nursery: Nursery, build: Build) -> None:
    jail = build()

    def give_birth() -> None:
        end(heard(asked(nursery, jail)))
        nursery.prepare()
        with pytest.raises(JailFailed):
            heard(nursery.birth("/sys/fs/cgroup/nowhere"))
        nursery.prepare()

    def resident_kib(pid: int) -> int:
        return int(field(pid, "RssAnon").split()[0])

    for _ in range(10):
        give_birth()
    pid = nursery_pid(nursery)
    before_kib = resident_kib(pid)
    for _ in range(50):
        give_birth()
    # The null device, its orders, its result, and by what it knows its spare and the spare's use.
    wait_until(lambda: len(held_files(pid)) == 3 + 1 + 1 + 2)
    assert resident_kib(pid) - before_kib <= 32


# What it can't do ----------------------------------------------------------------------------


def test_a_group_that_is_gone_is_told_and_the_nursery_goes_on(
    nursery: Nursery, build: Build
) -> None:
    jail = build()
    with pytest.raises(JailFailed, match="/sys/fs/cgroup/nowhere/at-all") as raised:
        heard(nursery.birth("/sys/fs/cgroup/nowhere/at-all"))
    assert (raised.value.step, raised.value.errno) == ("fork", errno.ENOENT)
    pid = nursery_pid(nursery)
    with pytest.raises(JailFailed, match=f"{os.getcwd()}") as raised:
        heard(nursery.birth(os.getcwd()))
    assert (raised.value.step, raised.value.errno) == ("fork", errno.EBADF)
    with born(nursery, jail, "/bin/true") as child:
        execute(child)
    assert nursery_pid(nursery) == pid


def test_a_tree_that_is_closed_is_an_error_of_the_order(nursery: Nursery) -> None:
    before = set(os.listdir("/proc/self/fd"))
    child = heard(nursery.birth())
    with pytest.raises(OSError, match="Bad file descriptor"):
        child.enter(Cell(-1))
    end(child)
    nursery.close()
    assert set(os.listdir("/proc/self/fd")) == before
