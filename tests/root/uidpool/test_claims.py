"""Leases for real: rival processes, processes that are killed, and uids that are truly cleaned."""

import contextlib
import multiprocessing
import os
import random
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from kvmsec.linux import command
from kvmsec.linux.children import Child
from kvmsec.linux.processes import is_alive
from kvmsec.linux.syscalls import mount, umount
from uidpool.claims import LeaseKey, Quarantined, Released
from uidpool.errors import NoCleanUid, RecordNotWritten
from uidpool.provision import apply, plan, plan_removal, remove
from uidpool.ranges import UidRanges
from uidpool.snapshot import Snapshot
from uidpool.usage import inspect
from uidpool.waiting import WaitingClaims

pytestmark = pytest.mark.root
Spawn = Callable[..., Child]
POOL = UidRanges.parse("214000-214009")


@pytest.fixture(scope="module", autouse=True)
def users() -> Iterator[None]:
    apply(plan(POOL, Snapshot.read()))
    yield
    remove(plan_removal(POOL, Snapshot.read()))


@pytest.fixture
def claims(tmp_path: Path) -> WaitingClaims:
    return claims_at(tmp_path, "/")


def claims_at(directory: Path, root: str) -> WaitingClaims:
    return WaitingClaims(directory / "run", directory / "lib", root=root)


def test_a_release_ends_what_the_uid_runs(claims: WaitingClaims, spawn: Spawn) -> None:
    lease = claims.draw(POOL, instance="vm", generation="g1", reuse_delay_s=0)
    spawn(lease.uid, lambda: Path("/dev/shm/left").touch())
    assert inspect(lease.uid).processes
    assert claims.release(lease.key) == Released()
    assert inspect(lease.uid).is_clean
    assert not Path("/dev/shm/left").exists()


def test_a_second_release_leaves_the_next_holder_running(
    claims: WaitingClaims, spawn: Spawn
) -> None:
    pool = UidRanges.parse("214000")
    first = claims.draw(pool, instance="vm", generation="g1", reuse_delay_s=0)
    claims.release(first.key)
    second = claims.draw(pool, instance="vm", generation="g2", reuse_delay_s=0)
    child = spawn(second.uid)
    assert claims.release(first.key) == Released()
    os.kill(child.pid, 0)
    assert [one.pid for one in inspect(second.uid).processes] == [child.pid]
    assert claims.leases() == (second,)
    assert claims.release(second.key) == Released()


def test_a_dirty_uid_is_passed_over_and_freed_by_a_retry(
    claims: WaitingClaims, spawn: Spawn
) -> None:
    for uid in list(POOL)[:9]:
        spawn(uid)
    drawn = set()
    for _ in range(2):  # The first may have the luck to find the clean one at once.
        with contextlib.suppress(NoCleanUid):
            drawn.add(claims.draw(POOL, instance="vm", generation="g1").uid)
    assert drawn <= {214009}
    quarantined = claims.quarantined()
    assert quarantined
    for record in quarantined:
        assert "processes" in record.reason
        assert claims.retry(record.uid) == Released()
        assert inspect(record.uid).is_clean


def test_without_the_reaper_a_dirty_uid_is_quarantined(claims: WaitingClaims, spawn: Spawn) -> None:
    lease = claims.draw(POOL, instance="vm", generation="g1")
    child = spawn(lease.uid)
    command.run(["usermod", "--comment", "somebody else", "kvmsec-reaper"], timeout_s=10)
    try:
        outcome = claims.release(lease.key)
        assert isinstance(outcome, Quarantined)
        assert "there is no user kvmsec-reaper" in outcome.reason
        os.kill(child.pid, 0)
    finally:
        command.run(["usermod", "--comment", "kvmsec reaper", "kvmsec-reaper"], timeout_s=10)
    assert claims.retry(lease.uid) == Released()


@pytest.mark.parametrize("whose", ["root", "www-data", "nobody", "a person", "nobody known"])
def test_a_damaged_lease_ends_nothing_of_somebody_else(
    claims: WaitingClaims, spawn: Spawn, tmp_path: Path, whose: str
) -> None:
    people = {
        "root": 0,
        "www-data": 33,
        "nobody": 65534,
        "a person": 214100,
        "nobody known": 214101,
    }
    uid = people[whose]
    if whose == "a person":
        command.run(["useradd", "--uid", "214100", "--shell", "/bin/sh", "person"], timeout_s=10)
    lease = claims.draw(POOL, instance="vm", generation="g1")
    record = tmp_path / "run" / str(lease.uid)
    damaged = record.read_bytes().replace(f'"uid":{lease.uid}'.encode(), f'"uid":{uid}'.encode())
    record.with_name(str(uid)).write_bytes(damaged)
    child = spawn(uid)
    try:
        outcome = claims.release(LeaseKey(uid, "vm", "g1"))
        assert isinstance(outcome, Quarantined)
        assert f"refused to end all processes of uid {uid}" in outcome.reason
        os.kill(child.pid, 0)
    finally:
        if whose == "a person":
            child.close()
            command.run(["userdel", "person"], timeout_s=10)


