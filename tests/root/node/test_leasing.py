"""Uids are drawn and released while everything else in the process goes on."""

import asyncio
import contextlib
import os
import signal
import subprocess
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path
from typing import Any, TypeVar

import pytest

from hypervisor import cgroups
from kvmsec.linux.children import Child, run_in_child, start_child
from kvmsec.linux.credentials import Credentials
from kvmsec.node import dismantle, leasing
from uidpool.claims import Claims, Lease, Quarantined, Released
from uidpool.ranges import UidRanges
from uidpool.usage import inspect

pytestmark = pytest.mark.root
Spawn = Callable[..., Child]
T = TypeVar("T")
MANY = "/tmp/left-by-a-uid"
FILES = 30_000
TICKS = 100  # Many more come while a child works; of work in the loop's own thread, none.


@pytest.fixture
def claims(reaper_uid: int, tmp_path: Path) -> Claims:
    return Claims(tmp_path / "run", tmp_path / "lib", root="/")


def draw_from(claims: Claims, pool: UidRanges, generation: str = "g1") -> Awaitable[Lease]:
    return leasing.draw(claims, pool, instance="vm", generation=generation, reuse_delay_s=0)


def lease_of(claims: Claims, uid: int) -> Lease:
    return asyncio.run(draw_from(claims, UidRanges.of((uid, uid))))  # type: ignore[arg-type]


def act_as(uid: int, function: Callable[[], object]) -> None:
    run_in_child(function, what="the test's child", timeout_s=30, credentials=Credentials(uid, uid))


def leave_many_files() -> None:
    directory = Path(MANY)
    directory.mkdir()
    for number in range(FILES):
        os.close(os.open(directory / str(number), os.O_CREAT | os.O_WRONLY))


def fork_for_ever() -> None:
    for _ in range(4):
        if os.fork() == 0:
            while True:
                with contextlib.suppress(OSError):
                    if os.fork():
                        os._exit(0)


@contextlib.asynccontextmanager
async def ticking() -> AsyncIterator[list[int]]:
    """Counts how often another task of this loop had its turn."""
    ticks = [0]

    async def tick() -> None:
        while True:
            ticks[0] += 1
            await asyncio.sleep(0)

    task = asyncio.create_task(tick())
    yield ticks
    task.cancel()


def ticks_during(work: Callable[[], Awaitable[T]]) -> tuple[T, int]:
    async def act() -> tuple[T, int]:
        async with ticking() as ticks:
            return await work(), ticks[0]

    return asyncio.run(act())


# --- the loop runs on


def test_the_loop_runs_on_while_many_files_are_removed(claims: Claims, uid: int) -> None:
    lease = lease_of(claims, uid)
    act_as(uid, leave_many_files)
    outcome, ticks = ticks_during(lambda: leasing.release(claims, lease.key))
    assert outcome == Released()
    assert ticks > TICKS
    assert not Path(MANY).exists()
    assert claims.leases() == ()


def test_the_loop_runs_on_while_a_fork_loop_is_ended(
    claims: Claims, uid: int, spawn: Spawn
) -> None:
    lease = lease_of(claims, uid)
    spawn(uid, fork_for_ever)
    outcome, ticks = ticks_during(lambda: leasing.release(claims, lease.key))
    assert outcome == Released()
    assert ticks > TICKS
    assert inspect(uid).is_clean


def test_the_loop_runs_on_while_a_crowd_is_looked_through(claims: Claims, uid: int) -> None:
    act_as(uid + 100, leave_many_files)
    try:
        lease, ticks = ticks_during(lambda: draw_from(claims, UidRanges.of((uid, uid))))
        assert lease.uid == uid
        assert ticks > TICKS
        outcome, ticks = ticks_during(lambda: leasing.release(claims, lease.key))
        assert outcome == Released()
        assert ticks > TICKS
    finally:
        subprocess.run(["rm", "-r", MANY], check=True)


