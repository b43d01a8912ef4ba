"""A member's daemon over real TLS: who gets in, what is in force when, and who outlives whom."""

import errno
import json
import os
import signal
import socket
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from kvmsec.daemon.inspection import find_gaps
from kvmsec.linux.credentials import Credentials
from kvmsec.model.cluster import Role
from kvmsec.pki.certificates import make_cluster_pair
from kvmsec.pki.keys import KeyKind
from kvmsec.rpc import messages as m
from kvmsec.rpc.client import HttpsTransport
from kvmsec.rpc.errors import Refused, RemoteFault
from tests.root.daemon.cluster_of_two import ClusterOfTwo, Daemon, ends

pytestmark = pytest.mark.root


def orders(cluster: ClusterOfTwo) -> list[dict[str, Any]]:
    return [json.loads(line) for line in cluster.paths.orders.read_text().splitlines()]


def test_a_candidate_is_answered(cluster: ClusterOfTwo, daemon: Daemon) -> None:
    info = cluster.ask("node.info", m.Nothing())
    assert (info.name, info.uuid) == ("here", cluster.here.member.uuid)
    assert info.revision == 1
    assert cluster.ask("instance.list", m.Nothing()).instances == ()


@pytest.mark.parametrize("kind", list(KeyKind))
def test_keys_of_every_kind_are_served_with_and_judged(
    kind: KeyKind, root: Path, begin: Callable[..., Daemon]
) -> None:
    cluster = ClusterOfTwo(root, kind)
    cluster.join()
    begin("--bind", f"127.0.0.1:{cluster.port}").says("serving other nodes")
    assert cluster.ask("node.info", m.Nothing()).name == "here"


def test_every_kind_of_call_works_with_nothing_left_to_import(
    cluster: ClusterOfTwo, daemon: Daemon
) -> None:
    """In the front's empty tree a module that was forgotten can't be found any more."""

    async def many(transport: HttpsTransport) -> None:
        for name, request in (
            ("node.info", m.Nothing()),
            ("node.doctor", m.Nothing()),
            ("node.examine", m.PoolRequest(uids="1000-1001")),
            ("uids.states", m.UidStatesRequest()),
            ("rules.show", m.Nothing()),
            ("instance.events", m.EventsRequest(timeout_s=0.1)),
            ("state.get", m.Nothing()),
            ("node.reconcile", m.Nothing()),
        ):
            await transport.call(name, request)
        with pytest.raises(RemoteFault) as raised:
            await transport.call("instance.info", m.InstanceRequest(name="nobody"))
        assert raised.value.kind == "UnknownInstance"

    front = daemon.front
    cluster.call(many, cluster.other)
    for odd in (b"", b"GET / HTTP/1.0\r\n\r\n", os.urandom(64)):
        _send_plain(cluster.port, odd)
    cluster.call(many, cluster.other)

    assert daemon.front == front
    assert not [line for line in daemon.lines if "front" in line]


def _send_plain(port: int, data: bytes) -> None:
    with socket.create_connection(("127.0.0.1", port), timeout=20) as one:
        try:
            one.sendall(data)
            one.shutdown(socket.SHUT_WR)
            while one.recv(4096):
                pass
        except OSError as error:
            # It may hang up at any step: on what it has not read yet, or before this end is shut.
            if error.errno not in (errno.ECONNRESET, errno.EPIPE, errno.ENOTCONN):
                raise


def test_the_front_is_confined_while_it_serves(cluster: ClusterOfTwo, daemon: Daemon) -> None:
    import pwd

    account = pwd.getpwnam("kvmsec-front")
    who = Credentials(account.pw_uid, account.pw_gid)
    cluster.ask("node.info", m.Nothing())
    assert list(find_gaps(daemon.front, who, has_filter=True)) == []


@pytest.mark.parametrize("name", ["node.info", "rules.apply"])
def test_a_plain_node_may_neither_look_nor_order(
    name: str, cluster: ClusterOfTwo, daemon: Daemon
) -> None:
    with pytest.raises(Refused) as raised:
        cluster.ask(name, m.Nothing(), cluster.plain)
    assert raised.value.evidence["step"] == "role"


def test_a_stranger_is_refused_and_written_down(cluster: ClusterOfTwo, daemon: Daemon) -> None:
    stranger = cluster.make("other", Role.CANDIDATE)  # Signed, and on no list.
    with pytest.raises(Refused):
        cluster.ask("rules.apply", m.Nothing(), stranger)
    deadline = time.monotonic() + 20
    while not (cluster.paths.orders.exists() and orders(cluster)) and time.monotonic() < deadline:
        time.sleep(0.02)
    (line,) = orders(cluster)
    assert line["outcome"] == "refused"
    assert "127.0.0.1" in line["peer"]


