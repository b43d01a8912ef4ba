"""A node over a transport answers what the node itself answers, and fails as it fails."""

import asyncio
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest

from hypervisor.machine import Disk, Machine
from kvmsec.agent import Event, InstanceState
from kvmsec.linux.errors import Fault
from kvmsec.model.instance import InstanceDefinition
from kvmsec.rpc import errors
from kvmsec.rpc import messages as m
from kvmsec.rpc.calls import CALLS
from kvmsec.rpc.recent import KEPT, RecentEvents
from kvmsec.rpc.remote import RemoteAgent
from kvmsec.rpc.service import Service
from kvmsec.rpc.values import LOG_LIMIT_CHARS
from kvmsec.rpc.wire import Caller
from tests.unit.kvmsec.rpc.fakes import AT, INFO, STATE, BytesTransport, FakeHome, FakeNode
from uidpool.ranges import UidRanges

POOL = UidRanges.parse("1000-1009")
WEB1 = InstanceDefinition(
    machine=Machine(name="web1", memory_mib=64, disks=(Disk(path=Path("/srv/disk.img")),))
)


class Pair:
    """A node, and the same one as it looks over a transport."""

    def __init__(self, caller: Caller | None = None) -> None:
        self.node = FakeNode()
        self.home = FakeHome()
        self.service = Service(self.node, self.home)
        self.transport = BytesTransport(self.service, caller)
        self.remote = RemoteAgent(self.transport, "node1", revision=5)

    def run(self, question: Callable[[RemoteAgent], Awaitable[Any]]) -> Any:
        async def ask() -> Any:
            async with self.service:
                return await question(self.remote)

        return asyncio.run(ask())


QUESTIONS: dict[str, Callable[[Any], Awaitable[Any]]] = {
    "list": lambda node: node.list(),
    "info": lambda node: node.info("web1"),
    "start": lambda node: node.start(WEB1),
    "stop": lambda node: node.stop("web1", timeout_s=5.0, force=True),
    "reboot": lambda node: node.reboot("web1"),
    "uid_states": lambda node: node.uid_states(with_free=True),
    "release_uid": lambda node: node.release_uid(1000),
    "apply_rules": lambda node: node.apply_rules(),
    "verify_rules": lambda node: node.verify_rules(),
    "remove_rules": lambda node: node.remove_rules(force=True),
    "reconcile": lambda node: node.reconcile(),
    "held_uids": lambda node: node.held_uids(),
    "running_instances": lambda node: node.running_instances(),
    "check_pool": lambda node: node.check_pool(POOL),
    "sync_rules": lambda node: node.sync_rules(),
    "forget_resting": lambda node: node.forget_resting(),
}


@pytest.mark.parametrize("name", QUESTIONS)
def test_a_remote_node_answers_what_the_node_answers(name: str) -> None:
    pair, alone = Pair(), FakeNode()

    assert pair.run(QUESTIONS[name]) == asyncio.run(_awaited(QUESTIONS[name](alone)))
    assert alone.asked[0] in pair.node.asked


async def _awaited(answer: Awaitable[Any]) -> Any:
    return await answer


@pytest.mark.parametrize("name", QUESTIONS)
def test_what_a_node_refuses_comes_back_in_its_words(name: str) -> None:
    pair = Pair()
    pair.node.failure = Fault("it can't", hint="do this")

    with pytest.raises(errors.RemoteFault) as caught:
        pair.run(QUESTIONS[name])
    assert (caught.value.message, caught.value.hint) == ("node1: it can't", "node1 says: do this")
    assert caught.value.kind == "Fault"


def test_every_call_is_answered() -> None:
    pair = Pair()
    handled = pair.service._handlers

    assert set(handled) == set(CALLS)


def test_rules_are_shown_as_json_has_them() -> None:
    assert Pair().run(lambda node: node.show_rules()) == {
        "backend": "nftables",
        "families": ["ipv4"],
    }


def test_details_travel_as_json_has_them() -> None:
    pair = Pair()
    pair.node.details = {"qemu": Path("/usr/bin/kvm"), "at": AT, "machine": {"disks": ()}}

    info = pair.run(lambda node: node.info("web1"))

    assert info.details == {
        "qemu": "/usr/bin/kvm",
        "at": "2026-01-02T03:04:05Z",
        "machine": {"disks": []},
    }


def test_a_log_is_cut_to_its_end_and_can_always_travel() -> None:
    log = Pair().run(lambda node: node.log("web1"))

    assert log.kvmsec == "ours"
    assert log.qemu == "\ufffd" * LOG_LIMIT_CHARS
    assert log.serial == "\\udcff\x00"


def test_an_unknown_instance_can_be_told_from_other_faults() -> None:
    with pytest.raises(errors.RemoteFault) as caught:
        Pair().run(lambda node: node.info("web2"))
    assert (caught.value.kind, caught.value.evidence) == ("UnknownInstance", {"name": "web2"})


@pytest.mark.parametrize("failure", [RuntimeError("the secret"), AssertionError("the secret")])
def test_a_fault_of_the_node_itself_tells_a_peer_nothing_but_its_class(failure: Exception) -> None:
    pair = Pair()
    pair.node.failure = failure

    with pytest.raises(errors.RemoteFault, match=type(failure).__name__) as caught:
        pair.run(lambda node: node.list())
    assert "secret" not in str(caught.value)
    assert pair.transport.failures == [("instance.list", failure)]


