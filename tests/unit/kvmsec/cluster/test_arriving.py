"""A join, both sides of it, with real keys: only who knows the token gets in, and only once."""

import asyncio
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any
from uuid import UUID, uuid4

import msgspec
import pytest
from attrs import define, evolve

from kvmsec.cluster import operations
from kvmsec.cluster.authority import KeyFilesAuthority, KeyFilesFounding, PkiInvitations
from kvmsec.cluster.handing import state_of
from kvmsec.cluster.members.arriving import Arrival, accept_token, standing_invitation
from kvmsec.cluster.members.greeting import Greeter
from kvmsec.cluster.members.inviting import invite_node
from kvmsec.cluster.members.joining import add
from kvmsec.cluster.members.master import Master
from kvmsec.errors import MemberRefused, UnknownMember
from kvmsec.model.cluster import FORMAT, Member, document_of
from kvmsec.pki.certificates import fingerprint_of
from kvmsec.pki.errors import BadToken, NoInvitation
from kvmsec.pki.files import KeyFiles
from kvmsec.pki.invitations import Invitations
from kvmsec.pki.join_certificates import make_joining_pair
from kvmsec.pki.joining import Invitation, format_token
from kvmsec.rpc.messages import AdmitRequest, JoinAnswer, JoinRequest, NodeInfo
from kvmsec.store.file import FileStore
from tests.unit.kvmsec.fake_node import FakeNode


@define
class Place:
    """One node's files."""

    directory: Path

    def __attrs_post_init__(self) -> None:
        self.directory.mkdir()

    @property
    def store(self) -> FileStore:
        return FileStore(self.directory / "cluster.json")

    @property
    def files(self) -> KeyFiles:
        return KeyFiles(self.directory)

    @property
    def invitations(self) -> Invitations:
        return Invitations(self.directory / "invitations.json")


@define
class Door:
    """Both sides' temporary certificates, and the new node behind them."""

    arrival: Arrival
    own: str
    tamper: Any = None

    async def fingerprints(self) -> tuple[str, str]:
        return self.own, self.arrival.own_fingerprint

    async def hello(self, request: JoinRequest) -> JoinAnswer:
        return self.arrival.hello(self.changed(request), self.own)

    async def admit(self, request: AdmitRequest) -> NodeInfo:
        self.arrival.admit(self.changed(request), self.own)
        return await FakeNode(self.arrival.store, "node2").info()

    def changed(self, request: Any) -> Any:
        return request if self.tamper is None else self.tamper(request)


@define
class World:
    """A master, a new node, and the way between them."""

    master: Place
    new: Place
    here: FakeNode
    tamper: Any = None

    def invite(self, name: str = "node2", **more: Any) -> str:
        return format_token(
            invite_node(self.master.store, self.master.files, self.master.invitations, name, **more)
        )

    def accept(self, token: str) -> None:
        accept_token(token, self.new.files, self.new.store, self.new.invitations)

    def node(self, member: Member) -> FakeNode:
        return FakeNode(self.new.store, member.name, is_remote=True)

    def joining(self, member: Member) -> Greeter:
        known = self.master.invitations.find(member.name, datetime.now(UTC))
        accepted = standing_invitation(self.new.invitations)
        assert accepted is not None
        return Greeter(self.door(accepted), known)

    def door(self, accepted: Invitation) -> Door:
        def fingerprint() -> str:
            return fingerprint_of(make_joining_pair(accepted.secret).certificate_pem)

        arrival = Arrival(
            accepted, fingerprint(), self.new.files, self.new.store, self.new.invitations
        )
        return Door(arrival, fingerprint(), self.tamper)

    def add(self) -> Any:
        master = Master(
            store=self.master.store,
            directory=self,
            authority=KeyFilesAuthority(self.master.files),
            invitations=PkiInvitations(self.master.invitations),
        )
        return asyncio.run(add(master, "192.0.2.2"))


@pytest.fixture
def world(tmp_path: Path) -> World:
    master = Place(tmp_path / "master")
    here = FakeNode(master.store, "node1")
    founding = KeyFilesFounding(master.files)
    asyncio.run(operations.init(master.store, here, "trial", founding=founding))
    return World(master, Place(tmp_path / "new"), here)


def test_a_founded_cluster_has_all_its_files_and_one_certificate(world: World) -> None:
    cluster, _ = world.master.store.load()
    assert cluster is not None
    own = fingerprint_of(world.master.files.own().certificate_pem)

    assert cluster.master_member.certificates == (own,)
    assert world.master.files.candidates() == cluster.orderers
    assert world.master.files.cluster().certificate_pem in world.master.files.anchors()
    for name in ("server.pem", "server.key", "client.pem"):
        assert (world.master.directory / name).stat().st_mode & 0o777 == 0o600


def test_an_init_that_fails_leaves_no_key(world: World) -> None:
    world.here.refuse_rules = True
    with pytest.raises(Exception, match="no packet filter"):
        asyncio.run(
            operations.init(
                world.new.store,
                evolve(world.here, store=world.new.store),
                "other",
                founding=KeyFilesFounding(world.new.files),
            )
        )
    assert {path.name for path in world.new.directory.iterdir()} <= {"cluster.lock"}


