"""The lab itself: its nodes are what a cluster's nodes are to each other, and nothing is left."""

import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from hypervisor import tiny
from tests.cluster.lab.lab import Lab, new_lab
from tests.cluster.lab.node import Node
from tests.cluster.lab.process import TookTooLong
from tests.cluster.lab.traces import groups, host_state

pytestmark = pytest.mark.kvm

POOL = "246000-246009"


class Mishap(Exception):
    """What a test of the lab fails with."""


@pytest.fixture(scope="module")
def pair() -> Iterator[Lab]:
    with new_lab(2) as made:
        for node in made.nodes:
            _found(node)
        yield made


def test_nothing_is_left_of_a_lab_whose_test_fails(accelerator_in_use: str) -> None:
    before = host_state()
    with pytest.raises(Mishap), new_lab(3) as lab:
        _found(lab["node2"])
        lab["node2"].kvmsec("instance", "start", "web", *_machine(accelerator_in_use))
        assert [path for path in groups() if Path(path, "node2").is_dir()]
        lab["node2"].spawn("sleep", "1000")
        lab["node2"].run("useradd", "--no-create-home", "somebody")
        lab["node3"].kill()
        lab["node1"].cut_cable()
        lab["node1"].run("ip", "link", "add", "left", "type", "bridge")
        lab["node1"].pause()
        raise Mishap
    assert host_state() == before


def test_nothing_is_left_of_a_lab_that_does_not_come_up(monkeypatch) -> None:
    from tests.cluster.lab.switch import Switch

    before = host_state()
    plug_in = Switch.plug_in

    def fail_at_the_second(self: Switch, pid: int, mac: str) -> str:
        cable = plug_in(self, pid, mac)
        if cable == "cable2":
            raise Mishap
        return cable

    monkeypatch.setattr(Switch, "plug_in", fail_at_the_second)
    with pytest.raises(Mishap), new_lab(3):
        pass
    assert host_state() == before


def test_nodes_reach_each_other_by_name_and_not_over_a_cut_cable(pair: Lab) -> None:
    one, two = pair.nodes
    assert _reaches(one, two)
    assert _reaches(two, one)
    with two.cut_off():
        assert not _reaches(one, two)
        assert not _reaches(two, one)
    assert _reaches(one, two)


@pytest.mark.parametrize(("percent", "arriving"), [(100, range(1)), (50, range(1, 1000))])
def test_packets_are_lost_both_ways_and_no_more_afterwards(
    pair: Lab, percent: int, arriving: range
) -> None:
    one, two = pair.nodes
    assert _arriving(one, two) == 1000
    with two.losing(percent):
        assert _arriving(one, two) in arriving
        assert _arriving(two, one) in arriving
    assert _arriving(two, one) == 1000


def test_what_a_node_has_is_not_another_s(pair: Lab) -> None:
    one, two = pair.nodes
    assert one.run("cat", "/proc/sys/kernel/hostname").stdout == "node1\n"
    for node in pair.nodes:
        node.kvmsec("firewall", "verify")
    one.run("useradd", "--no-create-home", "--uid", "246050", "only-here")
    two.run("id", "only-here", status=1)
    one.run("nft", "add", "table", "inet", "only_here")
    assert "only_here" not in two.run("nft", "list", "ruleset").stdout
    one.run("sh", "-c", "touch /run/only-here /tmp/only-here /dev/shm/only-here /var/lib/only-here")
    for place in ("/run", "/tmp", "/dev/shm", "/var/lib"):
        two.run("test", "-e", f"{place}/only-here", status=1)
    asleep = one.spawn("sleep", "1000")
    assert "sleep 1000" in _programs(one)
    assert "sleep 1000" not in _programs(two)
    asleep.end()


def test_an_instance_runs_under_pool_on_each_of_two_nodes_at_once(
    pair: Lab, accelerator_in_use: str
) -> None:
    for node in pair.nodes:
        node.kvmsec("instance", "start", "web", *_machine(accelerator_in_use))
    for node in pair.nodes:
        [web] = node.json("instance", "list")
        assert (web["name"], web["state"], web["security_model"]) == ("web", "running", "pool")
        leased = [one for one in node.json("uids", "list") if one["state"] == "leased"]
        assert [one["uid"] for one in leased] == [web["uid"]]
        node.kvmsec("audit", "web", status=None)
    one, two = pair.nodes
    one.kvmsec("instance", "stop", "web")
    assert one.json("instance", "list") == []
    assert [web["name"] for web in two.json("instance", "list")] == ["web"]
    two.kvmsec("instance", "stop", "web", "--force")


def test_the_single_node_commands_work_in_a_node(pair: Lab) -> None:
    node = pair.first
    found = node.json("doctor")
    assert [one for one in found if one["severity"] == "error"] == []
    node.kvmsec("config", "check")
    assert node.json("cluster", "info")["uid_pool"] == POOL
    assert node.json("firewall", "show")["uids"] == POOL
    node.kvmsec("uids", "list", "--all")


