"""Commands by way of a real daemon: the same words, the same JSON, and never a hang."""

import json
import os
import signal
import socket
import subprocess
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest

from tests.root.daemon.cluster_of_two import KVMSEC, ClusterOfTwo, Daemon

pytestmark = pytest.mark.root

COMMANDS: tuple[Sequence[str], ...] = (
    ("instance", "list"),
    ("instance", "list", "--json"),
    ("instance", "info", "nobody"),
    ("instance", "log", "nobody"),
    ("instance", "stop", "nobody"),
    ("instance", "start", "web", "--firmware", "/nowhere", "--accel", "tcg"),
    ("instance", "console", "nobody"),
    ("instance", "log", "nobody", "--follow"),
    ("uids", "list", "--json"),
    ("uids", "release", "1000"),
    ("firewall", "show", "--json"),
    ("firewall", "remove"),
    ("cluster", "info", "--json"),
)


def run(root: Path, *words: str) -> tuple[int, str, str]:
    done = subprocess.run(
        [str(KVMSEC), "--root", str(root), *words], capture_output=True, text=True, timeout=60
    )
    return done.returncode, done.stdout, done.stderr


def calls(cluster: ClusterOfTwo) -> list[str]:
    if not cluster.paths.orders.exists():
        return []
    lines = [json.loads(line) for line in cluster.paths.orders.read_text().splitlines()]
    assert {line["peer"] for line in lines} == {"local"}
    return [line["call"] for line in lines if line["outcome"] != "begun"]


@pytest.fixture
def daemon(cluster: ClusterOfTwo, begin: Callable[..., Daemon]) -> Daemon:
    """A daemon that serves this host alone."""
    daemon = begin()
    daemon.says("no certificate")
    return daemon


def test_words_and_json_are_the_same_with_a_daemon_and_without(
    cluster: ClusterOfTwo, begin: Callable[..., Daemon]
) -> None:
    alone = {words: run(cluster.root, *words) for words in COMMANDS}
    daemon = begin()
    daemon.says("no certificate")
    by_daemon = {words: run(cluster.root, *words) for words in COMMANDS}

    assert by_daemon == alone
    assert {"instance.stop", "instance.start", "uids.release", "rules.remove"} <= set(
        calls(cluster)
    )


def test_a_cluster_is_made_by_way_of_the_daemon(cluster: ClusterOfTwo, daemon: Daemon) -> None:
    status, _, errors = run(cluster.root, "cluster", "init", "--name", "site")
    assert (status, errors) == (0, "")
    assert "rules.sync" in calls(cluster) or "node.reconcile" in calls(cluster)


def test_what_a_killed_daemon_left_is_passed_by(cluster: ClusterOfTwo, daemon: Daemon) -> None:
    daemon.end(signal.SIGKILL)
    assert cluster.paths.node_socket.exists()
    assert run(cluster.root, "instance", "list", "--json") == (0, "[]\n", "")


def test_a_daemon_that_hangs_is_an_error_that_says_so(
    cluster: ClusterOfTwo, daemon: Daemon
) -> None:
    daemon.process.send_signal(signal.SIGSTOP)
    try:
        status, _, errors = run(cluster.root, "instance", "list")
    finally:
        daemon.process.send_signal(signal.SIGCONT)
    assert status == 1
    assert "does not answer" in errors
    assert "hint: " in errors
    assert run(cluster.root, "instance", "list", "--json")[0] == 0


def test_a_socket_of_somebody_elses_is_not_trusted(cluster: ClusterOfTwo) -> None:
    path = cluster.paths.node_socket
    with socket.socket(socket.AF_UNIX) as foreign:
        foreign.bind(str(path))
        foreign.listen()
        os.chown(path, 247001, 247001)
        status, _, errors = run(cluster.root, "instance", "list")
    assert (status, "belongs to uid 247001" in errors) == (1, True)
    path.unlink()


def test_a_process_of_somebody_elses_is_not_trusted(cluster: ClusterOfTwo) -> None:
    """A socket that is root's by its mode, with another uid behind it."""
    path = cluster.paths.node_socket
    foreign = socket.socket(socket.AF_UNIX)
    with foreign:
        foreign.bind(str(path))
        pid = os.fork()
        if pid == 0:
            os.setresuid(247001, 247001, 247001)
            foreign.listen()
            time.sleep(60)
            os._exit(0)
        try:
            deadline = time.monotonic() + 20
            status, _, errors = run(cluster.root, "instance", "list")
            while "is served by" not in errors and time.monotonic() < deadline:
                status, _, errors = run(cluster.root, "instance", "list")
        finally:
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)
    assert (status, "is served by uid 247001" in errors) == (1, True)
    path.unlink()


def test_nobody_but_root_is_served(cluster: ClusterOfTwo, daemon: Daemon) -> None:
    """Whatever the mode of the socket is: the kernel says who has connected."""
    path = cluster.paths.node_socket
    path.chmod(0o666)
    for directory in (cluster.root, cluster.paths.run.parent, cluster.paths.run):
        directory.chmod(0o755)
    pid = os.fork()
    if pid == 0:
        status = 9
        try:
            os.setresuid(247001, 247001, 247001)
            with socket.socket(socket.AF_UNIX) as client:
                client.settimeout(20)
                client.connect(str(path))
                status = 0 if client.recv(1) == b"" else 1
        except ConnectionResetError:
            status = 0
        finally:
            os._exit(status)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
    daemon.says("uid 247001 to the local socket was refused")


def test_the_command_line_loads_nothing_of_the_daemon_where_there_is_none() -> None:
    code = (
        "import sys; from kvmsec.cli import main, node, session;"
        "print([n for n in sys.modules if n.startswith(('kvmsec.rpc', 'kvmsec.daemon'))])"
    )
    argv = [str(KVMSEC.with_name("python")), "-c", code]
    assert subprocess.run(argv, capture_output=True, check=True, text=True).stdout == "[]\n"
