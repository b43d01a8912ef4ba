"""What descriptors a jailed program gets: those that were granted, whatever the launcher has."""

import ast
import errno
import fcntl
import os
import resource
import socket
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from hypervisor import jail as jails
from hypervisor import process
from hypervisor.jail import Cell, Jail
from hypervisor.newborn import spawn
from tests.root.hypervisor.jailed import (
    DEADLINE_S,
    SOMEBODY,
    Build,
    descriptor_limit,
    is_asleep,
    running,
    wait_until,
)

pytestmark = [pytest.mark.root, pytest.mark.usefixtures("the_launcher_is_as_before")]


def test_exactly_the_granted_descriptors_arrive(build: Build, tmp_path: Path) -> None:
    left, right = socket.socketpair()
    lock = os.open(tmp_path / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC)
    fcntl.flock(lock, fcntl.LOCK_EX)
    leaked = os.open("/etc/passwd", os.O_RDONLY)
    grants = [os.open(name, os.O_RDONLY | os.O_CLOEXEC) for name in ("/etc/hostname", "/etc/hosts")]
    for descriptor in (left.fileno(), leaked, *grants):
        os.set_inheritable(descriptor, True)
    jail = build(descriptors={3: grants[1], 4: grants[0], 7: grants[0]})
    try:
        with running(jail, "/bin/sleep", "60") as pid:
            wait_until(lambda: is_asleep(pid))  # It has loaded its libraries then.
            held = {
                int(name): os.stat(f"/proc/{pid}/fd/{name}")[1:3]
                for name in os.listdir(f"/proc/{pid}/fd")
            }
    finally:
        wanted = {
            3: os.fstat(grants[1])[1:3],
            4: os.fstat(grants[0])[1:3],
            7: os.fstat(grants[0])[1:3],
            1: os.fstat(jail.log)[1:3],
            2: os.fstat(jail.log)[1:3],
        }
        for descriptor in (lock, leaked, *grants):
            os.close(descriptor)
        left.close()
        right.close()
    del held[0]
    assert held == wanted


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(st.dictionaries(st.integers(3, 14), st.integers(3, 14), max_size=10), st.integers(1, 14))
def test_descriptors_come_to_their_numbers_however_these_overlap(
    wanted: dict[int, int], log: int
) -> None:
    """Inside number -> the launcher's number, both from the same few."""

    def place() -> Any:
        for number in {*wanted.values(), log}:
            opened = os.memfd_create(f"file-{number}")
            os.dup2(opened, number)
        files = {
            number: os.readlink(f"/proc/self/fd/{number}") for number in {*wanted.values(), log}
        }
        jail = Jail(
            Cell(-1),
            name="x",
            credentials=SOMEBODY,
            output=-1,
            log=log,
            system_calls=None,
            descriptors=wanted,
        )
        jails._place_descriptors(jail)
        kept = {}
        for name in os.listdir("/proc/self/fd"):
            if os.path.exists(f"/proc/self/fd/{name}") and os.get_inheritable(int(name)):
                kept[int(name)] = os.readlink(f"/proc/self/fd/{name}")
        expected = {0: "/dev/null", 1: files[log], 2: files[log]}
        expected |= {inside: files[ours] for inside, ours in wanted.items()}
        return [sorted(kept.items()), sorted(expected.items())]

    reader, writer = os.pipe()
    pid = os.fork()
    if pid == 0:
        try:
            say = fcntl.fcntl(writer, fcntl.F_DUPFD_CLOEXEC, 50)
            os.write(say, repr(place()).encode())
        finally:
            os._exit(0)
    os.close(writer)
    told = os.read(reader, 65536)
    os.close(reader)
    os.waitpid(pid, 0)
    kept, expected = ast.literal_eval(told.decode())
    assert kept == expected


def test_a_launcher_with_many_descriptors_can_start_one(build: Build) -> None:
    if resource.getrlimit(resource.RLIMIT_NOFILE)[1] < 1400:
        pytest.skip("this process may not open enough descriptors")
    granted = os.open("/etc/hostname", os.O_RDONLY)
    with descriptor_limit(1400):
        many = [os.open("/dev/null", os.O_RDONLY) for _ in range(1200)]
        high = os.dup(granted)
        try:
            jail = build(descriptors={3: high})
            assert high > 1023
            with running(jail, "/bin/sleep", "60") as pid:
                wait_until(lambda: is_asleep(pid))
                assert sorted(map(int, os.listdir(f"/proc/{pid}/fd"))) == [0, 1, 2, 3]
        finally:
            for descriptor in (*many, high, granted):
                os.close(descriptor)


def test_too_few_descriptors_are_an_error_that_leaves_nothing(build: Build) -> None:
    jail = build()
    lowest_free = os.dup(0)
    os.close(lowest_free)
    failures = 0
    for limit in range(lowest_free, lowest_free + 200):
        before = set(os.listdir("/proc/self/fd"))
        with descriptor_limit(limit):
            try:
                child = spawn(jail, "/bin/true", ["true"])
            except OSError as error:
                assert error.errno == errno.EMFILE
                failures += 1
                child = None
            if child is not None:
                child.release()
                child.executed()
                process.kill_and_wait(child.pidfd, DEADLINE_S)
                process.reap(child.pidfd)
                child.close()
                os.close(child.pidfd)
        assert set(os.listdir("/proc/self/fd")) == before
        with pytest.raises(ChildProcessError):
            os.waitpid(-1, os.WNOHANG)
        if child is not None:
            break
    else:
        pytest.fail("it never succeeded")
    assert failures > 3