def test_a_node_that_died_boots_with_its_disk_and_an_empty_run(
    pair: Lab, accelerator_in_use: str
) -> None:
    node = pair["node2"]
    node.kvmsec("instance", "start", "web", *_machine(accelerator_in_use))
    was = node.run("cat", "/proc/sys/kernel/random/boot_id").stdout
    daemon = node.spawn("sleep", "1000")
    node.kill()
    assert not daemon.ends_within(0) or daemon.status(0) is None
    node.boot()
    assert node.run("cat", "/proc/sys/kernel/random/boot_id").stdout != was
    assert node.json("cluster", "info")["name"] == "node2"
    assert node.json("instance", "list") == []
    assert [one for one in node.json("uids", "list") if one["state"] == "leased"] == []
    node.kvmsec("instance", "start", "web", *_machine(accelerator_in_use))
    node.kvmsec("instance", "stop", "web", "--force")


def test_a_paused_node_answers_only_once_it_is_resumed(pair: Lab) -> None:
    one, two = pair.nodes
    serve = "import socket; s = socket.create_server(('', 5000)); print('up', flush=True)\n"
    serve += "while True: c = s.accept()[0]; c.send(b'hello'); c.close()"
    ask = "import socket; s = socket.create_connection(('node2', 5000), 5); s.settimeout(1)\n"
    ask += "print('connected', flush=True); print(s.recv(5))"
    server = two.spawn("python3", "-c", serve)
    _until(lambda: "up" in server.said)
    with two.paused():
        done = one.run("python3", "-c", ask, status=1)
        assert (done.stdout, "timed out" in done.stderr) == ("connected\n", True)
    assert one.run("python3", "-c", ask).stdout == "connected\nb'hello'\n"
    server.end()


def test_a_program_that_takes_too_long_is_ended_with_what_it_started(pair: Lab) -> None:
    node = pair.first
    with pytest.raises(TookTooLong):
        node.run("sh", "-c", "sleep 4321 & sleep 4321", timeout_s=0.5)
    _until(lambda: "sleep 4321" not in _programs(node))


def test_a_program_s_end_is_told_as_it_was(pair: Lab) -> None:
    node = pair.first
    done = node.run("sh", "-c", "cat; echo no >&2; exit 3", status=3, input=b"yes")
    assert (done.stdout, done.stderr) == ("yes", "no\n")
    assert node.run("sh", "-c", "kill -9 $$", status=None).status == -signal.SIGKILL
    with pytest.raises(FileNotFoundError):
        node.run("no-such-program")


# What the tests ask of a node -------------------------------------------------------------------


def _found(node: Node) -> None:
    """Make a cluster of that node alone."""
    node.kvmsec("uids", "provision", POOL)
    node.kvmsec("cluster", "init", "--name", node.name, "--uid-pool", POOL)


def _machine(accelerator: str) -> tuple[str, ...]:
    return ("--firmware", str(tiny.rom_path()), "--memory", "1", "--accel", accelerator)


def _reaches(node: Node, other: Node) -> bool:
    """Whether the other's kernel answers: that nobody listens there is an answer."""
    ask = f"import socket; socket.create_connection(({other.name!r}, 9), 0.5)"
    return "ConnectionRefusedError" in node.run("python3", "-c", ask, status=1).stderr


def _arriving(node: Node, other: Node) -> int:
    """How many of 1000 datagrams to the other arrive there; ARP has found it before."""
    listen = """import socket
s = socket.socket(type=socket.SOCK_DGRAM)
s.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1 << 24)
s.bind(("", 5000))
print("up", flush=True)
while len(s.recv(9)) != 3:
    print("got one", flush=True)"""
    send = """import socket, sys
s = socket.socket(type=socket.SOCK_DGRAM)
for _ in range(1000):
    s.sendto(b"x", (sys.argv[1], 5000))"""
    end = "import socket; socket.socket(type=socket.SOCK_DGRAM).sendto(b'end', ('127.0.0.1', 5000))"
    listener = other.spawn("python3", "-c", listen)
    _until(lambda: "up" in listener.said)
    node.run("python3", "-c", send, other.name)
    other.run("python3", "-c", end)
    listener.status(10)
    return listener.said.count("got one")


def _programs(node: Node) -> list[str]:
    """The command lines of what runs in a node."""
    show = r"for one in /proc/[0-9]*/cmdline; do tr '\0' ' ' <$one; echo; done 2>/dev/null"
    return [line.strip() for line in node.run("sh", "-c", show).stdout.splitlines()]


def _until(is_so: Callable[[], bool], deadline_s: float = 10.0) -> None:
    end = time.monotonic() + deadline_s
    while not is_so():
        assert time.monotonic() < end
        time.sleep(0.02)
