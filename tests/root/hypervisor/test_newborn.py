"""What a launcher and a child tell each other, until the child has become a program or failed."""

import contextlib
import errno
import os
import select
import signal
import socket
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest

from hypervisor import jail as jails
from hypervisor import process
from hypervisor.errors import JailFailed
from hypervisor.jail import CELL_STEPS, JAIL_STEPS, Jail
from hypervisor.limits import ProcessLimits
from hypervisor.newborn import Newborn, spawn
from hypervisor.nursery import Nursery
from hypervisor.steps import Step
from kvmsec.linux import processes
from kvmsec.linux.readiness import is_readable
from tests.root.hypervisor.jailed import (
    DEADLINE_S,
    Build,
    asked,
    born,
    children_of,
    descriptor_limit,
    end,
    heard,
    held_files,
    is_asleep,
    others_than,
    spares_of,
    wait_for_spare,
    wait_until,
)

pytestmark = [pytest.mark.root, pytest.mark.usefixtures("the_launcher_is_as_before")]

STEP_NAMES = [step.name for step in (*CELL_STEPS, *JAIL_STEPS)]


@contextmanager
def nothing_is_left(nursery: Nursery) -> Iterator[None]:
    """No descriptor and no child of the launcher's, but the nursery and a spare."""
    nursery.begin()
    wait_for_spare(nursery)
    before = set(os.listdir("/proc/self/fd"))
    yield
    nursery.prepare()
    wait_until(lambda: not others_than(nursery) and len(spares_of(nursery)) == 1)
    assert set(os.listdir("/proc/self/fd")) == before


def failure_of(child: Newborn) -> JailFailed:
    child.release()
    assert is_readable(child.fileno(), DEADLINE_S)
    with pytest.raises(JailFailed) as raised:
        child.executed()
    return raised.value


# Closed too early ----------------------------------------------------------------------------


def test_one_that_is_closed_before_it_was_heard_of_is_ended(nursery: Nursery, build: Build) -> None:
    jail = build()
    with nothing_is_left(nursery):
        for _ in range(5):
            asked(nursery, jail).close()
        births = [asked(nursery, jail) for _ in range(5)]
        for child in births:
            child.close()
            child.close()


def test_one_whose_word_came_already_is_ended_all_the_same(nursery: Nursery, build: Build) -> None:
    jail = build()
    with nothing_is_left(nursery):
        child = asked(nursery, jail)
        assert is_readable(child.line.fileno(), DEADLINE_S)
        child.close()


def test_one_that_could_not_be_made_is_closed_at_once(nursery: Nursery) -> None:
    with nothing_is_left(nursery):
        nursery.birth("/sys/fs/cgroup/nowhere").close()


@pytest.mark.parametrize("is_told", [False, True])
def test_one_that_was_heard_of_and_is_closed_ends_by_itself_and_is_the_callers(
    nursery: Nursery, build: Build, *, is_told: bool
) -> None:
    jail = build()
    with nothing_is_left(nursery):
        child = heard(asked(nursery, jail))
        if is_told:
            child.become(jail, "/bin/sleep", ("sleep", "60"))
        child.close()
        assert select.select([child.pidfd], [], [], DEADLINE_S)[0]
        assert process.reap(child.pidfd) == process.Ended(125, None)
        os.close(child.pidfd)


# Descriptors ---------------------------------------------------------------------------------


def test_too_few_descriptors_at_any_point_are_an_error_that_leaves_nothing(build: Build) -> None:
    jail = build()
    failures = 0
    before = set(os.listdir("/proc/self/fd"))
    lowest_free = os.dup(0)
    os.close(lowest_free)
    for limit in range(lowest_free, lowest_free + 60):
        made, child = Nursery(), None
        with descriptor_limit(limit):
            try:
                with born(made, jail, "/bin/true") as child:
                    child.release()
                    child.executed()
            except OSError as error:
                assert error.errno == errno.EMFILE, limit
                failures += 1
            except JailFailed as error:  # It was the nursery that could not begin.
                assert (error.step, "is gone" in error.detail) == ("fork", True), limit
            made.close()
        assert set(os.listdir("/proc/self/fd")) == before, limit
        assert children_of(os.getpid()) == [], limit
        if child is not None:
            break
    else:
        pytest.fail("it never succeeded")
    assert failures > 3


