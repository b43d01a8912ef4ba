"""The front and the courier, shut in for real: what taken-over code tries there is refused.

Each attack is tried unconfined too, where it succeeds: one that can't succeed proves nothing.
"""

import json
import os
import signal
import socket
import subprocess
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

from hypervisor.seccomp import find_filter
from hypervisor.seccomp.rules import Rule
from kvmsec.daemon import confinement
from kvmsec.daemon.confinement import Confinement, ConfinementFailed, enter
from kvmsec.daemon.inspection import find_gaps
from kvmsec.daemon.system_calls import courier_rules, front_rules
from kvmsec.linux import children, forking, namespaces, processes, syscalls
from kvmsec.linux.credentials import Credentials
from kvmsec.linux.processes import ProcessStatus
from tests.root.daemon.attacks import ATTACKS, COURIER_MAY, execute_itself

pytestmark = pytest.mark.root

WHO = Credentials(247000, 247000)
NAMES = [attack.__name__ for attack in ATTACKS]


class Inside:
    """A process of the test's own that `prepare` shuts in, and that runs one attack at a time."""

    def __init__(self, prepare: Callable[[int], None], *, new_namespace: bool) -> None:
        self._ours, theirs = socket.socketpair()
        self._ours.settimeout(20)
        self._lines = self._ours.makefile("r")
        pid, pidfd = forking.fork_init() if new_namespace else (forking.fork(), -1)
        if pid == 0:
            _serve(theirs, prepare)
        theirs.close()
        self.pid, self._pidfd = pid, pidfd

    def hears(self) -> Any:
        line = self._lines.readline()
        return json.loads(line) if line else None

    def tries(self, attack: str) -> Any:
        self._ours.sendall(attack.encode() + b"\n")
        return self.hears()

    def dies(self) -> None:
        """And stays a zombie."""
        os.kill(self.pid, signal.SIGKILL)
        os.waitid(os.P_PID, self.pid, os.WEXITED | os.WNOWAIT)

    def end(self) -> int:
        os.kill(self.pid, signal.SIGKILL)
        status = os.waitpid(self.pid, 0)[1]
        self._lines.close()
        self._ours.close()
        if self._pidfd >= 0:
            os.close(self._pidfd)
        return status


def _serve(channel: socket.socket, prepare: Callable[[int], None]) -> None:
    """The child's whole life."""
    try:
        channel = socket.socket(fileno=os.dup(channel.fileno()))
        null = os.open("/dev/null", os.O_RDWR)
        for number in (0, 1, 2):
            os.dup2(null, number)
        children.close_all_but({0, 1, 2, channel.fileno()})
        lines = channel.makefile("r")
        by_name = {attack.__name__: attack for attack in (*ATTACKS, execute_itself)}
        try:
            prepare(channel.fileno())
        except ConfinementFailed as error:
            channel.sendall(json.dumps([error.step, error.detail]).encode() + b"\n")
            os._exit(1)
        channel.sendall(b'"ready"\n')
        for line in lines:
            try:
                answer = ["got", repr(by_name[line.strip()]())[:100]]
            except OSError as error:
                answer = ["refused", str(error)]
            channel.sendall(json.dumps(answer).encode() + b"\n")
    finally:
        os._exit(9)


@pytest.fixture
def shut_in(tmp_path: Path) -> Iterator[Callable[..., Inside]]:
    begun: list[Inside] = []

    def begin(rules: Sequence[Rule] | None, *, new_namespace: bool = True) -> Inside:
        made = None if rules is None else find_filter(None, rules)

        def prepare(channel: int) -> None:
            if rules is None:
                # Free, but for its mounts: an attack that succeeds must not hit the test itself.
                syscalls.unshare(namespaces.CLONE_NEWNS)
                namespaces.mount(None, "/", None, namespaces.MS_REC | namespaces.MS_PRIVATE)
                return
            enter(
                Confinement(
                    name="kvmsec-front",
                    credentials=WHO,
                    mount_point=str(tmp_path),
                    system_calls=made,
                    descriptors=frozenset({0, 1, 2, channel}),
                )
            )

        begun.append(Inside(prepare, new_namespace=new_namespace and rules is not None))
        return begun[-1]

    yield begin
    for one in begun:
        one.end()


