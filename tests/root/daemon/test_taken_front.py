"""A front that was taken over attacks its root part: a real daemon, and all that it can send.

What docs/design/cluster.md says that such a front can't do is tried here; what it can is its own.
"""

import contextlib
import json
import os
import signal
import socket
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import msgspec
import pytest
from attrs import evolve

from hypervisor import tiny
from kvmsec.rpc.wire import Caller
from tests.kvm.accelerator import accelerator
from tests.root.daemon.cluster_of_two import DEADLINE_S, ClusterOfTwo, Daemon, Ours, ends
from tests.root.daemon.node_by_command import Node

pytestmark = pytest.mark.root

ROOT = Path(__file__).parents[3]
FLOOD_S = 1.5


class TakenDaemon:
    """A member's daemon with a front of ours, and the way to that front."""

    def __init__(self, cluster: ClusterOfTwo, daemon: Daemon) -> None:
        self.cluster = cluster
        self.daemon = daemon

    def does(self, what: str, **told: Any) -> Any:
        """Have the front do something; how it went."""
        with socket.create_connection(("127.0.0.1", self.cluster.port), timeout=DEADLINE_S) as one:
            one.sendall(json.dumps({"do": what, **told}).encode() + b"\n")
            with one.makefile("r") as lines:
                line = lines.readline()
        return json.loads(line) if line else None

    def asks(self, call: str, caller: Any, body: Any = None, **more: Any) -> Any:
        did, answer = self.does(
            "ask", call=call, body=json.dumps(body or {}), caller=caller, **more
        )
        assert did == "did", answer
        return answer

    def serves(self) -> None:
        """Wait until a front takes connections and the root part answers what it asks."""
        deadline = time.monotonic() + DEADLINE_S
        while True:
            try:
                answer = self.asks("node.info", as_caller(self.cluster.other))
                assert answer["ok"]["name"] == "here", answer
                return
            except (OSError, TypeError):
                assert time.monotonic() < deadline
                time.sleep(0.05)

    def root_is_answered(self) -> None:
        """The command of root of this host gets its answer."""
        node = Node(self.cluster.root)
        assert json.loads(node.do("instance", "list", "--json")) == []

    @contextlib.contextmanager
    def flooded(self, call: str, body: Any) -> Iterator[Callable[[], bool]]:
        """The front floods meanwhile, for some seconds; says whether it still does."""
        caller = None if call == "front.refused" else as_caller(self.cluster.other)
        told = {"call": call, "body": json.dumps(body), "caller": caller, "seconds": FLOOD_S}
        with ThreadPoolExecutor(1) as aside:
            flooding = aside.submit(lambda: self.does("flood", **told))
            yield lambda: not flooding.done()
            did, sent = flooding.result()
        assert did == "did"
        assert sent > 100_000

    def descriptors(self) -> int:
        return len(os.listdir(f"/proc/{self.daemon.process.pid}/fd"))

    def children(self) -> int:
        pid = self.daemon.process.pid
        return len(Path(f"/proc/{pid}/task/{pid}/children").read_text().split())

    def has_descriptors(self, count: int) -> None:
        """Wait until it has no more of them."""
        deadline = time.monotonic() + DEADLINE_S
        while self.descriptors() > count:
            assert time.monotonic() < deadline, self.descriptors()
            time.sleep(0.02)

    def memory_mib(self, which: str) -> float:
        status = Path(f"/proc/{self.daemon.process.pid}/status").read_text()
        (kib,) = [int(line.split()[1]) for line in status.splitlines() if line.startswith(which)]
        return kib / 1024

    def orders(self) -> list[dict[str, Any]]:
        if not self.cluster.paths.orders.exists():
            return []
        return [json.loads(line) for line in self.cluster.paths.orders.read_text().splitlines()]


@pytest.fixture
def taken(
    cluster: ClusterOfTwo, begin: Callable[..., Daemon], request: pytest.FixtureRequest
) -> TakenDaemon:
    cluster.join()
    options = getattr(request, "param", "-")
    through = (sys.executable, "-m", "tests.root.daemon.taken_front", options)
    daemon = begin("--bind", f"127.0.0.1:{cluster.port}", through=through, cwd=ROOT)
    daemon.says("serving other nodes")
    return TakenDaemon(cluster, daemon)


def as_caller(ours: Ours, **changes: Any) -> Any:
    fingerprint = ours.member.certificates[0]
    caller = Caller(fingerprint=fingerprint, name=ours.member.name, uuid=ours.member.uuid)
    return {**msgspec.to_builtins(caller), **changes}


# What it claims --------------------------------------------------------------------------------