def test_a_foreign_ca_gets_no_connection(cluster: ClusterOfTwo, daemon: Daemon) -> None:
    from datetime import UTC, datetime
    from uuid import uuid4

    foreign = make_cluster_pair("site", uuid4(), now=datetime.now(UTC))
    with pytest.raises(RemoteFault):
        cluster.ask(
            "node.info", m.Nothing(), cluster.make("other", Role.CANDIDATE, signed_by=foreign)
        )


def test_an_order_is_written_down_with_who_gave_it(cluster: ClusterOfTwo, daemon: Daemon) -> None:
    cluster.ask("node.reconcile", m.Nothing())
    with pytest.raises(RemoteFault):
        cluster.ask("instance.stop", m.StopRequest(name="nobody"))

    told = [(one["call"], one["target"], one["outcome"], one["error"]) for one in orders(cluster)]
    assert told == [
        ("node.reconcile", None, "begun", None),
        ("node.reconcile", None, "done", None),
        ("instance.stop", "nobody", "begun", None),
        ("instance.stop", "nobody", "failed", "UnknownInstance"),
    ]
    assert {one["peer"] for one in orders(cluster)} == {"other"}
    assert {one["fingerprint"] for one in orders(cluster)} == set(cluster.other.member.certificates)


def test_what_no_remote_order_may_name_is_refused_with_all_of_it(
    cluster: ClusterOfTwo, daemon: Daemon
) -> None:
    definition = {"firmware": "/etc/shadow", "disks": [{"path": "/dev/sda"}]}
    with pytest.raises(RemoteFault) as raised:
        cluster.ask("instance.start", m.StartRequest(name="web", definition=definition))
    assert raised.value.kind == "RemoteOrderRefused"
    assert "/etc/shadow" in raised.value.message
    assert "/dev/sda" in raised.value.message
    assert orders(cluster)[-1]["outcome"] == "refused"


def test_an_order_from_a_newer_state_is_refused_by_name(
    cluster: ClusterOfTwo, daemon: Daemon
) -> None:
    with pytest.raises(RemoteFault) as raised:
        cluster.ask("instance.start", m.StartRequest(name="web", definition={}, revision=9))
    assert raised.value.kind == "StaleCopy"


def test_a_demotion_holds_for_the_very_connection_that_ordered_it(
    cluster: ClusterOfTwo, daemon: Daemon
) -> None:
    async def demote_oneself(transport: HttpsTransport) -> str:
        await transport.call("state.put", cluster.state(cluster.demoted(cluster.other), 2))
        with pytest.raises(Refused) as raised:
            await transport.call("node.info", m.Nothing())
        return str(raised.value.evidence["step"])

    assert cluster.call(demote_oneself, cluster.other) == "role"
    assert (
        "other"
        not in cluster.paths.key_files.joinpath("ssconf_master_candidates_certs").read_text()
    )


def test_a_list_that_is_emptied_lets_nobody_in(cluster: ClusterOfTwo, daemon: Daemon) -> None:
    cluster.ask("node.info", m.Nothing())
    (cluster.paths.key_files / "ssconf_master_candidates_certs").write_text("")
    with pytest.raises(Refused):
        cluster.ask("node.info", m.Nothing())


def test_a_front_that_dies_is_replaced(cluster: ClusterOfTwo, daemon: Daemon) -> None:
    first = daemon.front
    os.kill(first, signal.SIGKILL)
    daemon.says("the front was ended by signal 9")
    daemon.says("started again")
    deadline = time.monotonic() + 20
    while True:
        try:
            assert cluster.ask("node.info", m.Nothing()).name == "here"
            break
        except RemoteFault:
            assert time.monotonic() < deadline
            time.sleep(0.05)
    assert daemon.front != first


def test_a_front_that_keeps_dying_ends_the_daemon(cluster: ClusterOfTwo, daemon: Daemon) -> None:
    ended: set[int] = set()
    deadline = time.monotonic() + 60
    while daemon.process.poll() is None and time.monotonic() < deadline:
        try:
            pid = daemon.front
        except (ValueError, OSError):
            time.sleep(0.02)
            continue
        if pid not in ended:
            ended.add(pid)
            os.kill(pid, signal.SIGKILL)
    assert daemon.end() == 1
    assert len(ended) == 5
    assert any("5 times" in line for line in daemon.lines)


def test_the_front_ends_with_a_root_part_that_is_killed(
    cluster: ClusterOfTwo, daemon: Daemon
) -> None:
    front = daemon.front
    daemon.end(signal.SIGKILL)
    assert ends(front)


