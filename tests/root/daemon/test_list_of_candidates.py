"""A list of candidates that can't be used: nobody is let in, and it is mended without a restart."""

import json
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from kvmsec.paths import Paths
from kvmsec.pki.errors import CANDIDATES_FILE
from kvmsec.rpc import messages as m
from kvmsec.rpc.errors import Refused
from tests.root.daemon.cluster_of_two import DEADLINE_S, ClusterOfTwo, Daemon
from tests.root.daemon.node_by_command import Node

pytestmark = pytest.mark.root


def empty(path: Path) -> None:
    path.write_text("")


def fill_with_garbage(path: Path) -> None:
    path.write_bytes(b"\xff\x00 no list\n")


def open_to_others(path: Path) -> None:
    path.chmod(0o644)


def remove(path: Path) -> None:
    path.unlink()


def replace_by_link(path: Path) -> None:
    path.rename(path.with_suffix(".moved"))
    path.symlink_to(path.with_suffix(".moved"))


SPOILERS = (empty, fill_with_garbage, open_to_others, remove, replace_by_link)


def put_back(path: Path, text: str) -> None:
    """As an administrator would: another file in its place, of the same size."""
    made = path.with_suffix(".copy")
    made.write_text(text)
    made.chmod(0o600)
    made.replace(path)


@pytest.mark.parametrize("spoil", SPOILERS)
def test_a_list_that_is_put_back_is_taken_up_without_a_restart(
    cluster: ClusterOfTwo, daemon: Daemon, spoil: Callable[[Path], None]
) -> None:
    path = cluster.paths.key_files / CANDIDATES_FILE
    before = path.read_text()
    cluster.ask("node.info", m.Nothing())

    spoil(path)
    with pytest.raises(Refused):  # At once, whatever the front has been told.
        cluster.ask("node.info", m.Nothing())
    time.sleep(3)  # Longer than between two looks of the daemon: by now the front knows as well.
    with pytest.raises(Refused) as raised:
        cluster.ask("node.info", m.Nothing())
    assert raised.value.evidence == {"step": "fingerprint", "list": "unusable"}

    put_back(path, before)
    deadline = time.monotonic() + DEADLINE_S
    while True:
        try:
            assert cluster.ask("node.info", m.Nothing()).name == "here"
            return
        except Refused:
            assert time.monotonic() < deadline
            time.sleep(0.05)


def test_the_master_is_told_how_a_list_is_mended(
    master: Node, bring_in: Callable[[str], Node]
) -> None:
    path = Paths(bring_in("node2").root).key_files / CANDIDATES_FILE
    fill_with_garbage(path)

    findings = json.loads(master.run("cluster", "verify", "--json").stdout)
    (one,) = [one for one in findings if (one["node"], one["severity"]) == ("node2", "error")]
    assert one["code"] == "node-refused"
    for words in (CANDIDATES_FILE, "another node's", "restart", "on node2"):
        assert words in one["hint"]

    for command in (("cluster", "sync"), ("node", "readd", "node2")):
        told = master.run(*command)
        assert told.returncode == 1
        for words in ("node2", CANDIDATES_FILE, "another node's", "restart"):
            assert words in told.stderr

    put_back(path, (Paths(master.root).key_files / CANDIDATES_FILE).read_text())
    deadline = time.monotonic() + DEADLINE_S
    while master.run("cluster", "sync").returncode != 0:
        assert time.monotonic() < deadline
    assert master.codes() == set()
