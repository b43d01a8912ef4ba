"""Calls to a real daemon by way of a real courier: answers, refusals, and what it can't do."""

import asyncio
import os
import pwd
import signal
from collections.abc import Awaitable, Callable
from datetime import UTC, datetime, timedelta
from typing import Any
from uuid import uuid4

import pytest
from attrs import evolve

from kvmsec.cluster.members.arriving import accept_token
from kvmsec.cluster.members.greeting import Greeter
from kvmsec.config import Config
from kvmsec.daemon.confined_child import Start
from kvmsec.daemon.courier import Courier
from kvmsec.daemon.front_messages import TrustMessage
from kvmsec.daemon.inspection import find_gaps
from kvmsec.daemon.ways import Ways
from kvmsec.linux.credentials import Credentials
from kvmsec.pki.certificates import fingerprint_of, sign_request
from kvmsec.pki.contexts import server_context
from kvmsec.pki.invitations import Invitations
from kvmsec.pki.join_certificates import join_anchor, make_joining_pair
from kvmsec.pki.joining import Invitation, format_token, invite
from kvmsec.rpc import messages as m
from kvmsec.rpc.errors import Refused, RemoteFault, Unreachable
from kvmsec.rpc.remote import RemoteHousehold
from tests.root.daemon.cluster_of_two import ClusterOfTwo, Daemon, Ours, ends

pytestmark = pytest.mark.root


def credentials() -> Credentials:
    account = pwd.getpwnam("kvmsec-front")
    return Credentials(account.pw_uid, account.pw_gid)


def start(cluster: ClusterOfTwo) -> Start:
    return Start(
        name="kvmsec-courier",
        program="kvmsec.daemon.courier_life",
        credentials=credentials(),
        mount_point=str(cluster.root),
        cache=None,
        filter_may_be_missing=False,
    )


def message(cluster: ClusterOfTwo, ours: Ours) -> TrustMessage:
    return TrustMessage(
        pair=ours.pair.pem,
        anchors=cluster.anchor.certificate_pem,
        members={node.uuid: node.name for node in cluster.cluster().nodes},
        candidates={uuid: tuple(known) for uuid, known in cluster.cluster().orderers.items()},
    )


def by_courier(
    cluster: ClusterOfTwo,
    work: Callable[[Courier], Awaitable[Any]],
    told: TrustMessage | None = None,
) -> Any:
    async def whole() -> Any:
        async with asyncio.timeout(60):
            async with Courier(start(cluster), told or message(cluster, cluster.other)) as courier:
                return await work(courier)

    return asyncio.run(whole())


def way(cluster: ClusterOfTwo, **changes: Any) -> dict[str, Any]:
    to = {"name": "here", "uuid": cluster.here.member.uuid}
    return {**to, "address": "127.0.0.1", "port": cluster.port, **changes}


def test_a_call_goes_there_and_its_answer_comes_back(cluster: ClusterOfTwo, daemon: Daemon) -> None:
    async def ask(courier: Courier) -> Any:
        transport = courier.transport(**way(cluster))
        answers = [transport.call("node.info", m.Nothing()) for _ in range(300)]
        return {answer.name for answer in await asyncio.gather(*answers)}  # type: ignore[attr-defined]

    assert by_courier(cluster, ask) == {"here"}


def test_what_the_node_refuses_comes_back_with_its_name(
    cluster: ClusterOfTwo, daemon: Daemon
) -> None:
    async def ask(courier: Courier) -> RemoteFault:
        with pytest.raises(RemoteFault) as raised:
            await courier.transport(**way(cluster)).call(
                "instance.info", m.InstanceRequest(name="nobody")
            )
        return raised.value

    fault = by_courier(cluster, ask)
    assert fault.kind == "UnknownInstance"
    assert fault.message.startswith("here: ")