def test_what_a_candidate_ordered_is_refused_once_that_is_none(taken: TakenDaemon) -> None:
    """A recorded order, sent again when its peer has been demoted, and when it has been removed."""
    cluster, order = taken.cluster, as_caller(taken.cluster.other)
    assert taken.asks("node.reconcile", order) == {"ok": {"lines": []}}

    demoted = cluster.demoted(cluster.other)
    removed = evolve(demoted, nodes=(cluster.here.member, cluster.plain.member))
    for revision, state, step in ((2, demoted, "role"), (3, removed, "name")):
        document = cluster.state(state, revision).document
        assert document is not None
        cluster.store.put_copy(document, 2, revision, at=datetime.now(UTC))
        fault = taken.asks("node.reconcile", order)["fault"]
        assert (fault["kind"], fault["evidence"]) == ("Refused", {"step": step})

    told = [(one["peer"], one["outcome"]) for one in taken.orders()]
    assert told == [("other", "begun"), ("other", "done"), *[("other", "refused")] * 2]
    assert {one["fingerprint"] for one in taken.orders()} == {order["fingerprint"]}


def test_a_peer_that_it_makes_up_is_refused(taken: TakenDaemon) -> None:
    other, plain, here = taken.cluster.other, taken.cluster.plain, taken.cluster.here
    fingerprint = other.member.certificates[0]
    made_up = {
        "nobody": None,
        "a plain node": as_caller(plain),
        "a plain node with a candidate's certificate": as_caller(plain, fingerprint=fingerprint),
        "a candidate with a plain node's": as_caller(
            other, fingerprint=plain.member.certificates[0]
        ),
        "a candidate under another's uuid": as_caller(other, uuid=str(here.member.uuid)),
        "a candidate under another's name": as_caller(other, name="here"),
        "a candidate without a uuid": as_caller(other, uuid=None),
        "a joiner": {"fingerprint": fingerprint},
        "root": as_caller(other, name="local"),
    }
    for who, caller in made_up.items():
        for call in ("node.reconcile", "instance.list"):
            assert taken.asks(call, caller)["fault"]["kind"] == "Refused", (who, call)
    assert {one["outcome"] for one in taken.orders()} == {"refused"}


def test_it_does_not_pass_for_root_of_the_node(taken: TakenDaemon) -> None:
    other = as_caller(taken.cluster.other)
    target = {"name": "other", "uuid": other["uuid"], "address": "127.0.0.1", "port": 1}
    for fault in (
        taken.asks("rules.remove", other, {"force": True})["fault"],
        taken.asks("node.info", other, target=target)["fault"],
        taken.asks("node.info", None)["fault"],
    ):
        assert fault["kind"] == "Refused", fault
    joining = {"proof": "0" * 64, "node_name": "here", "node_uuid": other["uuid"]}
    refused = taken.asks("join.hello", {"fingerprint": "0" * 64}, joining)["fault"]
    assert refused["kind"] == "Refused"
    taken.asks("rules.apply", as_caller(taken.cluster.other, name="local"))
    assert "ok" in taken.asks("front.refused", None, {"address": "local", "reason": "x"})
    assert "local" not in {one["peer"] for one in taken.orders()}


# What it floods with ---------------------------------------------------------------------------

FILLER: list[Any] = [[]] * 240_000
EVERY_UID = {"uids": "1-2147483646"}
MANY_RANGES = {"uids": ",".join(map(str, range(300_000, 318_000, 2)))}
FAULTS = {"disks": FILLER}
KEYS = {f"key{number}": 1 for number in range(60_000)}
FLOODS: dict[str, tuple[str, Any]] = {
    "questions": ("node.info", {}),
    "looks at the host": ("node.doctor", {}),
    "no calls": ("no.such.call", {}),
    "long waits": ("instance.events", {"timeout_s": 60}),
    "faults in a definition": ("instance.start", {"name": "web", "definition": FAULTS}),
    "keys in a definition": ("instance.start", {"name": "web", "definition": KEYS}),
    "a state": ("state.put", {"revision": 2, "format": 2, "document": {"nodes": FILLER}}),
    "looks at every uid": ("users.check", EVERY_UID),
    "looks at many ranges": ("users.check", MANY_RANGES),
    "examinations": ("node.examine", EVERY_UID),
    "logs": ("instance.log", {"name": "web"}),
    "refusals": ("front.refused", {"address": "1" * 256, "reason": "x"}),
}


@pytest.mark.parametrize("what", FLOODS)
def test_a_flood_leaves_the_root_part_in_bounds_and_at_work(taken: TakenDaemon, what: str) -> None:
    log = taken.cluster.paths.instance_log("web")
    log.parent.mkdir(parents=True, exist_ok=True)
    log.write_text("\x01" * (256 << 10))  # JSON makes six characters of each.
    taken.serves()
    taken.root_is_answered()
    before = taken.memory_mib("VmRSS")
    with taken.flooded(*FLOODS[what]) as is_flooded:
        answers = 0
        while is_flooded():
            taken.root_is_answered()
            answers += 1
            assert taken.children() < 16  # Each is a process of root's, and three descriptors.
    assert answers >= 1
    # As much of requests and of answers as docs/design/cluster.md says, and what one is decoded to.
    assert taken.memory_mib("VmHWM") < before + 64 + 64 + 64
    assert taken.daemon.process.poll() is None


