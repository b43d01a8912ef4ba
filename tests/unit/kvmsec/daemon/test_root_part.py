"""The root part believes nothing that the front says: who calls, whom for, and what they may."""

import asyncio
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any
from uuid import UUID, uuid4

import pytest

from kvmsec.daemon.front_messages import REFUSED, RefusalMessage
from kvmsec.daemon.orders import Order
from kvmsec.daemon.root_part import RootPart
from kvmsec.daemon.trust_source import TrustSource
from kvmsec.model.cluster import Cluster, Member, Role
from kvmsec.paths import Paths
from kvmsec.pki.candidates import format_candidates
from kvmsec.pki.certificates import fingerprint_of, make_certless_pair
from kvmsec.rpc import messages as m
from kvmsec.rpc import wire
from kvmsec.rpc.calls import CALLS, PROTOCOL, Call
from kvmsec.rpc.errors import Refused, RemoteFault
from kvmsec.rpc.frames import Request, Target
from kvmsec.rpc.wire import Caller
from kvmsec.store.file import FileStore
from uidpool.ranges import EMPTY

CANDIDATE, PLAIN, STRANGER = "a" * 64, "b" * 64, "c" * 64


INFO = m.NodeInfo(
    name="here",
    uuid=UUID(int=2),
    cluster_uuid=UUID(int=1),
    version="1",
    protocols=(1, 1),
    time=datetime(2026, 5, 4, tzinfo=UTC),
    revision=1,
    confirmed_at=None,
)


class Answers:
    """What stands for the node: it notes what reaches it."""

    def __init__(self) -> None:
        self.reached: list[tuple[str, Caller | None]] = []

    async def answer(self, call: Call, request: m.Message, caller: Caller | None) -> m.Message:
        self.reached.append((call.name, caller))
        if call.name == "state.put":
            return m.Revision(revision=1)
        if call.name == "node.info":
            return INFO
        return m.Nothing()


class Written:
    def __init__(self) -> None:
        self.orders: list[Order] = []

    def note(self, order: Order) -> None:
        self.orders.append(order)


class Setting:
    """A root part whose files are a member's, with a candidate and a plain node beside it."""

    def __init__(self, directory: Path) -> None:
        directory.chmod(0o700)
        self.paths = Paths(directory)
        self.paths.var.mkdir(parents=True, mode=0o700)
        self.here, self.candidate, self.plain = uuid4(), uuid4(), uuid4()
        self.list = self.paths.key_files / "ssconf_master_candidates_certs"
        self.store = FileStore(self.paths.cluster)
        self.store.save(self.cluster(), 0)
        self.put("client.pem", "unread")
        self.put(self.list.name, format_candidates(self.cluster().orderers))
        self.answers, self.written = Answers(), Written()
        self.refreshed = 0
        self.root_part = RootPart(
            self.answers,  # type: ignore[arg-type]
            TrustSource(self.paths, self.store),
            self.written,  # type: ignore[arg-type]
            lambda line: None,
        )
        self.root_part.refresh = self.refresh

    async def refresh(self) -> None:
        self.refreshed += 1

    def put(self, name: str, text: str) -> None:
        path = self.paths.key_files / name
        path.write_text(text)
        path.chmod(0o600)

    def cluster(self, *, candidates: bool = True) -> Cluster:
        def member(name: str, uuid: UUID, role: Role, *fingerprints: str) -> Member:
            return Member(
                name, uuid=uuid, address="192.0.2.1", role=role, certificates=fingerprints
            )

        second = Role.CANDIDATE if candidates else Role.PLAIN
        return Cluster(
            name="site",
            uuid=UUID(int=1),
            uid_pool=EMPTY,
            draining=EMPTY,
            security_model=None,
            nodes=(
                member("here", self.here, Role.CANDIDATE, "d" * 64),
                member("other", self.candidate, second, CANDIDATE),
                member("plain", self.plain, Role.PLAIN, PLAIN),
            ),
            master=self.here,
            created_at=datetime.now(UTC),
        )

    def caller(self, **changes: Any) -> Caller:
        known = {"fingerprint": CANDIDATE, "name": "other", "uuid": self.candidate}
        return Caller(**{**known, **changes})

    def front(self, name: str, message: m.Message, caller: Caller | None, **more: Any) -> m.Message:
        """What the front gets for an answer. Raises what a caller would."""
        body = wire.encode_request(message, PROTOCOL)
        request = Request(id=1, call=name, protocol=PROTOCOL, body=body, caller=caller, **more)
        answer = asyncio.run(self.root_part.answer_front(request))
        return wire.decode_answer(CALLS[name], answer)

    def local(self, name: str, message: m.Message, **more: Any) -> m.Message:
        body = wire.encode_request(message, PROTOCOL)
        request = Request(id=1, call=name, protocol=PROTOCOL, body=body, **more)
        answer = asyncio.run(self.root_part.answer_local(request))
        return wire.decode_answer(CALLS[name], answer)


