"""The master's upkeep: copies are confirmed, nodes that come back catch up, drained uids go."""

import asyncio
from collections.abc import Callable

import pytest

from kvmsec.cluster import upkeep
from kvmsec.cluster.upkeep import sync
from tests.unit.kvmsec.fake_node import FakeCluster, cluster, ranges

__all__ = ["cluster"]


def confirmed(cluster: FakeCluster, name: str) -> object:
    identity = cluster.nodes[name].store.identity()
    assert identity is not None
    return identity.confirmed_at


def keep_up(
    cluster: FakeCluster,
    monkeypatch: pytest.MonkeyPatch,
    *rounds: Callable[[], object],
) -> list[str]:
    """Run the upkeep, with one of `rounds` after each of its rounds; returns what it reported."""
    told: list[str] = []
    left = list(rounds)

    async def pause(_: float) -> None:
        if not left:
            raise asyncio.CancelledError
        left.pop(0)()

    monkeypatch.setattr(upkeep.asyncio, "sleep", pause)
    work = upkeep.upkeep(cluster.store, cluster, copy_valid_s=60, report=told.append)
    with pytest.raises(asyncio.CancelledError):
        asyncio.run(work)
    return told


def silence(cluster: FakeCluster, *names: str) -> None:
    for name, node in cluster.nodes.items():
        node.is_silent = name in names


def test_every_copy_is_confirmed_again(cluster: FakeCluster) -> None:
    before = [confirmed(cluster, name) for name in ("node2", "node3")]
    assert not asyncio.run(sync(cluster.store, cluster))

    after = [confirmed(cluster, name) for name in ("node2", "node3")]
    assert all(one != other for one, other in zip(before, after, strict=True))
    cluster.require_converged()


def test_a_node_that_comes_back_gets_the_state_and_is_told_of(
    cluster: FakeCluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    silence(cluster, "node3")
    cluster.modify(add=ranges("1020"), remove=ranges("1003"))

    told = keep_up(cluster, monkeypatch, lambda: None, lambda: silence(cluster))
    assert told == [
        "node3 is not up to date: node3 can't be reached",
        "node3 is up to date again",
    ]
    assert not cluster.require_converged().draining


def test_what_fails_here_is_told_and_tried_again(
    cluster: FakeCluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    cluster.here.refuse_rules = True
    told = keep_up(cluster, monkeypatch, lambda: None)
    assert told == ["the members could not be brought up to date: no packet filter"]


def test_an_answer_that_nobody_foresaw_does_not_end_the_masters_daemon(
    cluster: FakeCluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    def lie(_: str) -> None:
        raise ValueError("-5--5 is not a range of uids")

    cluster.nodes["node3"].before = lie
    told = keep_up(cluster, monkeypatch, lambda: None)
    assert (
        told
        == [
            "the members could not be brought up to date: unexpected ValueError: "
            "-5--5 is not a range of uids"
        ]
        * 2
    )


def test_a_node_that_is_not_the_master_hands_nothing_out(cluster: FakeCluster) -> None:
    cluster.here_name = "node2"
    calls: list[str] = []
    for node in cluster.nodes.values():
        node.before = calls.append

    assert not asyncio.run(sync(cluster.store, cluster))
    assert not calls
