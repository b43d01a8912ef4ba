"""Leases on disk: drawn, released, quarantined, and right again after a crash at any line."""

import errno
import multiprocessing
import os
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Any

import msgspec
import pytest

from kvmsec.linux import files
from kvmsec.linux.processes import boot_id, identify, myself
from uidpool import ledger
from uidpool.claims import Claims, Lease, LeaseKey, Quarantined, Released, State
from uidpool.errors import (
    ClaimsError,
    NoCleanUid,
    PoolExhausted,
    RecordNotWritten,
    RecordUnreadable,
    UidHeld,
)
from uidpool.ranges import UidRanges
from uidpool.usage import Usage

POOL = UidRanges.parse("210000-210003")


class Node:
    """A node's directories, with uids that are clean unless the test says otherwise."""

    def __init__(self, directory: Path) -> None:
        self.leases = directory / "run/uids"
        self.state = directory / "lib/uids"
        self.dirty: dict[int, Usage] = {}
        self.cleaned: list[int] = []

    def claims(self, root: str = "/") -> Claims:
        return Claims(self.leases, self.state, root=root, inspect=self.inspect, clean=self.clean)

    def inspect(self, uid: int) -> Usage:
        return self.dirty.get(uid, Usage(uid))

    def clean(self, uid: int) -> Usage:
        self.cleaned.append(uid)
        return self.inspect(uid)

    def files(self) -> list[str]:
        """Every record and every leftover, locks excepted."""
        found = [path for path in self.leases.rglob("*") if path.is_file()]
        found += [path for path in self.state.rglob("*") if path.is_file()]
        return sorted(path.name for path in found if path.parent.name != ".locks")


@pytest.fixture
def node(tmp_path: Path) -> Node:
    return Node(tmp_path)


def draw(claims: Claims, instance: str = "vm", pool: UidRanges = POOL, **more: Any) -> Lease:
    return claims.draw(pool, instance=instance, generation="g1", **more)


def resting(claims: Claims) -> list[int]:
    return [one.uid for one in claims.states() if one.state is State.RESTING]


def test_a_lease_says_who_holds_the_uid_and_who_drew_it(node: Node) -> None:
    lease = draw(node.claims("/srv/trial"))
    assert lease.uid in POOL
    assert (lease.instance, lease.generation, lease.root) == ("vm", "g1", "/srv/trial")
    assert lease.launcher == myself() == identify(os.getpid())
    assert lease.boot_id == boot_id()
    assert node.claims().leases() == (lease,)
    path = node.leases / str(lease.uid)
    assert path.stat().st_mode & 0o7777 == 0o600
    for directory in (node.leases, node.state, *node.state.iterdir()):
        assert directory.stat().st_mode & 0o7777 == 0o700


def test_no_uid_is_drawn_twice_and_an_exhausted_pool_says_so(node: Node) -> None:
    drawn = {draw(node.claims(root)).uid for root in ("/", "/", "/a", "/b")}
    assert drawn == set(POOL)
    with pytest.raises(PoolExhausted, match="4 leased"):
        draw(node.claims())


def test_a_leased_uid_that_leaves_the_pool_is_draining(node: Node) -> None:
    draw(node.claims())
    assert [one.state for one in node.claims().states(draining=POOL)] == [State.DRAINING]


def test_a_released_uid_rests_while_another_is_free(node: Node) -> None:
    claims = node.claims()
    pool = UidRanges.parse("210000-210001")
    first = draw(claims, pool=pool)
    assert claims.release(first.key) == Released()
    assert resting(claims) == [first.uid]
    second = draw(claims, pool=pool)
    assert second.uid != first.uid
    third = draw(claims, pool=pool)
    assert third.uid == first.uid
    assert resting(claims) == []