def test_a_start_is_admitted_before_the_node_is_asked() -> None:
    caller = Caller(fingerprint="a" * 64, name="master")
    pair = Pair(caller)
    pair.home.refuses_start = errors.StaleCopy(None, "old", evidence={"found": 3, "wanted": 5})

    with pytest.raises(errors.StaleCopy):
        pair.run(lambda node: node.start(WEB1))
    assert pair.home.asked == [("admit_start", "web1", 5, caller)]
    assert pair.node.asked == []


def test_a_bad_definition_is_refused_with_every_fault() -> None:
    pair = Pair()
    request = m.StartRequest(name="web1", definition={"vcpus": 0, "colour": "red"})

    with pytest.raises(errors.RemoteFault) as caught:
        pair.run(lambda node: pair.transport.call("instance.start", request))
    assert caught.value.kind == "BadDefinition"
    assert len(caught.value.evidence["problems"]) == 2


def test_what_a_daemon_needs_is_among_what_its_doctor_finds() -> None:
    pair = Pair()

    assert pair.run(lambda node: node.doctor()) == asyncio.run(FakeHome().doctor())
    assert pair.home.asked == [("doctor",)]


def test_the_household_is_reached_as_well() -> None:
    caller = Caller(fingerprint="a" * 64)
    pair = Pair(caller)
    join = m.JoinRequest(proof="c" * 64, node_name="master", node_uuid=INFO.uuid)
    admit = m.AdmitRequest(proof="c" * 64, anchors="pem", certificate="pem", state=STATE)
    put = m.FileRequest(name="server.pem", content="pem")

    async def ask(node: RemoteAgent) -> None:
        home = node.household
        assert await home.info() == INFO
        assert (await home.examine(POOL)).info == INFO
        assert (await home.provision(POOL)).made == "1000-1001"
        assert await home.get_state() == STATE
        assert await home.put_state(STATE) == 3
        prepared = await home.prepare(m.PrepareRequest(anchors="pem"))
        assert prepared.signing_request == "a request"
        await home.commit(m.CommitRequest(certificate="pem"))
        await home.rollback()
        await home.finish(m.FinishRequest(anchors="pem"))
        await home.put_file(put)
        assert (await home.hello(join)).proof == "b" * 64
        assert await home.admit(admit) == INFO
        await home.leave()

    pair.run(ask)
    assert ("put_file", put) in pair.home.asked
    assert ("hello", join, caller) in pair.home.asked
    assert ("admit", admit, caller) in pair.home.asked
    assert ("examine", POOL) in pair.home.asked
    assert pair.home.asked[-1] == ("leave",)


# Events ---------------------------------------------------------------------------------------


def happened(number: int) -> Event:
    return Event(AT, f"web{number}", InstanceState.RUNNING)


def test_events_are_told_from_the_first_asking_on() -> None:
    pair = Pair()

    async def ask(node: RemoteAgent) -> list[Event]:
        heard = node.events()
        first = asyncio.ensure_future(anext(heard))
        while pair.transport.made.count("instance.events") < 2:
            await asyncio.sleep(0)
        for number in range(3):
            pair.node.happening.put_nowait(happened(number))
        return [await first, await anext(heard), await anext(heard)]

    assert pair.run(ask) == [happened(0), happened(1), happened(2)]


def test_an_asker_that_comes_again_misses_nothing() -> None:
    async def ask() -> None:
        recent = RecentEvents(first=100)
        here = await recent.after(None, 0)
        for number in range(3):
            recent.add(happened(number))
        there = await recent.after(here.cursor, 30)

        assert [one.instance for one in there.events] == ["web0", "web1", "web2"]
        assert (there.cursor, there.lost) == (103, 0)

    asyncio.run(ask())


def test_no_more_than_the_last_are_kept_and_the_lost_are_counted() -> None:
    async def ask() -> None:
        recent = RecentEvents(first=0)
        for number in range(KEPT + 10):
            recent.add(happened(number))
        found = await recent.after(0, 30)

        assert len(found.events) == KEPT
        assert found.events[0].instance == "web10"
        assert found.lost == 10

    asyncio.run(ask())


@pytest.mark.parametrize("cursor", [-(10**30), 10**30])
def test_a_cursor_that_nobody_gave_out_gets_what_there_is(cursor: int) -> None:
    async def ask() -> m.Events:
        recent = RecentEvents(first=100)
        recent.add(happened(1))
        return await recent.after(cursor, 0)

    found = asyncio.run(ask())
    assert len(found.events) == 1
    assert found.lost > 0
    assert found.cursor == 101


def test_nothing_new_is_an_empty_answer_after_the_wait() -> None:
    found = asyncio.run(RecentEvents(first=100).after(100, 0.01))
    assert (found.cursor, found.events) == (100, ())


def test_a_node_whose_events_nobody_follows_says_so() -> None:
    pair = Pair()
    with pytest.raises(errors.RemoteFault, match="nobody follows"):
        asyncio.run(pair.transport.call("instance.events", m.EventsRequest()))


def test_a_wait_that_was_asked_for_is_added_to_a_calls_deadline() -> None:
    stop = m.StopRequest(name="a", timeout_s=600.0)
    assert CALLS["instance.stop"].deadline_s(stop) == 720.0
    assert CALLS["instance.events"].deadline_s(m.EventsRequest(timeout_s=30)) == 40.0
    assert CALLS["instance.list"].deadline_s(m.Nothing()) == 10.0