@contextmanager
def room_for(count: int) -> Iterator[None]:
    """Every number that this process may have is taken, but so many."""
    taken = []
    with descriptor_limit(max(map(int, os.listdir("/proc/self/fd"))) + 1 + count):
        try:
            with contextlib.suppress(OSError):
                while True:
                    taken.append(os.dup(0))
            for descriptor in [taken.pop() for _ in range(count)]:
                os.close(descriptor)
            yield
        finally:
            for descriptor in taken:
                os.close(descriptor)


@pytest.mark.parametrize("room", [0, 1])
def test_too_few_descriptors_once_it_was_asked_for_leave_nothing(
    nursery: Nursery, build: Build, room: int
) -> None:
    jail = build()
    with nothing_is_left(nursery):
        child = asked(nursery, jail)
        assert is_readable(child.line.fileno(), DEADLINE_S)
        with room_for(room), contextlib.ExitStack() as expected:
            if not room:
                raised = expected.enter_context(pytest.raises(OSError, match="Too many open"))
            child.hear()
        if room:
            end(child)
        else:
            assert raised.value.errno == errno.EMFILE
            assert not child.is_known
            child.close()


def test_too_few_descriptors_when_it_is_closed_leave_nothing(
    nursery: Nursery, build: Build
) -> None:
    jail = build()
    with nothing_is_left(nursery):
        child = asked(nursery, jail)
        with room_for(0):
            child.close()


def test_more_descriptors_than_one_message_takes_arrive_on_their_numbers(
    nursery: Nursery, build: Build
) -> None:
    names = [os.memfd_create(f"number {number}") for number in range(600)]
    wanted = {3 + number: ours for number, ours in enumerate(reversed(names))}
    files = {str(inside): os.readlink(f"/proc/self/fd/{ours}") for inside, ours in wanted.items()}
    try:
        jail = build(descriptors=wanted, limits=ProcessLimits(open_files=4096))
        with born(nursery, jail, "/bin/sleep", "60") as child:
            child.release()
            child.executed()
            wait_until(lambda: is_asleep(child.process.pid))
            held = held_files(child.process.pid)
            assert {name: held[name] for name in held if int(name) > 2} == files
    finally:
        for descriptor in names:
            os.close(descriptor)


@pytest.mark.parametrize("count", [252, 253, 254, 506, 507])
def test_as_many_as_fill_messages_arrive(nursery: Nursery, build: Build, count: int) -> None:
    """Two more are handed over, what it writes to among them."""
    names = [os.memfd_create("x") for _ in range(count - 2)]
    jail = build(descriptors=dict(enumerate(names, 3)), limits=ProcessLimits(open_files=4096))
    try:
        with born(nursery, jail, "/bin/sleep", "60") as child:
            child.release()
            child.executed()
            wait_until(lambda: is_asleep(child.process.pid))
            assert len(held_files(child.process.pid)) == count + 1
    finally:
        for descriptor in names:
            os.close(descriptor)


def test_more_descriptors_than_its_limit_are_told(nursery: Nursery, build: Build) -> None:
    names = [os.memfd_create("x") for _ in range(100)]
    jail = build(descriptors=dict(enumerate(names, 3)), limits=ProcessLimits(open_files=64))
    try:
        with born(nursery, jail, "/bin/true") as child:
            failed = failure_of(child)
        assert (failed.step, failed.errno) == ("descriptors", errno.EMFILE)
    finally:
        for descriptor in names:
            os.close(descriptor)


def test_the_channels_are_out_of_the_way_of_every_number(nursery: Nursery, build: Build) -> None:
    """Those that the child has them on when it is told are the first to be granted."""
    granted = [os.memfd_create(f"file {number}") for number in range(12)]
    wanted = dict(zip(range(3, 15), granted, strict=True))
    try:
        with born(nursery, build(descriptors=wanted), "/bin/sleep", "60") as child:
            child.release()
            child.executed()
            wait_until(lambda: is_asleep(child.process.pid))
            held = held_files(child.process.pid)
        assert [held[str(number)] for number in wanted] == [
            f"/memfd:file {number} (deleted)" for number in range(12)
        ]
        assert len(held) == 15
    finally:
        for descriptor in granted:
            os.close(descriptor)


# Command lines -------------------------------------------------------------------------------


def test_a_long_command_line_arrives_whole(nursery: Nursery, build: Build) -> None:
    words = ("a" * 90_000, "b" * 90_000)
    script = '[ ${#1} = 90000 ] && [ ${#2} = 90000 ] && [ "${2#bbb}" != "$2" ]'
    with born(nursery, build(), "/bin/sh", "-c", script, "sh", *words) as child:
        child.release()
        child.executed()
        assert select.select([child.pidfd], [], [], DEADLINE_S)[0]
        assert process.reap(child.pidfd) == process.Ended(0, None)