def test_the_loop_runs_on_while_a_quarantined_uid_is_cleaned(claims: Claims, uid: int) -> None:
    lease = lease_of(claims, uid)
    held = Path("/tmp/held")
    held.mkdir()
    (held / "somebody else's").touch()
    os.chown(held, uid, uid)
    outcome = asyncio.run(leasing.release(claims, lease.key))
    assert isinstance(outcome, Quarantined)
    assert "/tmp/held" in outcome.reason
    (held / "somebody else's").unlink()
    outcome, ticks = ticks_during(lambda: leasing.retry(claims, uid))
    assert outcome == Released()
    assert ticks > TICKS
    assert not held.exists()


def test_the_loop_runs_on_while_another_process_releases_the_same_uid(
    claims: Claims, uid: int
) -> None:
    lease = lease_of(claims, uid)
    reader, writer = os.pipe()

    def hold_the_lock() -> None:
        with claims._ledger.release_lock(uid) as lock:
            lock.acquire(0)
            os.write(writer, b"!")
            signal.pause()

    other = start_child(hold_the_lock, what="the other", keep=[writer])
    assert os.read(reader, 1)

    async def end_the_other(ticks: list[int]) -> None:
        while ticks[0] < TICKS:
            await asyncio.sleep(0)
        other.close()

    async def act() -> Any:
        async with ticking() as ticks:
            ending = asyncio.create_task(end_the_other(ticks))
            outcome = await leasing.release(claims, lease.key)
            await ending
            return outcome

    try:
        assert asyncio.run(act()) == Released()
    finally:
        other.close()
        os.close(reader)
        os.close(writer)


def test_two_releases_in_one_loop_clean_once(claims: Claims, uid: int) -> None:
    lease = lease_of(claims, uid)
    act_as(uid, leave_many_files)

    async def act() -> list[Any]:
        return await asyncio.gather(*(leasing.release(claims, lease.key) for _ in range(3)))

    assert asyncio.run(act()) == [Released()] * 3
    assert claims.states() == ()


# --- nothing is lost when somebody dies