def rival(directory: Path, name: str, seconds: float, results: Any) -> None:
    """Draw and release for a while, holding each uid by a real process."""
    claims = claims_at(directory, f"/{name}")
    collisions, number = 0, 0
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        number += 1
        lease = claims.draw(POOL, instance=name, generation=str(number), reuse_delay_s=0)
        mark = directory / f"held-{lease.uid}"
        try:
            os.close(os.open(mark, os.O_CREAT | os.O_EXCL))
        except FileExistsError:
            collisions += 1
        mark.unlink(missing_ok=True)
        if number % 4 == 0:
            hold_by_a_process(lease.uid)
        claims.release(lease.key)
        claims.release(lease.key)
    results.put((collisions, number))


def hold_by_a_process(uid: int) -> None:
    reader, writer = os.pipe()
    if os.fork() == 0:
        os.setresuid(uid, uid, uid)
        os.write(writer, b"!")
        signal.pause()
    os.close(writer)
    os.read(reader, 1)
    os.close(reader)


def test_rival_processes_with_real_cleaning_never_share_a_uid(tmp_path: Path) -> None:
    context = multiprocessing.get_context("fork")
    results = context.Queue()
    rivals = [
        context.Process(target=rival, args=(tmp_path, f"r{number}", 3.0, results))
        for number in range(8)
    ]
    for process in rivals:
        process.start()
    told = [results.get(timeout=30) for _ in rivals]
    for process in rivals:
        process.join(30)
    assert [collisions for collisions, _ in told] == [0] * 8
    assert all(draws > 0 for _, draws in told)
    assert claims_at(tmp_path, "/").states() == ()


def doomed(directory: Path, name: str) -> None:
    claims = claims_at(directory, f"/{name}")
    for number in range(10_000):
        lease = claims.draw(POOL, instance=name, generation=str(number), reuse_delay_s=0)
        claims.release(lease.key)


def test_processes_that_are_killed_lose_no_uid(tmp_path: Path) -> None:
    context = multiprocessing.get_context("fork")
    claims = claims_at(tmp_path, "/")
    chance = random.Random(7)
    for round_number in range(12):
        rivals = [
            context.Process(target=doomed, args=(tmp_path, f"r{round_number}.{number}"))
            for number in range(3)
        ]
        for process in rivals:
            process.start()
        time.sleep(0.05 + chance.random() * 0.1)
        for process in rivals:
            process.kill()
            process.join(10)
        for lease in claims.leases():
            assert not is_alive(lease.launcher)
            assert (
                claims.release(LeaseKey(lease.uid, lease.instance, lease.generation)) == Released()
            )
        assert claims.unreadable() == ()
    drawn = [claims.draw(POOL, instance="all", generation=str(one)).uid for one in POOL]
    assert sorted(drawn) == list(POOL)
    everything = {path.name for path in (tmp_path / "run").iterdir()}
    assert everything == {str(uid) for uid in POOL} | {".locks"}


@contextlib.contextmanager
def full_filesystem(directory: Path, inodes: int) -> Iterator[None]:
    directory.mkdir()
    mount("full", str(directory), "tmpfs", 0, f"nr_inodes={inodes},mode=700")
    try:
        yield
    finally:
        umount(str(directory))


@pytest.mark.parametrize("inodes", range(4, 12))
def test_a_full_filesystem_for_leases_leaves_nothing_behind(tmp_path: Path, inodes: int) -> None:
    run = tmp_path / "run"
    with full_filesystem(run, inodes):
        claims = WaitingClaims(run / "uids", tmp_path / "lib", root="/")
        drawn = set()
        with pytest.raises(RecordNotWritten, match="No space left") as caught:
            for number in range(10):
                drawn.add(claims.draw(POOL, instance="vm", generation=str(number)).uid)
        assert "free some space" in (caught.value.hint or "")
        assert {lease.uid for lease in claims.leases()} == drawn
        assert claims.unreadable() == ()
        assert not list(run.rglob(".2*"))


def test_a_full_filesystem_for_rests_keeps_the_lease_until_there_is_room(tmp_path: Path) -> None:
    lib = tmp_path / "lib"
    with full_filesystem(lib, 6):
        claims = WaitingClaims(tmp_path / "run", lib / "uids", root="/")
        lease = claims.draw(POOL, instance="vm", generation="g1")
        fillers = []
        with contextlib.suppress(OSError):
            for number in range(10):
                (lib / str(number)).touch()
                fillers.append(lib / str(number))
        with pytest.raises(RecordNotWritten, match="No space left"):
            claims.release(lease.key)
        assert claims.leases() == (lease,)
        for filler in fillers:
            filler.unlink()
        assert claims.release(lease.key) == Released()
        assert [one.uid for one in claims.states()] == [lease.uid]