@pytest.fixture
def setting(tmp_path: Path) -> Iterator[Setting]:
    yield Setting(tmp_path)


def test_nobody_but_root_of_the_node_takes_its_packet_rules_away(setting: Setting) -> None:
    with pytest.raises(Refused, match="root of the node"):
        setting.front("rules.remove", m.Forced(force=True), setting.caller())
    assert setting.answers.reached == []

    setting.local("rules.remove", m.Forced(force=True))
    assert setting.answers.reached == [("rules.remove", None)]


def test_a_refusal_that_the_front_tells_is_a_short_line(setting: Setting) -> None:
    words = "\x1b" * 40_000
    told = RefusalMessage(address="192.0.2.9", reason=words, peer=words, call=words)
    body = wire.encode_request(told, PROTOCOL)
    request = Request(id=1, call=REFUSED.name, protocol=PROTOCOL, body=body)
    asyncio.run(setting.root_part.answer_front(request))

    (order,) = setting.written.orders
    assert len(order.line()) < 8000


def test_the_courier_is_told_each_members_certificate(setting: Setting) -> None:
    setting.put("server.pem", "unread")
    told = TrustSource(setting.paths, setting.store).message()

    assert told is not None
    assert told.certificates[setting.plain] == (PLAIN,)


def test_a_candidate_is_answered_and_its_order_written_down(setting: Setting) -> None:
    setting.front("rules.apply", m.Nothing(), setting.caller())

    assert setting.answers.reached == [("rules.apply", setting.caller())]
    assert [(one.peer, one.fingerprint, one.outcome) for one in setting.written.orders] == [
        ("other", CANDIDATE, "begun"),
        ("other", CANDIDATE, "done"),
    ]


@pytest.mark.parametrize(
    "changes",
    [
        pytest.param({"fingerprint": STRANGER}, id="another certificate"),
        pytest.param({"name": "here"}, id="another's name"),
        pytest.param({"uuid": UUID(int=7)}, id="no member"),
        pytest.param({"uuid": None}, id="the last resort, which is not in force"),
        pytest.param({"name": None}, id="no name"),
    ],
)
def test_what_the_front_says_is_held_against_the_files(
    setting: Setting, changes: dict[str, Any]
) -> None:
    with pytest.raises(Refused):
        setting.front("rules.apply", m.Nothing(), setting.caller(**changes))
    assert setting.answers.reached == []
    assert [one.outcome for one in setting.written.orders] == ["refused"]


def test_a_plain_node_may_not_order(setting: Setting) -> None:
    caller = Caller(fingerprint=PLAIN, name="plain", uuid=setting.plain)
    with pytest.raises(Refused):
        setting.front("rules.apply", m.Nothing(), caller)
    assert setting.answers.reached == []


def test_the_front_can_not_pass_for_root_of_this_host(setting: Setting) -> None:
    with pytest.raises(Refused):
        setting.front("rules.apply", m.Nothing(), None)
    assert setting.answers.reached == []


def test_the_front_can_not_have_the_root_part_call_somebody(setting: Setting) -> None:
    target = Target(name="other", uuid=setting.candidate, address="192.0.2.1", port=1)
    with pytest.raises(Refused):
        setting.front("node.info", m.Nothing(), setting.caller(), target=target)
    with pytest.raises(RemoteFault):
        setting.local("node.info", m.Nothing(), target=target)
    assert setting.answers.reached == []


def test_a_message_that_is_not_the_calls_reaches_nobody(setting: Setting) -> None:
    with pytest.raises(RemoteFault):
        setting.front("instance.stop", m.UidRequest(uid=7), setting.caller())
    with pytest.raises(RemoteFault):
        setting.front("node.info", m.UidRequest(uid=7), setting.caller())
    assert setting.answers.reached == []