def children_of(pid: int) -> list[int]:
    return [int(word) for word in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


async def at_work(pid: int) -> int:
    """The child that cleans, once it has begun to remove."""
    while len(os.listdir(MANY)) == FILES:
        await asyncio.sleep(0)
    (child,) = children_of(pid)
    return child


def test_a_cleaner_that_is_killed_leaves_a_quarantine(claims: Claims, uid: int) -> None:
    lease = lease_of(claims, uid)
    act_as(uid, leave_many_files)

    async def act() -> Any:
        releasing = asyncio.create_task(leasing.release(claims, lease.key))
        os.kill(await at_work(os.getpid()), signal.SIGKILL)
        return await releasing

    outcome = asyncio.run(act())
    assert isinstance(outcome, Quarantined)
    assert "was ended by signal 9" in outcome.reason
    assert [one.uid for one in claims.quarantined()] == [uid]
    assert claims.leases() == ()
    assert asyncio.run(leasing.retry(claims, uid)) == Released()
    assert not Path(MANY).exists()


def test_a_release_that_is_cancelled_keeps_the_lease_and_no_child(claims: Claims, uid: int) -> None:
    lease = lease_of(claims, uid)
    act_as(uid, leave_many_files)

    async def act() -> None:
        releasing = asyncio.create_task(leasing.release(claims, lease.key))
        await at_work(os.getpid())
        releasing.cancel()
        with pytest.raises(asyncio.CancelledError):
            await releasing

    asyncio.run(act())
    assert children_of(os.getpid()) == []
    assert claims.leases() == (lease,)
    assert asyncio.run(leasing.release(claims, lease.key)) == Released()
    assert not Path(MANY).exists()


def test_a_launcher_that_is_killed_takes_its_cleaner_along_and_keeps_the_lease(
    claims: Claims, uid: int
) -> None:
    lease = lease_of(claims, uid)
    act_as(uid, leave_many_files)
    launcher = start_child(
        lambda: asyncio.run(leasing.release(claims, lease.key)), what="the launcher"
    )
    cleaner = asyncio.run(at_work(launcher.pid))
    pidfd = os.pidfd_open(cleaner)
    try:
        launcher.close()
        assert asyncio.run(dismantle.readable(pidfd, 10))
    finally:
        os.close(pidfd)
    assert claims.leases() == (lease,)
    assert Path(MANY).exists()
    assert asyncio.run(leasing.release(claims, lease.key)) == Released()
    assert not Path(MANY).exists()


def test_a_draw_that_is_cancelled_leaves_the_uid_free(claims: Claims, uid: int) -> None:
    act_as(uid + 100, leave_many_files)

    async def act() -> None:
        drawing = asyncio.ensure_future(draw_from(claims, UidRanges.of((uid, uid))))
        while not children_of(os.getpid()):
            await asyncio.sleep(0)
        assert [one.uid for one in claims.leases()] == [uid]
        drawing.cancel()
        with pytest.raises(asyncio.CancelledError):
            await drawing

    try:
        asyncio.run(act())
        assert children_of(os.getpid()) == []
        assert claims.states() == ()
    finally:
        subprocess.run(["rm", "-r", MANY], check=True)


def test_a_drawn_uid_that_somebody_has_is_quarantined_and_another_drawn(
    claims: Claims, uid: int, spawn: Spawn
) -> None:
    spawn(uid + 100)
    drawn = set()
    pool = UidRanges.of((uid, uid), (uid + 100, uid + 100))
    while not claims.quarantined():
        lease = asyncio.run(draw_from(claims, pool))  # type: ignore[arg-type]
        drawn.add(lease.uid)
        asyncio.run(leasing.release(claims, lease.key))
    assert drawn == {uid}
    assert [one.uid for one in claims.quarantined()] == [uid + 100]


# --- control groups


@pytest.fixture
def group() -> Any:
    hierarchy = cgroups.Hierarchy.detect()
    made = hierarchy.create(f"kvmsec_test{os.getpid()}", "loop")
    assert made.paths, made.problem
    yield made
    made.kill(10)
    made.remove()


def test_a_control_group_with_a_fork_loop_is_emptied_and_removed(
    group: cgroups.InstanceCgroup,
) -> None:
    reader, writer = os.pipe()

    def join_and_fork() -> None:
        for path in group.paths:
            Path(path, "cgroup.procs").write_text("0")
        fork_for_ever()
        os.write(writer, b"in")
        signal.pause()

    with start_child(join_and_fork, what="a fork loop", keep=(writer,)):
        os.close(writer)
        assert os.read(reader, 2) == b"in"
        os.close(reader)
        asyncio.run(dismantle.remove_group(group))
    assert not any(Path(path).exists() for path in group.paths)


class SlowGroup(cgroups.InstanceCgroup):
    """A group whose processes take as long to end as one gives them."""

    def kill(self, timeout_s: float) -> bool:
        time.sleep(min(timeout_s, 0.3))
        return timeout_s >= 0.3


def test_the_loop_runs_on_while_a_control_group_empties(group: cgroups.InstanceCgroup) -> None:
    slow = SlowGroup(group.paths)
    _, ticks = ticks_during(lambda: dismantle.remove_group(slow))
    assert ticks > TICKS
    assert not any(Path(path).exists() for path in group.paths)


class StuckGroup(cgroups.InstanceCgroup):
    """A group with a process that does not end."""

    def kill(self, timeout_s: float) -> bool:
        return False


def test_a_control_group_that_does_not_empty_is_told(group: cgroups.InstanceCgroup) -> None:
    with pytest.raises(cgroups.CgroupBusy, match="still holds something"):
        asyncio.run(dismantle.remove_group(StuckGroup(group.paths)))