def test_another_node_than_was_meant_is_refused(cluster: ClusterOfTwo, daemon: Daemon) -> None:
    async def ask(courier: Courier) -> None:
        plain = {"name": "plain", "uuid": cluster.plain.member.uuid}
        with pytest.raises(Refused):
            await courier.transport(**way(cluster, **plain)).call("node.info", m.Nothing())

    by_courier(cluster, ask)


def test_a_node_that_is_not_there_is_unreachable(cluster: ClusterOfTwo, front_user: str) -> None:
    async def ask(courier: Courier) -> None:
        with pytest.raises(Unreachable, match="here"):
            await courier.transport(**way(cluster)).call("node.info", m.Nothing())
        with pytest.raises(Unreachable, match="no number"):
            unknown = way(cluster, address="nowhere.invalid")
            await courier.transport(**unknown).call("node.info", m.Nothing())

    by_courier(cluster, ask)


def test_a_name_of_the_hosts_file_is_looked_up(cluster: ClusterOfTwo, daemon: Daemon) -> None:
    async def ask(courier: Courier) -> Any:
        return await courier.transport(**way(cluster, address="localhost")).call(
            "node.info", m.Nothing()
        )

    assert by_courier(cluster, ask).name == "here"


def test_it_is_confined_and_ends_with_its_context(cluster: ClusterOfTwo, front_user: str) -> None:
    async def look(courier: Courier) -> int:
        assert courier.pid is not None
        assert list(find_gaps(courier.pid, credentials(), has_filter=True)) == []
        return courier.pid

    assert ends(by_courier(cluster, look))


def test_a_courier_that_dies_fails_the_calls_under_way(
    cluster: ClusterOfTwo, daemon: Daemon
) -> None:
    async def ask(courier: Courier) -> None:
        assert courier.pid is not None
        waiting = asyncio.create_task(
            courier.transport(**way(cluster)).call("instance.events", m.EventsRequest(timeout_s=20))
        )
        await asyncio.sleep(0.1)
        os.kill(courier.pid, signal.SIGKILL)
        with pytest.raises(Unreachable):
            await waiting

    by_courier(cluster, ask)


# Joining ---------------------------------------------------------------------------------------


class Doorway:
    """The master's way to a node that joins (`kvmsec.cluster.members.greeting.Doorway`)."""

    def __init__(self, courier: Courier, cluster: ClusterOfTwo, own: str) -> None:
        self._courier = courier
        self._way = way(cluster, uuid=uuid4())
        self._household = RemoteHousehold(courier.transport(**self._way))
        self._own = own
        self.hello = self._household.hello
        self.admit = self._household.admit

    async def fingerprints(self) -> tuple[str, str]:
        return self._own, await self._courier.peer_fingerprint(**self._way)


def invited(cluster: ClusterOfTwo) -> Invitation:
    now = datetime.now(UTC)
    anchor = fingerprint_of(cluster.anchor.certificate_pem)
    return invite("here", anchor, now=now, lifetime=timedelta(hours=1))


def take_token(cluster: ClusterOfTwo, invitation: Invitation) -> None:
    """What `kvmsec node join` does."""
    invitations = Invitations(cluster.paths.invitations)
    accept_token(format_token(invitation), cluster.files, cluster.store, invitations)


def join(cluster: ClusterOfTwo, invitation: Invitation) -> Any:
    """What `kvmsec node add` does on the master."""
    pair = make_joining_pair(invitation.secret)
    told = TrustMessage(
        pair=pair.pem,
        anchors=join_anchor(invitation.secret),
        members={},
        candidates={},
        is_joining=True,
    )

    async def whole(courier: Courier) -> Any:
        doorway = Doorway(courier, cluster, fingerprint_of(pair.certificate_pem))
        greeter = Greeter(doorway, invitation)
        uuid = cluster.here.member.uuid
        request = await greeter.hello("here", uuid)
        certificate = sign_request(
            cluster.anchor, request, node_name="here", node_uuid=uuid, now=datetime.now(UTC)
        )
        signed = evolve(cluster.here.member, certificates=(fingerprint_of(certificate),))
        cluster.here = evolve(cluster.here, member=signed)
        state = cluster.state(cluster.cluster(), 1)
        return await greeter.admit(cluster.anchor.certificate_pem, certificate, state)

    return by_courier(cluster, whole, told)