@pytest.mark.kvm
def test_an_instance_s_end_is_seen_in_a_flood(taken: TakenDaemon) -> None:
    node = Node(taken.cluster.root)
    machine = ("--firmware", str(tiny.rom_path()), "--memory", "1", "--accel", accelerator())
    node.do("instance", "start", "web", *machine)
    [web] = json.loads(node.do("instance", "list", "--json"))
    with taken.flooded(*FLOODS["looks at every uid"]) as is_flooded:
        os.kill(web["pid"], signal.SIGKILL)
        taken.daemon.says("instance web crashed")
        assert is_flooded()


# What it sends ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("which", "to"),
    [
        *(("garbage", "calls"), ("oversized", "calls"), ("another's", "calls"), ("deep", "calls")),
        *(("garbage", "control"), ("oversized", "control")),
    ],
)
def test_what_is_no_frame_ends_the_front_and_is_told(
    taken: TakenDaemon, which: str, to: str
) -> None:
    before, descriptors = taken.daemon.front, taken.descriptors()
    taken.does("send_no_frame", which=which, to=to)
    assert "frame" in taken.daemon.says("the front was ended")
    taken.daemon.says("the front is started again")
    taken.serves()
    assert taken.daemon.front != before
    taken.has_descriptors(descriptors)


def test_half_a_frame_keeps_nobody_waiting(taken: TakenDaemon) -> None:
    taken.does("send_half_a_frame")
    taken.root_is_answered()


def test_answers_that_nobody_asked_for_change_nothing(taken: TakenDaemon) -> None:
    taken.serves()
    before, front = taken.memory_mib("VmRSS"), taken.daemon.front
    assert taken.does("answer_what_nobody_asked", times=20_000, size=10) == ["did", None]
    taken.serves()
    taken.root_is_answered()
    assert taken.daemon.front == front

    taken.does("answer_what_nobody_asked", times=20, size=16 << 20)
    assert "a frame of 16777" in taken.daemon.says("the front was ended")
    taken.serves()
    assert taken.memory_mib("VmHWM") < before + 16


@pytest.mark.parametrize("taken", ["-", "older-kernel"], indirect=True)
def test_descriptors_that_it_sends_are_left_nowhere(
    taken: TakenDaemon, request: pytest.FixtureRequest
) -> None:
    taken.serves()
    before = taken.descriptors()
    answer = taken.does("send_descriptors", messages=200)
    if request.node.callspec.params["taken"] == "older-kernel" or not kernel_refuses_descriptors():
        assert answer == ["did", 200 * 253]
    else:
        assert answer[0] == "refused"
    taken.serves()
    taken.has_descriptors(before)


def kernel_refuses_descriptors() -> bool:
    ours, theirs = socket.socketpair()
    with ours, theirs:
        try:
            ours.setsockopt(socket.SOL_SOCKET, 83, 0)  # SO_PASSRIGHTS, Linux 6.16
        except OSError:
            return False
    return True


@pytest.mark.parametrize("how", ["shutdown", "backlog", "filter"])
def test_the_sockets_that_its_successor_gets_are_as_they_were(taken: TakenDaemon, how: str) -> None:
    assert taken.does("spoil_listeners", how=how)[0] == "refused"
    assert taken.does("die") is None
    taken.daemon.says("the front exited with status 3")
    taken.serves()


@pytest.mark.parametrize("taken", ["impatient"], indirect=True)
def test_a_front_that_takes_nothing_any_more_has_a_successor(taken: TakenDaemon) -> None:
    taken.does("be_deaf")
    before = taken.daemon.front
    os.utime(taken.cluster.paths.key_files / "server.pem")
    taken.daemon.says("the front was ended: front.trust was not answered")
    taken.serves()
    assert taken.daemon.front != before


@pytest.mark.parametrize("taken", ["impatient"], indirect=True)
def test_a_front_that_orders_what_it_does_not_take_has_a_successor_too(taken: TakenDaemon) -> None:
    """It is ended by the very order that it waits for an answer to."""
    before = taken.daemon.front
    prepare = {"anchors": taken.cluster.anchor.certificate_pem, "key_kind": "ed25519"}
    order = {"call": "certificates.prepare", "body": json.dumps(prepare)}
    assert taken.does("ask", **order, caller=as_caller(taken.cluster.other)) is None
    taken.daemon.says("the front was ended: front.trust was not answered")
    taken.serves()
    assert taken.daemon.front != before
    taken.root_is_answered()
    assert taken.orders()[-1]["call"] == "certificates.prepare"
    assert taken.orders()[-1]["outcome"] == "done"
    assert taken.daemon.end() == 0


@pytest.mark.parametrize("taken", ["impatient"], indirect=True)
def test_a_front_that_hangs_does_not_keep_the_daemon_from_its_end(taken: TakenDaemon) -> None:
    front = taken.daemon.front
    taken.does("be_deaf")
    assert taken.daemon.end() == 0
    assert ends(front)