def test_a_rest_outlives_the_process_and_ends(node: Node) -> None:
    lease = draw(node.claims(), reuse_delay_s=0.05)
    node.claims().release(lease.key)
    (resting,) = node.claims().states()
    assert (resting.uid, resting.state) == (lease.uid, State.RESTING)
    time.sleep(0.06)
    assert node.claims().states() == ()
    draw(node.claims())
    assert len(node.files()) == 1


def test_without_a_delay_a_uid_does_not_rest(node: Node) -> None:
    lease = draw(node.claims(), reuse_delay_s=0)
    assert node.claims().release(lease.key) == Released()
    assert node.files() == []


def test_a_rest_that_begins_in_the_future_begins_now(node: Node) -> None:
    lease = draw(node.claims(), reuse_delay_s=60)
    node.claims().release(lease.key)
    (name,) = node.files()
    ahead = f"{lease.uid}.{int(time.time() * 1000) + 10**11}.60000"
    (node.state / "resting" / name).rename(node.state / "resting" / ahead)
    draw(node.claims())
    (state,) = [one for one in node.claims().states() if one.state is State.RESTING]
    assert state.until is not None
    assert abs(state.until.timestamp() - 60 - time.time()) < 10


def test_a_second_release_does_nothing(node: Node) -> None:
    claims = node.claims()
    lease = draw(claims)
    claims.release(lease.key)
    before = node.files()
    assert claims.release(lease.key) == Released()
    assert node.cleaned == [lease.uid]
    assert node.files() == before


def test_a_release_of_an_earlier_start_never_frees_or_cleans_the_next_holder(node: Node) -> None:
    claims, pool = node.claims(), UidRanges.parse("210000")
    first = claims.draw(pool, instance="vm", generation="g1", reuse_delay_s=0)
    claims.release(first.key)
    second = claims.draw(pool, instance="vm", generation="g2")
    node.cleaned.clear()
    assert claims.release(first.key) == Released()
    assert claims.release(LeaseKey(first.uid, "other", "g2")) == Released()
    assert claims.leases() == (second,)
    assert node.cleaned == []


def test_what_can_not_be_cleaned_is_quarantined_until_it_can(node: Node) -> None:
    claims = node.claims()
    lease = draw(claims)
    node.dirty[lease.uid] = Usage(lease.uid, files=("/tmp/x",), file_count=1)
    outcome = claims.release(lease.key)
    assert outcome == Quarantined("files '/tmp/x'")
    assert claims.release(lease.key) == outcome
    (state,) = claims.states()
    assert (state.uid, state.state, state.instance) == (lease.uid, State.QUARANTINED, "vm")
    assert state.reason == "files '/tmp/x'"
    assert claims.retry(lease.uid) == outcome
    assert lease.uid not in {draw(claims).uid for _ in range(3)}
    with pytest.raises(PoolExhausted, match="3 leased, 0 resting, 1 quarantined"):
        draw(claims)
    del node.dirty[lease.uid]
    assert claims.retry(lease.uid) == Released()
    assert draw(claims).uid == lease.uid


def test_a_drawn_uid_that_is_dirty_is_quarantined_and_another_drawn(node: Node) -> None:
    for uid in (210000, 210001, 210002):
        node.dirty[uid] = Usage(uid, keys=1)
    assert draw(node.claims()).uid == 210003
    assert {one.reason for one in node.claims().quarantined()} <= {"1 keys in the kernel"}


def test_a_pool_of_dirty_uids_names_each_reason(node: Node) -> None:
    for uid in POOL:
        node.dirty[uid] = Usage(uid, keys=uid)
    with pytest.raises(NoCleanUid) as caught:
        draw(node.claims())
    assert caught.value.reasons == {uid: f"{uid} keys in the kernel" for uid in POOL}
    assert len(node.claims().quarantined()) == 4
    assert node.claims().leases() == ()