def test_the_front_ends_with_a_root_part_that_is_told_to(
    cluster: ClusterOfTwo, daemon: Daemon
) -> None:
    front = daemon.front
    assert daemon.end(signal.SIGTERM) == 0
    assert ends(front)
    assert not cluster.paths.node_socket.exists()


def test_without_certificates_only_this_host_is_served(
    cluster: ClusterOfTwo, begin: Callable[..., Daemon]
) -> None:
    daemon = begin("--bind", f"127.0.0.1:{cluster.port}")
    daemon.says("no certificate")
    assert cluster.paths.node_socket.exists()
    # It becomes a member while the daemon runs.
    cluster.join()
    deadline = time.monotonic() + 20
    while True:
        try:
            assert cluster.ask("node.info", m.Nothing()).name == "here"
            return
        except RemoteFault:
            assert time.monotonic() < deadline
            time.sleep(0.05)


def test_a_key_that_others_could_read_is_not_served_with(
    cluster: ClusterOfTwo, begin: Callable[..., Daemon]
) -> None:
    cluster.join()
    (cluster.paths.key_files / "client.pem").chmod(0o644)
    daemon = begin("--bind", f"127.0.0.1:{cluster.port}")
    assert "client.pem" in daemon.says("other nodes are not served")


def test_a_missing_user_is_an_error_with_the_command_that_makes_it(
    cluster: ClusterOfTwo, begin: Callable[..., Daemon]
) -> None:
    cluster.join()
    cluster.paths.config.write_text('[node]\nfront_user = "kvmsec-nobody"\n')
    daemon = begin("--bind", f"127.0.0.1:{cluster.port}")
    assert daemon.process.wait(20) == 1
    daemon.end()
    (hint,) = [line for line in daemon.lines if line.startswith("hint")]
    assert "useradd --system" in hint
    assert "kvmsec-nobody" in hint


def test_a_port_that_is_taken_is_an_error(
    cluster: ClusterOfTwo, begin: Callable[..., Daemon]
) -> None:
    cluster.join()
    with socket.create_server(("127.0.0.1", cluster.port)):
        daemon = begin("--bind", f"127.0.0.1:{cluster.port}")
        assert daemon.process.wait(20) == 1
    daemon.end()
    assert any("Address already in use" in line for line in daemon.lines)


def test_a_second_daemon_of_a_root_is_refused(
    cluster: ClusterOfTwo, begin: Callable[..., Daemon], daemon: Daemon
) -> None:
    second = begin()
    assert second.process.wait(20) == 1
    cluster.ask("node.info", m.Nothing())


def test_systemds_sockets_are_served(
    cluster: ClusterOfTwo, begin: Callable[..., Daemon], tmp_path: Path
) -> None:
    cluster.join()
    told = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
    told.bind(str(tmp_path / "notify"))
    told.settimeout(20)
    with told, socket.create_server(("127.0.0.1", cluster.port)) as given:
        daemon = begin(
            through=[sys.executable, "-c", _AS_SYSTEMD, str(given.fileno())],
            env={**os.environ, "LISTEN_FDS": "1", "NOTIFY_SOCKET": str(tmp_path / "notify")},
            pass_fds=(given.fileno(),),
        )
        assert told.recv(100) == b"READY=1"
        daemon.says("serving other nodes")
        assert cluster.ask("node.info", m.Nothing()).name == "here"
        daemon.end()
        assert told.recv(100) == b"STOPPING=1"


# The sockets from descriptor 3 on, and variables that are for this very process.
_AS_SYSTEMD = """
import os, sys
os.dup2(int(sys.argv[1]), 3)
os.environ["LISTEN_PID"] = str(os.getpid())
os.execv(sys.argv[2], sys.argv[2:])
"""


def test_settings_are_read_again_when_asked_and_a_bad_file_changes_nothing(
    cluster: ClusterOfTwo, daemon: Daemon
) -> None:
    start = m.StartRequest(name="web", definition={"firmware": "/usr/share/nothing.fd"})

    def refusal() -> str:
        with pytest.raises(RemoteFault) as raised:
            cluster.ask("instance.start", start)
        return raised.value.message

    assert "remote.firmware_folders is empty" in refusal()
    cluster.paths.config.write_text('[remote]\nfirmware_folders = ["/usr/share"]\n')
    daemon.process.send_signal(signal.SIGHUP)
    daemon.says("settings were read again")
    assert "can't be followed" in refusal()

    cluster.paths.config.write_text("[remote]\nfirmware_folders = 7\n")
    daemon.process.send_signal(signal.SIGHUP)
    daemon.says("settings stay as they were")
    assert "can't be followed" in refusal()