@pytest.mark.parametrize("is_raised", [False, True])
def test_one_that_no_message_holds_is_told(
    nursery: Nursery, build: Build, *, is_raised: bool
) -> None:
    """Also where the node lets messages be larger than what a child takes."""
    jail = build()
    argv = ("/bin/true", *["x" * 100_000] * 4)
    with nothing_is_left(nursery):
        child = heard(asked(nursery, jail))
        if is_raised:
            so_sndbufforce = 32  # linux/include/uapi/asm-generic/socket.h
            child.line.setsockopt(socket.SOL_SOCKET, so_sndbufforce, 1 << 20)
        with pytest.raises(JailFailed, match="too long") as raised:
            child.become(jail, argv[0], argv)
        assert raised.value.errno == errno.EMSGSIZE
        end(child)


# Steps that fail -----------------------------------------------------------------------------


def fail_at(monkeypatch: pytest.MonkeyPatch, name: str, error: BaseException) -> None:
    """Have one step be taken, and fail all the same."""

    def fail_after(act: Callable[[Any], None]) -> Callable[[Any], None]:
        def take_and_fail(subject: Any) -> None:
            act(subject)
            raise error

        return take_and_fail

    for which in ("CELL_STEPS", "JAIL_STEPS"):
        steps = [
            Step(step.name, fail_after(step.act) if step.name == name else step.act, step.reason)
            for step in getattr(jails, which)
        ]
        monkeypatch.setattr(jails, which, tuple(steps))


@pytest.mark.parametrize("name", STEP_NAMES)
def test_a_step_that_fails_is_told_whatever_was_done_before(
    nursery: Nursery, build: Build, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    fail_at(monkeypatch, name, OSError(errno.EIO, "injected"))
    granted = [os.memfd_create("x") for _ in range(8)]
    jail = build(descriptors=dict(zip((3, 4, 5, 6, 7, 8, 40, 41), granted, strict=True)))
    try:
        with nothing_is_left(nursery):
            with born(nursery, jail, "/bin/true") as child:
                failed = failure_of(child)
                assert select.select([child.pidfd], [], [], DEADLINE_S)[0]
                assert process.reap(child.pidfd) == process.Ended(126, None)
            assert (failed.step, failed.errno) == (name, errno.EIO)
            assert "injected" in failed.detail
    finally:
        for descriptor in granted:
            os.close(descriptor)


@pytest.mark.parametrize("name", [CELL_STEPS[0].name, JAIL_STEPS[-1].name])
def test_a_fault_of_the_code_is_told_too(
    nursery: Nursery, build: Build, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    fail_at(monkeypatch, name, KeyError("bug"))
    with born(nursery, build(), "/bin/true") as child:
        failed = failure_of(child)
    assert (failed.step, failed.detail) == ("jail", "KeyError('bug')")


def test_a_path_that_is_no_text_is_told(
    nursery: Nursery, build: Build, monkeypatch: pytest.MonkeyPatch
) -> None:
    fail_at(monkeypatch, "session", OSError(errno.EIO, os.fsdecode(b"of \xff" + b"x" * 5000)))
    with born(nursery, build(), "/bin/true") as child:
        failed = failure_of(child)
    assert failed.step == "session"
    assert r"of \udcff" in failed.detail


def test_one_that_is_killed_in_its_cell_is_told_as_killed(
    nursery: Nursery, build: Build, monkeypatch: pytest.MonkeyPatch
) -> None:
    hang = Step("hang", lambda _: signal.pause(), "for the test")
    monkeypatch.setattr(jails, "CELL_STEPS", (hang, *jails.CELL_STEPS))
    jail = build()
    with nothing_is_left(nursery), born(nursery, jail, "/bin/true") as child:
        processes.kill(child.pidfd)
        assert select.select([child.pidfd], [], [], DEADLINE_S)[0]
        failed = failure_of(child)
        assert (failed.step, "killed before it could" in failed.detail) == ("exec", True)


def test_a_child_of_spawn_that_fails_in_its_cell_leaves_nothing(
    build: Build, monkeypatch: pytest.MonkeyPatch
) -> None:
    fail_at(monkeypatch, "session", OSError(errno.EIO, "injected"))
    jail: Jail = build()
    before = set(os.listdir("/proc/self/fd"))
    child = spawn(jail, "/bin/true", ("true",))
    assert failure_of(child).step == "session"
    end(child)
    assert set(os.listdir("/proc/self/fd")) == before
