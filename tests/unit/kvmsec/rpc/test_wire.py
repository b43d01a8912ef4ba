"""Messages and faults as bytes: bounded, typed, and in words that an older peer knows."""

import json
from datetime import UTC, datetime
from typing import Annotated, Any

import msgspec
import pytest
from attrs import evolve
from hypothesis import given
from hypothesis import strategies as st

from kvmsec.errors import PoolRefused, UidsInUse
from kvmsec.linux.errors import Fault
from kvmsec.rpc import errors, wire
from kvmsec.rpc import messages as m
from kvmsec.rpc.calls import CALLS, OLDEST_PROTOCOL, PROTOCOL


class Inner(m.Message, frozen=True, kw_only=True):
    size: int
    colour: Annotated[str, msgspec.Meta(extra={"since": 2})] = "red"


class Outer(m.Message, frozen=True, kw_only=True):
    inner: tuple[Inner, ...]
    more: Annotated[dict[str, int], msgspec.Meta(extra={"since": 3})] = {}  # noqa: RUF012


def request(name: str, body: bytes) -> m.Message:
    return wire.decode_request(CALLS[name], body)


def answered(name: str, body: bytes) -> m.Message:
    return wire.decode_answer(CALLS[name], body, node="node2")


def fault(error: Fault) -> errors.RemoteFault:
    with pytest.raises(errors.RemoteFault) as caught:
        answered("node.info", wire.encode_fault(error))
    return caught.value


def test_a_request_comes_out_as_it_went_in() -> None:
    sent = m.StopRequest(name="web1", timeout_s=5.0, force=True)
    assert request("instance.stop", wire.encode_request(sent, 1)) == sent


def test_a_response_comes_out_as_it_went_in() -> None:
    sent = m.Held(holders={1000: "instance web1"}, instances=("web1",))
    assert answered("uids.held", wire.encode_answer(sent, 1)) == sent


@given(st.text(), st.dictionaries(st.text(), st.integers() | st.text() | st.none()))
def test_any_text_either_travels_or_is_refused_in_words(name: str, values: dict[str, Any]) -> None:
    sent = m.Shown(values={**values, "name": name})
    assert answered("rules.show", wire.encode_answer(sent, 1)) == sent


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"null",
        b"[]",
        b'{"name":"web1","colour":"red"}',
        b'{"name":5}',
        b'{"name":""}',
        b'{"name":"web1"',
        b'{"name":"web1"} {}',
        b'{"name":"web1","timeout_s":-1}',
        b'{"name":"web1","timeout_s":NaN}',
        b'{"name":"\xff"}',
        b"[" * 100_000,
        b'{"name":' + b"[" * 100_000,
    ],
)
def test_what_is_no_message_of_the_call_is_refused(body: bytes) -> None:
    with pytest.raises(errors.BadMessage) as caught:
        request("instance.stop", body)
    assert len(caught.value.message) < 1000


@given(st.binary(max_size=200) | st.sampled_from([b'{"ok":{}}', b'{"ok":{"instances":[]}}']))
def test_bytes_are_a_response_of_the_call_or_raise_a_fault(body: bytes) -> None:
    for name, call in CALLS.items():
        try:
            answer = answered(name, body)
        except errors.RemoteFault:
            continue
        assert isinstance(answer, call.response)


@pytest.mark.parametrize(
    "body", [b"{}", b'{"ok":{},"fault":{"kind":"A","message":"b"}}', b'{"fine":{}}', b'{"ok":[]}']
)
def test_an_answer_is_a_response_or_a_fault(body: bytes) -> None:
    with pytest.raises(errors.BadMessage, match="node2"):
        answered("node.leave", body)


def test_a_request_over_the_limit_is_neither_sent_nor_read() -> None:
    definition = {"append": "x" * wire.REQUEST_LIMIT_BYTES}
    with pytest.raises(errors.BadMessage, match="at most 1048576"):
        wire.encode_request(m.StartRequest(name="a", definition=definition), 1)
    with pytest.raises(errors.BadMessage, match="at most 1048576"):
        request("instance.start", b" " * (wire.REQUEST_LIMIT_BYTES + 1))


