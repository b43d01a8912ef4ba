"""A lock that another process holds keeps one task waiting, and not the others of its loop."""

import asyncio
from collections.abc import Awaitable, Callable, Coroutine, Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Final, TypeVar
from uuid import UUID

import pytest

from kvmsec.linux import command
from kvmsec.model.cluster import Cluster, Member, Role
from kvmsec.node import leasing
from kvmsec.node.host import Host
from kvmsec.node.rules import Rules
from kvmsec.paths import Paths
from tests.cable import new_namespace
from tests.held_lock import held
from uidpool.claims import Claims, Lease, Released
from uidpool.ranges import EMPTY, UidRanges
from uidpool.steps import carry_out

pytestmark = [pytest.mark.root, pytest.mark.netfilter]

T = TypeVar("T")
HELD_S: Final = 0.5
UID: Final = 211150
HERE: Final = UUID(int=1)


def waited_for(path: Path, work: Callable[[], Awaitable[T]]) -> T:
    """What the work comes to that wants a lock, which only another task of its loop has freed."""

    async def act() -> T:
        with held(path) as holder:
            working = asyncio.ensure_future(work())
            await asyncio.sleep(HELD_S)
            assert not working.done(), "it didn't wait for the lock"
            holder.close()
            return await working

    return asyncio.run(act())


# --- the packet rules


@pytest.fixture
def host(tmp_path: Path) -> Iterator[Host]:
    """A node with a pool of one uid, in a network namespace of its own."""
    host = Host(Paths(tmp_path))
    host.prepare()
    cluster = Cluster(
        name="trial",
        uuid=UUID(int=2),
        uid_pool=UidRanges.of((UID, UID)),
        draining=EMPTY,
        security_model=None,
        nodes=(Member("here", uuid=HERE, address="::1", role=Role.CANDIDATE),),
        master=HERE,
        created_at=datetime(2026, 11, 21, tzinfo=UTC),
    )
    host.store.save(cluster, 0)
    with new_namespace():
        command.run(["ip", "link", "set", "lo", "up"], timeout_s=10)
        yield host


def _prove(rules: Rules) -> Awaitable[None]:
    return rules.prove(UID, UID)


@pytest.mark.parametrize("work", [_prove, Rules.apply, Rules.sync, Rules.settle, Rules.remove])
def test_the_loop_runs_on_while_another_process_has_the_rules(
    host: Host, work: Callable[[Rules], Awaitable[None]]
) -> None:
    waited_for(host.paths.run / "rules.lock", lambda: work(host.rules))
    is_there = host.rules.firewall.show()["backend"] is not None
    assert is_there == (work not in (Rules.settle, Rules.remove))


# --- the records of uids


@pytest.fixture
def claims(reaper_uid: int, tmp_path: Path) -> Claims:
    return Claims(tmp_path / "run", tmp_path / "lib", root="/")


def draw_from(claims: Claims, uid: int) -> Coroutine[None, None, Lease]:
    pool = UidRanges.of((uid, uid))
    return leasing.draw(claims, pool, instance="vm", generation="g1", reuse_delay_s=0)


def test_the_loop_runs_on_while_another_process_has_the_records(
    claims: Claims, uid: int, tmp_path: Path
) -> None:
    records = tmp_path / "run/.locks/records"
    carry_out(claims.forgetting_resting(), claims.take)  # It makes the directories.
    lease = waited_for(records, lambda: draw_from(claims, uid))
    assert waited_for(records, lambda: leasing.release(claims, lease.key)) == Released()
    assert claims.states() == ()


def test_a_draw_that_is_cancelled_while_it_waits_for_the_records_has_drawn_nothing(
    claims: Claims, uid: int, tmp_path: Path
) -> None:
    async def act() -> None:
        with held(tmp_path / "run/.locks/records"):
            drawing = asyncio.ensure_future(draw_from(claims, uid))
            await asyncio.sleep(0.1)
            drawing.cancel()
            with pytest.raises(asyncio.CancelledError):
                await drawing

    carry_out(claims.forgetting_resting(), claims.take)
    asyncio.run(act())
    assert claims.states() == ()
    assert asyncio.run(draw_from(claims, uid)).uid == uid