@pytest.fixture
def prey(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """What the attacks are after: a process of root's, files, sockets."""
    victim = subprocess.Popen(["/bin/sleep", "600"])
    monkeypatch.setenv("KVMSEC_TEST_VICTIM", str(victim.pid))
    Path("/var/lib/kvmsec").mkdir(mode=0o700, exist_ok=True)
    key = Path("/var/lib/kvmsec/server.key")
    key.write_text("secret")
    Path("/run/kvmsec").mkdir(mode=0o700, exist_ok=True)
    node = socket.socket(socket.AF_UNIX)
    node.bind("/run/kvmsec/node.sock")
    abstract = socket.socket(socket.AF_UNIX)
    abstract.bind("\0kvmsec-test")
    tcp = socket.socket(socket.AF_INET)
    tcp.bind(("127.0.0.1", 0))
    monkeypatch.setenv("KVMSEC_TEST_PORT", str(tcp.getsockname()[1]))
    for one in (node, abstract, tcp):
        one.listen(8)
    yield
    for one in (node, abstract, tcp):
        one.close()
    Path("/run/kvmsec/node.sock").unlink()
    key.unlink()
    Path("/var/tmp/kvmsec-attack").unlink(missing_ok=True)
    Path("/file").unlink(missing_ok=True)
    victim.kill()
    victim.wait()


@pytest.mark.parametrize("attack", NAMES)
def test_what_the_front_is_refused_is_possible_outside(
    attack: str, prey: None, shut_in: Callable[..., Inside]
) -> None:
    free = shut_in(None)
    assert free.hears() == "ready"
    outside = free.tries(attack)
    front = shut_in(front_rules())
    assert front.hears() == "ready"

    inside = front.tries(attack)

    assert outside is not None
    assert outside[0] == "got"
    # None: the kernel ended it.
    assert inside is None or inside[0] == "refused"


@pytest.mark.parametrize("attack", NAMES)
def test_the_courier_may_call_and_no_more(
    attack: str, prey: None, shut_in: Callable[..., Inside]
) -> None:
    courier = shut_in(courier_rules())
    assert courier.hears() == "ready"

    told = courier.tries(attack)

    if attack in COURIER_MAY:
        assert told[0] == "got"
    else:
        assert told is None or told[0] == "refused"


def test_no_program_can_take_the_process_over(shut_in: Callable[..., Inside]) -> None:
    free, front = shut_in(None), shut_in(front_rules())
    assert (free.hears(), front.hears()) == ("ready", "ready")

    assert free.tries("execute_itself") is None
    assert front.tries("execute_itself")[0] == "refused"


@pytest.mark.parametrize("rules", [front_rules(), courier_rules()], ids=["front", "courier"])
def test_proc_shows_that_all_is_gone(rules: Sequence[Rule], shut_in: Callable[..., Inside]) -> None:
    inside, outside = shut_in(rules), shut_in(None)
    assert (inside.hears(), outside.hears()) == ("ready", "ready")

    assert list(find_gaps(inside.pid, WHO, has_filter=True)) == []
    found = "; ".join(find_gaps(outside.pid, WHO, has_filter=True))
    for gap in ("uids", "capabilities", "exec", "filter", "pid", "ipc", "uts", "tree"):
        assert gap in found


def test_one_that_is_a_zombie_has_ended(shut_in: Callable[..., Inside]) -> None:
    inside = shut_in(front_rules())
    assert inside.hears() == "ready"
    inside.dies()
    assert list(find_gaps(inside.pid, WHO, has_filter=True)) == ["it has ended"]


def test_one_that_dies_while_it_is_looked_at_has_ended(
    shut_in: Callable[..., Inside], monkeypatch: pytest.MonkeyPatch
) -> None:
    inside = shut_in(front_rules())
    assert inside.hears() == "ready"
    read = processes.read_status

    def read_before_it_dies(pid: int) -> ProcessStatus | None:
        status = read(pid)
        inside.dies()
        return status

    monkeypatch.setattr(processes, "read_status", read_before_it_dies)
    assert list(find_gaps(inside.pid, WHO, has_filter=True)) == ["it has ended"]


def test_it_keeps_the_network_that_it_serves(shut_in: Callable[..., Inside]) -> None:
    inside = shut_in(front_rules())
    assert inside.hears() == "ready"
    assert os.readlink(f"/proc/{inside.pid}/ns/net") == os.readlink("/proc/self/ns/net")


def test_it_leaves_no_mount_on_the_node(shut_in: Callable[..., Inside], tmp_path: Path) -> None:
    assert shut_in(front_rules()).hears() == "ready"
    assert str(tmp_path) not in Path("/proc/self/mountinfo").read_text()
    assert list(tmp_path.iterdir()) == []


def test_a_descriptor_that_nobody_granted_keeps_it_from_starting(tmp_path: Path) -> None:
    def prepare(channel: int) -> None:
        os.open("/etc/passwd", os.O_RDONLY)
        kept = frozenset({0, 1, 2, channel})
        wanted = Confinement(
            name="x",
            credentials=WHO,
            mount_point=str(tmp_path),
            system_calls=None,
            descriptors=kept,
        )
        enter(wanted)

    inside = Inside(prepare, new_namespace=True)
    assert inside.hears()[0] == "descriptors"
    inside.end()


@pytest.mark.parametrize("step", [step.name for step in confinement.STEPS])
def test_a_step_that_fails_ends_the_process_and_names_it(step: str, tmp_path: Path) -> None:
    def fail(wanted: Confinement) -> None:
        raise PermissionError(1, "refused by the test")

    def prepare(channel: int) -> None:
        steps = tuple(
            confinement.Step(one.name, fail, one.reason) if one.name == step else one
            for one in confinement.STEPS
        )
        confinement.STEPS = steps  # type: ignore[misc]
        kept = frozenset({0, 1, 2, channel})
        enter(
            Confinement(
                name="x",
                credentials=WHO,
                mount_point=str(tmp_path),
                descriptors=kept,
                system_calls=find_filter(None, front_rules()),
            )
        )

    inside = Inside(prepare, new_namespace=True)
    assert inside.hears() == [step, "[Errno 1] refused by the test"]
    inside.end()


def test_outside_a_pid_namespace_of_its_own_it_does_not_start(
    shut_in: Callable[..., Inside],
) -> None:
    inside = shut_in(front_rules(), new_namespace=False)
    assert inside.hears()[0] == "own descriptors"


def test_a_filter_that_filters_nothing_keeps_it_from_starting(
    shut_in: Callable[..., Inside],
) -> None:
    rules = [rule for rule in front_rules() if "unshare" not in rule.calls]
    step, detail = shut_in(rules).hears()
    assert (step, detail) == ("system calls", "the filter is there, and lets a denied call pass")