def test_a_look_that_can_not_be_finished_does_not_use_the_pool_up(node: Node) -> None:
    for uid in POOL:
        node.dirty[uid] = Usage(uid, incomplete="no /proc")
    with pytest.raises(NoCleanUid, match="no /proc"):
        draw(node.claims())
    assert len(node.claims().quarantined()) == 1


def test_files_of_others_in_the_way_use_nothing_up(node: Node) -> None:
    for uid in POOL:
        node.dirty[uid] = Usage(uid, incomplete="too many files", is_crowded=True)
    with pytest.raises(NoCleanUid, match="too many files"):
        draw(node.claims())
    assert node.claims().states() == ()


def test_an_error_while_looking_gives_the_uid_back(node: Node) -> None:
    def fail(uid: int) -> Usage:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        draw(Claims(node.leases, node.state, root="/", inspect=fail))
    assert node.files() == []


@pytest.mark.parametrize(
    "content",
    [b"", b"{", b"[]", b"\xff", b"{}", b"x" * 100_000, b'{"uid": 1}'],
    ids=["empty", "cut", "list", "binary", "lacking", "huge", "partial"],
)
def test_an_unreadable_lease_counts_as_leased_and_is_told(node: Node, content: bytes) -> None:
    claims = node.claims()
    lease = draw(claims)
    (node.leases / str(lease.uid)).write_bytes(content)
    assert claims.leases() == ()
    (error,) = claims.unreadable()
    assert error.path.name == str(lease.uid)
    (state,) = claims.states()
    assert state.state is State.LEASED
    assert str(lease.uid) in (state.reason or "")
    with pytest.raises(RecordUnreadable):
        claims.release(lease.key)
    assert lease.uid not in {draw(claims).uid for _ in range(3)}
    with pytest.raises(PoolExhausted):
        draw(claims)


def test_an_unreadable_lease_is_freed_once_its_uid_is_clean_and_nothing_is_killed(
    node: Node,
) -> None:
    claims = node.claims()
    lease = draw(claims)
    (node.leases / str(lease.uid)).write_bytes(b"nonsense")
    node.dirty[lease.uid] = Usage(lease.uid, keys=1)
    outcome = claims.retry(lease.uid)
    assert isinstance(outcome, Quarantined)
    assert "it still has: 1 keys" in outcome.reason
    del node.dirty[lease.uid]
    assert claims.retry(lease.uid) == Released()
    assert node.cleaned == []
    assert node.files() == []


def test_the_record_of_another_uid_or_a_newer_release_is_unreadable(node: Node) -> None:
    claims = node.claims()
    lease = draw(claims)
    content = (node.leases / str(lease.uid)).read_bytes()
    (node.leases / "210099").write_bytes(content)
    newer = {**msgspec.json.decode(content), "uid": 210098, "version": 2}
    (node.leases / "210098").write_bytes(msgspec.json.encode(newer))
    said = {error.path.name: error.problem for error in claims.unreadable()}
    assert said == {
        "210098": "it was written by a newer kvmsec",
        "210099": f"it is the record of uid {lease.uid}",
    }


def test_an_unreadable_quarantine_is_still_one(node: Node) -> None:
    claims = node.claims()
    lease = draw(claims)
    node.dirty[lease.uid] = Usage(lease.uid, keys=1)
    claims.release(lease.key)
    (node.state / "quarantine" / str(lease.uid)).write_bytes(b"?")
    (record,) = claims.quarantined()
    assert record.uid == lease.uid
    assert lease.uid not in {draw(claims).uid for _ in range(3)}
    del node.dirty[lease.uid]
    assert claims.retry(lease.uid) == Released()


def test_retry_refuses_what_is_held_and_what_is_free(node: Node) -> None:
    claims = node.claims()
    lease = draw(claims)
    with pytest.raises(UidHeld, match="'vm'"):
        claims.retry(lease.uid)
    with pytest.raises(ClaimsError, match="not quarantined"):
        claims.retry(209999)
    assert node.cleaned == []