def test_a_node_joins_by_its_token_and_serves_from_then_on(
    cluster: ClusterOfTwo, begin: Callable[..., Daemon]
) -> None:
    invitation = invited(cluster)
    take_token(cluster, invitation)
    daemon = begin("--bind", f"127.0.0.1:{cluster.port}")
    daemon.says("waiting to be admitted")

    info = join(cluster, invitation)

    assert (info.name, info.cluster_uuid) == ("here", cluster.uuid)
    assert cluster.ask("node.info", m.Nothing()).revision == 1
    with pytest.raises(RemoteFault):
        join(cluster, invitation)


def test_another_token_opens_nothing(cluster: ClusterOfTwo, begin: Callable[..., Daemon]) -> None:
    take_token(cluster, invited(cluster))
    daemon = begin("--bind", f"127.0.0.1:{cluster.port}")
    daemon.says("waiting to be admitted")
    with pytest.raises(RemoteFault):
        join(cluster, invited(cluster))
    assert not cluster.files.is_member()


def test_before_it_is_a_member_a_node_takes_no_order(
    cluster: ClusterOfTwo, begin: Callable[..., Daemon]
) -> None:
    invitation = invited(cluster)
    take_token(cluster, invitation)
    begin("--bind", f"127.0.0.1:{cluster.port}").says("waiting to be admitted")
    pair = make_joining_pair(invitation.secret)
    told = TrustMessage(
        pair=pair.pem,
        anchors=join_anchor(invitation.secret),
        members={},
        candidates={},
        is_joining=True,
    )

    async def order(courier: Courier) -> None:
        with pytest.raises(Refused):
            await courier.transport(**way(cluster)).call("rules.apply", m.Nothing())

    by_courier(cluster, order, told)


def peer_of_a_join(cluster: ClusterOfTwo, secret: bytes, open_late: Callable[..., Any]) -> str:
    """The fingerprint that a node shows which listens only after `open_late`."""
    pair = make_joining_pair(secret)
    anchors = join_anchor(secret)
    told = TrustMessage(pair=pair.pem, anchors=anchors, members={}, candidates={}, is_joining=True)

    async def ask(courier: Courier) -> str:
        asking = asyncio.create_task(courier.peer_fingerprint(**way(cluster)))
        await open_late()
        return await asking

    return str(by_courier(cluster, ask, told))


def test_a_node_that_has_just_joined_may_listen_a_moment_later(
    cluster: ClusterOfTwo, front_user: str
) -> None:
    secret = os.urandom(16)
    shown = make_joining_pair(secret)

    async def listen() -> None:
        await asyncio.sleep(1.5)  # By then it was refused once at least.
        context = server_context(shown, join_anchor(secret))
        await asyncio.start_server(lambda *_: None, "127.0.0.1", cluster.port, ssl=context)

    assert peer_of_a_join(cluster, secret, listen) == fingerprint_of(shown.certificate_pem)


def test_a_node_that_does_not_listen_is_named_with_its_daemon(
    cluster: ClusterOfTwo, front_user: str
) -> None:
    async def never() -> None:
        return None

    with pytest.raises(Unreachable) as raised:
        peer_of_a_join(cluster, os.urandom(16), never)
    assert f"no daemon listens on 127.0.0.1 port {cluster.port}" in raised.value.message
    assert "kvmsec node serve" in (raised.value.hint or "")


def test_members_that_are_asked_at_once_have_one_courier(
    cluster: ClusterOfTwo, daemon: Daemon
) -> None:
    async def ask() -> set[int | None]:
        async with Ways(cluster.paths, Config, cluster.store, None) as ways:
            return {one.pid for one in await asyncio.gather(*(ways.courier() for _ in range(4)))}

    assert len(asyncio.run(ask())) == 1
