"""Which nodes may forget their cluster: those that it has let go, or that are broken."""

import asyncio
from typing import Any

import pytest

from kvmsec.cluster.members.leaving import require_released
from kvmsec.errors import MemberRefused
from kvmsec.linux.errors import Fault
from kvmsec.rpc.errors import Refused, Unreachable
from tests.unit.kvmsec.fake_node import FakeCluster, cluster

__all__ = ["cluster"]


class SoundFiles:
    """Key files that are as they should be."""

    def own(self) -> None: ...

    def anchors(self) -> None: ...


class LostFiles(SoundFiles):
    def own(self) -> None:
        raise Fault("client.pem is missing")


def ask_for_release(cluster: FakeCluster, here: str, files: Any = None) -> None:
    store = cluster.nodes[here].store
    asyncio.run(require_released(store, cluster, files or SoundFiles()))


def answer_with(cluster: FakeCluster, error: Exception) -> None:
    """Have the master answer everybody so."""

    def refuse(_: str) -> None:
        raise error

    cluster.nodes["node1"].before = refuse


@pytest.mark.parametrize("answer", [None, Refused("node1", "no", evidence={"step": "role"})])
def test_a_sound_member_that_the_master_has_is_not_released(
    cluster: FakeCluster, answer: Exception | None
) -> None:
    if answer is not None:
        answer_with(cluster, answer)
    with pytest.raises(MemberRefused, match="node3, a sound member") as caught:
        ask_for_release(cluster, "node3")
    assert "kvmsec node remove node3" in (caught.value.hint or "")
    assert "--force" in (caught.value.hint or "")


@pytest.mark.parametrize(
    "answer",
    [
        Refused("node1", "no such uuid", evidence={"step": "name"}),
        Refused("node1", "another certificate", evidence={"step": "fingerprint"}),
        Unreachable("node1", "no route"),
        OSError("no courier"),
    ],
)
def test_a_node_that_the_master_has_not_or_cant_be_asked_about_is_released(
    cluster: FakeCluster, answer: Exception
) -> None:
    answer_with(cluster, answer)
    ask_for_release(cluster, "node3")


def test_a_member_that_lost_its_files_is_released(cluster: FakeCluster) -> None:
    ask_for_release(cluster, "node3", LostFiles())
    ask_for_release(cluster, "node1", LostFiles())


def test_the_master_is_told_how_else_it_leaves(cluster: FakeCluster) -> None:
    with pytest.raises(MemberRefused) as caught:
        ask_for_release(cluster, "node1")
    assert "master-failover" in (caught.value.hint or "")
    assert "cluster destroy" in (caught.value.hint or "")


def test_a_node_without_a_cluster_is_released(cluster: FakeCluster) -> None:
    cluster.make("node9")
    ask_for_release(cluster, "node9")