def test_a_demotion_is_in_force_with_the_state_whatever_the_list_says(setting: Setting) -> None:
    setting.store.save(setting.cluster(candidates=False), 1)
    with pytest.raises(Refused):
        setting.front("rules.apply", m.Nothing(), setting.caller())


@pytest.mark.parametrize("text", ["", "\n", "garbage"])
def test_a_list_that_can_not_be_used_lets_nobody_in(setting: Setting, text: str) -> None:
    setting.put(setting.list.name, text)
    with pytest.raises(Refused):
        setting.front("node.info", m.Nothing(), setting.caller())


def test_a_missing_list_lets_nobody_in(setting: Setting) -> None:
    setting.list.unlink()
    with pytest.raises(Refused):
        setting.front("node.info", m.Nothing(), setting.caller())


def test_a_list_that_others_could_write_lets_nobody_in(setting: Setting) -> None:
    setting.list.chmod(0o666)
    with pytest.raises(Refused):
        setting.front("node.info", m.Nothing(), setting.caller())


@pytest.mark.parametrize("list_is_whole", [True, False])
def test_the_last_resort_lets_the_common_certificate_in_beside_the_list(
    setting: Setting, list_is_whole: bool
) -> None:
    now = datetime.now(UTC)
    common = make_certless_pair("site", now=now, lifetime=timedelta(hours=1))
    setting.put("certless.pem", common.pem)
    if not list_is_whole:
        setting.list.unlink()

    setting.front("rules.apply", m.Nothing(), Caller(fingerprint_of(common.certificate_pem), "x"))
    if list_is_whole:
        setting.front("rules.apply", m.Nothing(), setting.caller())
    else:
        with pytest.raises(Refused):
            setting.front("rules.apply", m.Nothing(), setting.caller())
    with pytest.raises(Refused):
        setting.front("rules.apply", m.Nothing(), Caller(STRANGER, "x"))


def test_a_node_of_no_cluster_takes_no_order(setting: Setting) -> None:
    (setting.paths.key_files / "client.pem").unlink()
    with pytest.raises(Refused):
        setting.front("rules.apply", m.Nothing(), setting.caller())


def test_a_member_is_not_joined_again(setting: Setting) -> None:
    hello = m.JoinRequest(proof=STRANGER, node_name="n", node_uuid=uuid4())
    with pytest.raises(Refused):
        setting.front("join.hello", hello, Caller(fingerprint=STRANGER))


@pytest.mark.parametrize(
    ("name", "request_"),
    [
        ("state.put", m.State(revision=1, format=2, document={})),
        ("files.put", m.FileRequest(name="server.pem", content=None)),
        ("certificates.rollback", m.Nothing()),
        ("rules.sync", m.Nothing()),  # the list of candidates follows the state in it
    ],
)
def test_the_front_knows_of_a_change_of_trust_before_the_order_is_answered(
    setting: Setting, name: str, request_: m.Message
) -> None:
    setting.front(name, request_, setting.caller())
    assert setting.refreshed == 1
    setting.front("rules.apply", m.Nothing(), setting.caller())
    assert setting.refreshed == 1


def test_root_of_this_host_may_order_without_a_certificate(setting: Setting) -> None:
    setting.local("rules.apply", m.Nothing())
    assert setting.answers.reached == [("rules.apply", None)]
    assert {one.peer for one in setting.written.orders} == {None}


def test_a_refusal_of_the_fronts_is_written_down(setting: Setting) -> None:
    message = RefusalMessage(address="192.0.2.9", reason="handshake", more=3)
    body = wire.encode_request(message, PROTOCOL)
    request = Request(id=1, call=REFUSED.name, protocol=PROTOCOL, body=body)
    asyncio.run(setting.root_part.answer_front(request))

    (order,) = setting.written.orders
    assert (order.peer, order.outcome) == ("192.0.2.9", "refused")
    assert "3 more" in str(order.message)


def test_who_this_node_is_is_answered_once_the_front_knows_what_a_command_has_changed(
    setting: Setting,
) -> None:
    assert setting.local("node.info", m.Nothing()) == INFO
    assert setting.refreshed == 1
    assert setting.front("node.info", m.Nothing(), setting.caller()) == INFO
    assert setting.refreshed == 1
