"""What a node's answer, silence or distrust over the wire means for a renewal."""

import asyncio
from pathlib import Path
from typing import Any

import pytest

from kvmsec.cluster.renewal.nodes import CertificateNode, NotReached, NotTrusted
from kvmsec.cluster.renewal.reached import NoRequest, OwnNode, RemoteNode
from kvmsec.linux.errors import Fault
from kvmsec.pki.keys import KeyKind
from kvmsec.rpc import messages as m
from kvmsec.rpc.errors import CallTimedOut, Refused, RemoteFault, Unreachable
from tests.unit.kvmsec.cluster.renewal_world import make_world


def are_certificate_nodes(remote: RemoteNode, own: OwnNode) -> tuple[CertificateNode, ...]:
    return remote, own


class Saying:
    """A node whose every call ends the same way."""

    def __init__(self, outcome: Any) -> None:
        self.outcome, self.requests = outcome, []  # type: ignore[var-annotated]

    def __getattr__(self, name: str) -> Any:
        async def call(*arguments: Any) -> Any:
            self.requests.append((name, *arguments))
            if isinstance(self.outcome, BaseException):
                raise self.outcome
            return self.outcome

        return call


def remote(tmp_path: Path, node: Saying) -> RemoteNode:
    return RemoteNode(make_world(tmp_path)["n1"].member, lambda member, way: node)


@pytest.mark.parametrize(
    ("said", "meant"),
    [
        (Unreachable("n1", "no route"), NotReached),
        (CallTimedOut("n1", "not within 10 s"), NotReached),
        (TimeoutError(), NotReached),
        (Refused("n1", "not on the list"), NotTrusted),
        (RemoteFault("n1", "its certificate", kind="PeerRefused"), NotTrusted),
        (RemoteFault("n1", "disk full", kind="KeyFileRefused"), RemoteFault),
    ],
)
def test_silence_and_distrust_are_told_from_a_refusal(
    tmp_path: Path, said: BaseException, meant: type[Fault]
) -> None:
    with pytest.raises(meant):
        asyncio.run(remote(tmp_path, Saying(said)).rollback())


def test_a_node_is_asked_for_the_kind_of_key_that_was_wished(tmp_path: Path) -> None:
    node = Saying(m.Prepared(signing_request="request"))
    made = asyncio.run(remote(tmp_path, node).prepare("anchors", kind=KeyKind.P256))
    assert made == "request"
    assert node.requests == [("prepare", m.PrepareRequest(anchors="anchors", key_kind="p256"))]


def test_a_node_that_sends_no_request_is_named(tmp_path: Path) -> None:
    node = Saying(m.Prepared(signing_request=None))
    with pytest.raises(NoRequest, match="n1"):
        asyncio.run(remote(tmp_path, node).prepare("anchors", kind=KeyKind.ED25519))


def test_this_node_s_daemon_is_told_of_each_change(tmp_path: Path) -> None:
    world = make_world(tmp_path)
    told = []

    async def after_change() -> None:
        told.append(world["n0"].shown)

    node = OwnNode(world["n0"].member, world["n0"].keys, after_change)
    anchors = world["n0"].keys.anchors()

    async def renew() -> None:
        await node.prepare(anchors, kind=KeyKind.P256)
        await node.rollback()
        await node.put_state(world.state, 2)
        await node.put_file("certless.pem", None)
        await node.finish(anchors)

    asyncio.run(renew())
    assert told == [world["n0"].shown] * 5
    assert asyncio.run(node.presented_certificate()) == world["n0"].shown