def test_rests_of_a_destroyed_cluster_are_forgotten_and_others_kept(node: Node) -> None:
    mine, theirs = node.claims("/mine"), node.claims("/theirs")
    for claims in (mine, theirs):
        lease = draw(claims)
        claims.release(lease.key)
    mine.forget_resting()
    assert resting(mine) == [lease.uid]


def test_unused_directories_are_removed_and_made_again(node: Node) -> None:
    claims = node.claims()
    lease = draw(claims, reuse_delay_s=0)
    assert not claims.remove_if_unused()
    claims.release(lease.key)
    assert claims.remove_if_unused()
    assert not node.leases.exists()
    assert not node.state.exists()
    draw(claims)


def test_nothing_is_there_before_the_first_draw(node: Node) -> None:
    claims = node.claims()
    assert claims.leases() == claims.states() == claims.quarantined() == ()
    assert claims.release(LeaseKey(210000, "vm", "g1")) == Released()


def full(*_: object, **__: object) -> None:
    raise OSError(errno.ENOSPC, "No space left on device")


def test_a_full_run_directory_draws_nothing(node: Node, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(files.os, "write", full)
    with pytest.raises(RecordNotWritten) as caught:
        draw(node.claims())
    assert "No space left" in caught.value.message
    assert "free some space" in (caught.value.hint or "")
    assert node.files() == []


def test_a_full_state_directory_keeps_the_lease(
    node: Node, monkeypatch: pytest.MonkeyPatch
) -> None:
    claims = node.claims()
    clean, dirty = draw(claims), draw(claims)
    node.dirty[dirty.uid] = Usage(dirty.uid, keys=1)
    monkeypatch.setattr(ledger, "write_atomically", full)
    for lease in (clean, dirty):
        with pytest.raises(RecordNotWritten):
            claims.release(lease.key)
    assert {lease.key for lease in claims.leases()} == {clean.key, dirty.key}
    monkeypatch.undo()
    assert claims.release(clean.key) == Released()
    assert isinstance(claims.release(dirty.key), Quarantined)


# --- the summary of the leases


def test_a_wrong_summary_costs_no_uid_and_frees_none(node: Node) -> None:
    claims = node.claims()
    leases = [draw(claims, reuse_delay_s=0) for _ in range(3)]
    index = node.leases / ".locks/index"
    stale = index.read_bytes()
    leases.append(draw(claims))
    for content in (stale, b"", b"nonsense", stale[:-1], os.urandom(len(stale))):
        index.write_bytes(content)
        with pytest.raises(PoolExhausted, match="4 leased"):
            draw(claims)
    wrong = ledger.LeaseIndex(index, node.leases)
    wrong.store([])  # in date, and says that all are free
    with pytest.raises(PoolExhausted, match="4 leased"):
        draw(claims)
    claims.release(leases[0].key)
    wrong.store(list(POOL))  # in date, and says that none is
    assert draw(claims).uid == leases[0].uid


def test_a_lease_that_was_removed_by_hand_is_noticed(node: Node) -> None:
    claims = node.claims()
    for _ in range(4):
        lease = draw(claims)
    (node.leases / str(lease.uid)).unlink()
    assert draw(claims).uid == lease.uid


def test_the_summary_is_used_while_it_is_in_date(
    node: Node, monkeypatch: pytest.MonkeyPatch
) -> None:
    claims = node.claims()
    draw(claims)
    listed: list[Path] = []
    original = ledger._names_in
    monkeypatch.setattr(ledger, "_names_in", lambda path: listed.append(path) or original(path))
    lease = draw(claims)
    claims.release(lease.key)
    draw(claims)
    assert node.leases not in listed


# --- crashes


def killed_at_line(number: int, function: Callable[[], object]) -> bool:
    """Run a function in a child that SIGKILLs itself at its n-th line of the records' code."""
    pid = os.fork()
    if pid == 0:
        left = number

        def on_line(frame: FrameType, event: str, _: object) -> Any:
            nonlocal left
            if "/uidpool/" not in frame.f_code.co_filename and (
                "/kvmsec/linux/files" not in frame.f_code.co_filename
            ):
                return None
            if event == "line":
                left -= 1
                if left == 0:
                    os.kill(os.getpid(), signal.SIGKILL)
            return on_line

        try:
            sys.settrace(on_line)
            function()
            sys.settrace(None)
        finally:
            os._exit(0)
    _, status = os.waitpid(pid, 0)
    return os.WIFSIGNALED(status)


def crash_at_every_line(
    node: Node, operation: Callable[[], object], check: Callable[[], None]
) -> int:
    number = 1
    while killed_at_line(number, operation):
        check()
        number += 1
    return number


def test_a_draw_killed_at_any_line_loses_no_uid(node: Node) -> None:
    claims, pool = node.claims(), UidRanges.parse("210000-210001")

    def check() -> None:
        for lease in claims.leases():
            claims.release(lease.key)
        everyone = [draw(claims, pool=pool, reuse_delay_s=0) for _ in range(2)]
        assert {lease.uid for lease in everyone} == set(pool)
        assert node.files() == ["210000", "210001"]
        for lease in everyone:
            claims.release(lease.key)

    lines = crash_at_every_line(node, lambda: draw(claims, pool=pool, reuse_delay_s=0), check)
    assert lines > 50


@pytest.mark.parametrize("ends", ["clean", "dirty"])
def test_a_release_killed_at_any_line_never_frees_an_unproved_uid(node: Node, ends: str) -> None:
    claims, pool = node.claims(), UidRanges.parse("210000")
    lease = draw(claims, pool=pool, reuse_delay_s=600)
    if ends == "dirty":
        node.dirty[210000] = Usage(210000, keys=1)

    def check() -> None:
        states = [one.state for one in claims.states()]
        assert states in ([State.LEASED], [State.RESTING], [State.QUARANTINED])
        outcome = claims.release(lease.key)
        assert outcome == (Released() if ends == "clean" else Quarantined("1 keys in the kernel"))
        assert not claims.leases()
        with claims._ledger.changing():
            pass  # Unfinished files are removed by whoever changes something next.
        assert len(node.files()) == 1
        claims._ledger.remove_quarantine(210000)
        node.dirty.clear()
        draw(claims, pool=pool, reuse_delay_s=600)
        if ends == "dirty":
            node.dirty[210000] = Usage(210000, keys=1)

    lines = crash_at_every_line(node, lambda: claims.release(lease.key), check)
    assert lines > 50


# --- rivals


def test_rival_processes_never_hold_the_same_uid(node: Node, tmp_path: Path) -> None:
    """Each marks the uid with a file of its own making while it holds it."""
    context = multiprocessing.get_context("fork")
    results = context.Queue()
    rivals = [
        context.Process(target=marking_rival, args=(tmp_path, f"r{number}", 40, results))
        for number in range(8)
    ]
    for process in rivals:
        process.start()
    for process in rivals:
        process.join(60)
    assert [process.exitcode for process in rivals] == [0] * 8
    assert [results.get(timeout=10) for _ in rivals] == [0] * 8
    assert node.claims().leases() == ()


def marking_rival(directory: Path, name: str, count: int, results: Any) -> None:
    claims = Node(directory).claims(f"/{name}")
    pool = UidRanges.parse("210000-210009")
    collisions = 0
    for number in range(count):
        lease = claims.draw(pool, instance=name, generation=str(number), reuse_delay_s=0)
        mark = directory / f"held-{lease.uid}"
        try:
            os.close(os.open(mark, os.O_CREAT | os.O_EXCL))
        except FileExistsError:
            collisions += 1
        os.sched_yield()
        mark.unlink(missing_ok=True)
        claims.release(lease.key)
        claims.release(lease.key)
    results.put(collisions)