def test_an_answer_over_the_limit_is_neither_sent_nor_read() -> None:
    log = m.Log(kvmsec="", qemu="", serial="x" * wire.RESPONSE_LIMIT_BYTES)
    with pytest.raises(errors.BadMessage):
        wire.encode_answer(log, 1)
    with pytest.raises(errors.BadMessage):
        answered("instance.log", b" " * (wire.RESPONSE_LIMIT_BYTES + 1))


def test_a_lone_surrogate_is_refused_before_it_is_sent() -> None:
    with pytest.raises(errors.BadMessage):
        wire.encode_request(m.InstanceRequest(name="\ud800"), 1)


@pytest.mark.parametrize("uid", ["-1", str(2**32), "9" * 4000])
def test_what_can_be_no_uid_is_no_holder(uid: str) -> None:
    with pytest.raises(errors.BadMessage):
        answered("uids.held", b'{"ok":{"holders":{"%s":"x"},"instances":[]}}' % uid.encode())


@pytest.mark.parametrize("number", ["-1", "9" * 4000])
def test_a_number_is_one_that_fits_somewhere(number: str) -> None:
    with pytest.raises(errors.BadMessage):
        answered("state.put", b'{"ok":{"revision":%s}}' % number.encode())


def test_an_answer_is_no_larger_than_its_call_has_use_for() -> None:
    # Of lists that hold nothing, JSON's three bytes become sixty in memory.
    limit = CALLS["instance.info"].answer_limit_bytes
    body = b'{"ok":{"name":"x","state":"running","details":{"a":[' + b"[]," * (limit // 3)
    with pytest.raises(errors.BadMessage, match=f"at most {limit}"):
        answered("instance.info", body + b"[]]}}}")
    assert limit <= 1 << 20
    assert CALLS["instance.log"].answer_limit_bytes == wire.RESPONSE_LIMIT_BYTES


# Faults ---------------------------------------------------------------------------------------


def test_a_fault_keeps_its_kind_its_words_and_its_hint() -> None:
    got = fault(UidsInUse("these uids can't leave", {1000: "instance web1"}, hint="stop it"))

    assert (got.node, got.kind, got.hint) == ("node2", "UidsInUse", "node2 says: stop it")
    assert got.message.startswith("node2: these uids can't leave")
    assert got.evidence == {"holders": {"1000": "instance web1"}}


def test_a_hint_of_this_hosts_daemon_is_ours_and_one_that_was_passed_on_keeps_its_node() -> None:
    with pytest.raises(errors.RemoteFault) as own:
        wire.decode_answer(CALLS["node.info"], wire.encode_fault(Fault("no", hint="stop it")))
    assert own.value.hint == "stop it"
    theirs = fault(Fault("no", hint="stop it"))
    with pytest.raises(errors.RemoteFault) as passed_on:
        wire.decode_answer(CALLS["node.info"], wire.encode_fault(theirs))
    assert passed_on.value.hint == "node2 says: stop it"


@pytest.mark.parametrize("kind", sorted(errors.KINDS))
def test_a_caller_can_tell_the_class_of_an_error(kind: str) -> None:
    assert type(fault(errors.KINDS[kind](None, "no"))) is errors.KINDS[kind]


def test_a_fault_that_was_passed_on_names_whose_it_is() -> None:
    body = wire.encode_fault(errors.StaleCopy("node3", "old"))

    with pytest.raises(errors.StaleCopy) as here:
        wire.decode_answer(CALLS["node.info"], body)
    assert (here.value.node, here.value.message) == ("node3", "node3: old")
    with pytest.raises(errors.StaleCopy) as there:
        answered("node.info", body)
    assert (there.value.node, there.value.message) == ("node2", "node2: node3: old")


def test_the_revisions_of_a_stale_copy_travel() -> None:
    got = fault(errors.StaleCopy(None, "older", evidence={"found": 3, "wanted": 5}))
    assert got.evidence == {"found": 3, "wanted": 5}


def test_a_problem_list_stays_a_list() -> None:
    got = fault(PoolRefused(["uid 1 has no user", "uid 2 is root's"]))
    assert got.message.count("\n") == 2


def test_what_a_hostile_peer_says_is_escaped_and_bounded() -> None:
    got = fault(Fault("\x1b[2J" + "x" * 100_000 + "\n" * 10_000, hint="\x07"))

    assert "\x1b" not in got.message
    assert got.hint == "node2 says: \\x07"
    assert len(got.message) < 5000


@pytest.mark.parametrize("kind", ["", "a" * 65, "a\nb", "__class__ x"])
def test_a_kind_is_a_name(kind: str) -> None:
    body = json.dumps({"fault": {"kind": kind, "message": "no"}}).encode()
    with pytest.raises(errors.RemoteFault) as caught:
        answered("node.info", body)
    assert caught.value.kind == "RemoteFault"


def test_evidence_that_is_too_large_stays_behind() -> None:
    got = fault(UidsInUse("no", dict.fromkeys(range(20000), "instance web1"), hint="-"))
    assert got.evidence == {}


def test_a_fault_that_holds_a_surrogate_still_travels() -> None:
    assert "\\udcff" in fault(Fault("can't read \udcff")).message


# Versions -------------------------------------------------------------------------------------


def test_a_younger_field_at_its_default_is_left_out_for_an_older_peer() -> None:
    message = Outer(inner=(Inner(size=1),))

    assert json.loads(wire.encode_request(message, 1)) == {"inner": [{"size": 1}]}
    assert json.loads(wire.encode_request(message, 2)) == {"inner": [{"size": 1, "colour": "red"}]}
    assert json.loads(wire.encode_request(message, 3)) == {
        "inner": [{"size": 1, "colour": "red"}],
        "more": {},
    }


@pytest.mark.parametrize(
    "message",
    [Outer(inner=(Inner(size=1, colour="blue"),)), Outer(inner=(), more={"a": 1})],
)
def test_a_younger_field_that_says_something_is_an_error_that_names_it(message: Outer) -> None:
    with pytest.raises(errors.WrongProtocol, match=r"node9: .* of (Inner|Outer) came with version"):
        wire.encode_request(message, 1, node="node9")


@given(st.tuples(st.integers(-3, 9), st.integers(-3, 9)))
def test_the_newest_common_version_is_spoken_by_both(theirs: tuple[int, int]) -> None:
    oldest, newest = theirs
    shared = set(range(oldest, newest + 1)) & set(range(OLDEST_PROTOCOL, PROTOCOL + 1))
    if shared:
        assert wire.newest_common(theirs) == max(shared)
    else:
        with pytest.raises(errors.WrongProtocol):
            wire.newest_common(theirs)


@pytest.mark.parametrize("protocol", [0, -1, PROTOCOL + 1, 10**30])
def test_an_unknown_version_is_refused_with_those_that_are_spoken(protocol: int) -> None:
    with pytest.raises(errors.WrongProtocol) as caught:
        wire.find_call("node.info", protocol)
    assert caught.value.evidence == {"protocols": [OLDEST_PROTOCOL, PROTOCOL]}


def test_an_unknown_call_is_refused() -> None:
    with pytest.raises(errors.BadMessage, match="there is no call"):
        wire.find_call("node.__init__", 1)


def test_a_younger_call_is_not_made_to_an_older_peer() -> None:
    young = evolve(CALLS["node.info"], since=2)
    with pytest.raises(errors.WrongProtocol, match="node9"):
        wire.require_call(young, 1, "node9")


def test_times_keep_their_zone() -> None:
    at = datetime(2026, 1, 2, tzinfo=UTC)
    event = m.Event(at=at, instance="a", state="running")
    sent = m.Events(cursor=1, events=(event,))
    assert answered("instance.events", wire.encode_answer(sent, 1)) == sent
