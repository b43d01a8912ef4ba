"""A node that is told to leave: it does so wholly, and says so before its front goes with it."""

import asyncio
import os
import signal
import socket
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from kvmsec.rpc import messages as m
from kvmsec.rpc.client import HttpsTransport
from kvmsec.rpc.errors import Unreachable
from tests.root.daemon.cluster_of_two import DEADLINE_S, ClusterOfTwo, Daemon, ends
from tests.root.daemon.node_by_command import Node

pytestmark = pytest.mark.root

# Longer than the time between two looks, of which one finds no member here and ends the front.
SLOW = """
import asyncio, runpy, sys, time
from kvmsec.node.local import LocalNode

forget = LocalNode.forget_resting

async def slowly(node):
    {pause}(3)
    await forget(node)

LocalNode.forget_resting = slowly
del sys.argv[0]
runpy.run_path(sys.argv[0], run_name="__main__")
"""
IN_PLACE, ASIDE = "time.sleep", "await asyncio.sleep"


@pytest.fixture
def slow(
    cluster: ClusterOfTwo, begin: Callable[..., Daemon], request: pytest.FixtureRequest
) -> Daemon:
    """A member's daemon that is long at forgetting the cluster, as with many rules."""
    cluster.join()
    program = SLOW.format(pause=request.param)
    where = f"127.0.0.1:{cluster.port}"
    daemon = begin("--bind", where, through=(sys.executable, "-c", program))
    daemon.says("serving other nodes")
    return daemon


@pytest.mark.parametrize("slow", [IN_PLACE, ASIDE], indirect=True)
def test_a_leave_that_takes_long_is_answered(cluster: ClusterOfTwo, slow: Daemon) -> None:
    front = slow.front
    assert cluster.ask("node.leave", m.Nothing()) == m.Nothing()
    assert left(cluster) == []
    assert ends(front)
    with pytest.raises(ConnectionRefusedError):
        socket.create_connection(("127.0.0.1", cluster.port)).close()


@pytest.mark.parametrize("slow", [ASIDE], indirect=True)
def test_a_leave_goes_on_to_its_end_though_its_front_is_gone(
    cluster: ClusterOfTwo, slow: Daemon
) -> None:
    async def kill_the_front_meanwhile(transport: HttpsTransport) -> None:
        leaving = asyncio.create_task(transport.call("node.leave", m.Nothing()))
        while cluster.paths.cluster.exists():
            await asyncio.sleep(0.01)
        os.kill(slow.front, signal.SIGKILL)
        with pytest.raises(Unreachable):
            await leaving

    cluster.call(kill_the_front_meanwhile, cluster.other)
    assert left(cluster) != []

    deadline = time.monotonic() + DEADLINE_S
    while left(cluster) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert left(cluster) == []
    slow.says("the front was ended by signal 9")


def test_a_sound_member_leaves_by_force_alone(
    master: Node, bring_in: Callable[[str], Node]
) -> None:
    other = bring_in("node2")
    refused = other.run("node", "leave", "--yes")
    assert refused.returncode == 1
    assert "hint: run `kvmsec node remove node2` on the master" in refused.stderr
    assert other.has("client.pem") and other.has("cluster.json")
    assert master.codes() == set()
    assert master.run("node", "leave", "--yes").returncode == 1

    other.do("node", "leave", "--yes", "--force")
    assert not other.has("client.pem") and not other.has("cluster.json")


def test_a_node_that_was_taken_out_while_it_was_down_leaves_without_force(
    master: Node, bring_in: Callable[[str], Node]
) -> None:
    other = bring_in("node2")
    assert other.daemon is not None
    other.daemon.end()
    master.do("node", "remove", "node2", "--force")

    other.do("node", "leave", "--yes")
    assert not other.has("client.pem") and not other.has("cluster.json")


@pytest.mark.parametrize("name", ["client.pem", "server.pem"])
def test_a_member_that_lost_a_file_leaves_without_force(
    master: Node, bring_in: Callable[[str], Node], name: str
) -> None:
    other = bring_in("node2")
    (Path(other.root) / "var/lib/kvmsec" / name).unlink()

    other.do("node", "leave", "--yes")
    assert not other.has("cluster.json")


def left(cluster: ClusterOfTwo) -> list[str]:
    """What a member has and this node still does."""
    names = ("client.pem", "server.pem", "ssconf_master_candidates_certs", "cluster.json")
    return [name for name in names if Path(cluster.paths.key_files, name).exists()]