def test_a_node_with_the_token_becomes_a_member(world: World) -> None:
    world.accept(world.invite())
    member = world.add().member

    cluster, revision = world.master.store.load()
    assert cluster is not None
    assert world.new.store.load() == (cluster, revision)
    assert member.certificates == (fingerprint_of(world.new.files.own().certificate_pem),)
    assert world.new.files.anchors() == world.master.files.anchors()
    assert world.new.files.candidates() == cluster.orderers
    assert not world.new.files.holds_cluster_key()
    assert standing_invitation(world.new.invitations) is None
    with pytest.raises(NoInvitation):
        world.master.invitations.find("node2", datetime.now(UTC))


def test_a_token_is_good_once(world: World) -> None:
    token = world.invite()
    world.accept(token)
    member = world.add().member
    assert world.add().member == member  # It has joined: only the others are told again.
    with pytest.raises(MemberRefused, match="belongs to the cluster trial"):
        world.accept(token)
    world.new.store.leave()
    with pytest.raises(MemberRefused, match="node2 is a member already"):
        world.add()


def test_an_invitation_that_is_over_is_no_good(world: World) -> None:
    invitation = invite_node(
        world.master.store, world.master.files, world.master.invitations, "node2"
    )
    over = evolve(invitation, expires_at=datetime.now(UTC) - timedelta(seconds=1))
    with pytest.raises(BadToken, match="over"):
        world.accept(format_token(over))


def test_whoever_has_another_token_is_refused_on_either_side(world: World) -> None:
    world.accept(world.invite())
    world.invite()  # takes the place of the one that the node has

    with pytest.raises(BadToken, match="not the one"):
        world.add()
    assert world.new.store.load() == (None, 0)


@pytest.mark.parametrize(
    ("kind", "change"),
    [
        (JoinRequest, {"node_uuid": uuid4()}),
        (JoinRequest, {"node_name": "node3"}),
        (JoinRequest, {"proof": "0" * 64}),
        (AdmitRequest, {"proof": "0" * 64}),
        (AdmitRequest, {"certificate": "another"}),
        (AdmitRequest, {"anchors": "another"}),
    ],
)
def test_what_is_changed_on_the_way_is_refused(
    world: World, kind: type, change: dict[str, Any]
) -> None:
    world.accept(world.invite())
    world.tamper = lambda request: (
        msgspec.structs.replace(request, **change) if isinstance(request, kind) else request
    )

    with pytest.raises(BadToken):
        world.add()
    assert world.new.store.load() == (None, 0)
    assert not world.new.files.is_member()
    cluster, _ = world.master.store.load()
    assert cluster is not None and len(cluster.nodes) == 1


def test_who_does_not_say_hello_first_is_not_admitted(world: World) -> None:
    world.accept(world.invite())
    cluster, revision = world.master.store.load()
    assert cluster is not None
    greeter = world.joining(Member("node2", uuid=UUID(int=2), address="x"))
    with pytest.raises(MemberRefused, match="hello"):
        asyncio.run(greeter.admit(world.master.files.anchors(), "x", state_of(cluster, revision)))


def test_the_token_alone_brings_a_node_into_no_other_cluster(world: World, tmp_path: Path) -> None:
    # Who has read the token over a shoulder knows the cluster's certificate, and has not its key.
    world.accept(world.invite())
    theirs = Place(tmp_path / "theirs")
    here = FakeNode(theirs.store, "node1")
    founding = KeyFilesFounding(theirs.files)
    asyncio.run(operations.init(theirs.store, here, "trial", founding=founding))
    cluster, revision = theirs.store.load()
    assert cluster is not None
    member = Member("node2", uuid=uuid4(), address="x")
    state = state_of(evolve(cluster, nodes=(*cluster.nodes, member)), revision)
    greeter = world.joining(member)
    request = asyncio.run(greeter.hello(member.name, member.uuid))
    signed = KeyFilesAuthority(theirs.files).sign(request, member)
    both = world.master.files.anchors() + theirs.files.anchors()

    with pytest.raises(BadToken, match="another certificate"):
        asyncio.run(greeter.admit(both, signed.certificate, state))
    assert world.new.store.load() == (None, 0)
    assert not world.new.files.is_member()


def test_an_admission_killed_halfway_is_taken_again(world: World) -> None:
    world.accept(world.invite())
    cluster, revision = world.master.store.load()
    assert cluster is not None
    uuid = uuid4()
    world.new.store.introduce(uuid)
    half = evolve(cluster, nodes=(*cluster.nodes, Member("node2", uuid=uuid, address="x")))
    world.new.store.put_copy(document_of(half), FORMAT, revision, at=datetime.now(UTC))

    world.add()
    assert world.new.files.is_member()
    assert world.new.store.load() == world.master.store.load()


def test_a_member_is_invited_again_only_when_that_is_meant(world: World) -> None:
    world.accept(world.invite())
    world.add()
    with pytest.raises(MemberRefused, match="already"):
        world.invite()
    with pytest.raises(UnknownMember):
        world.invite("node3", is_member_again=True)
    assert world.invite(is_member_again=True).startswith("kvmsec-join-1-")
