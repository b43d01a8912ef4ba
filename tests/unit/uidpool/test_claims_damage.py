"""Records that are damaged, out of date, or that a full disk does not take."""

import errno
import os
import random
from array import array
from pathlib import Path

import msgspec
import pytest

from kvmsec.linux import files
from tests.unit.uidpool.node import POOL, Node, draw
from uidpool import ledger
from uidpool.claims import Quarantined, Released, State
from uidpool.errors import (
    PoolExhausted,
    RecordNotWritten,
    RecordUnreadable,
)
from uidpool.usage import Usage


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
    wrong.store(array("I"))  # in date, and says that all are free
    with pytest.raises(PoolExhausted, match="4 leased"):
        draw(claims)
    claims.release(leases[0].key)
    wrong.store(array("I", POOL))  # in date, and says that none is
    assert draw(claims).uid == leases[0].uid


@pytest.mark.parametrize("seed", range(20))
def test_nonsense_in_a_summary_that_is_in_date_keeps_nobody_from_drawing(
    node: Node, seed: int
) -> None:
    """No checksum stands in it: it would take longer than all else that is done with it."""
    claims = node.claims()
    held = {draw(claims).uid for _ in range(2)}
    some = random.Random(seed)
    near = [*POOL, min(POOL) - 1, max(POOL) + 1, 0, 2**32 - 1]
    body = array("I", some.choices(near, k=some.choice([1, 3, 8, 40])))
    ledger.LeaseIndex(node.leases / ".locks/index", node.leases).store(body)
    lease = draw(claims)
    assert lease.uid in POOL
    assert lease.uid not in held


def test_a_writer_that_is_killed_leaves_no_summary(node: Node) -> None:
    claims = node.claims()
    leases = [draw(claims) for _ in range(4)]
    index = node.leases / ".locks/index"
    header = ledger.LeaseIndex(index, node.leases)._header(array("I"))
    for content in (bytes(len(header)), bytes(len(header)) + index.read_bytes()[len(header) :]):
        index.write_bytes(content)
        assert ledger.LeaseIndex(index, node.leases).load() is None
        with pytest.raises(PoolExhausted, match="4 leased"):
            draw(claims)
    assert {one.uid for one in leases} == set(POOL)


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
