"""Certificates by commands, real daemons and couriers: renewed, killed, and done without."""

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from kvmsec.paths import Paths
from kvmsec.pki.certificates import anchors_of, fingerprint_of, load_certificate
from kvmsec.pki.files import KeyFiles
from kvmsec.pki.keys import KeyKind, kind_of
from tests.root.daemon.node_by_command import Node

pytestmark = pytest.mark.root

ROOT = Path(__file__).parents[3]
RENEW = ("--new-node-certificates",)


def keys_of(node: Node) -> KeyFiles:
    return KeyFiles(Paths(node.root).key_files)


def shown(node: Node) -> str:
    return fingerprint_of(keys_of(node).own().certificate_pem)


def warnings(node: Node) -> set[tuple[str, str]]:
    found = json.loads(node.run("cluster", "verify", "--json").stdout)
    return {(one["node"], one["code"]) for one in found if one["severity"] == "warning"}


def killed_at_each_step(node: Node, begin: list[str], go_on: list[str]) -> Any:
    """Run a command that is killed at each of its steps in turn, and is gone on with."""
    argv = [sys.executable, "-m", "tests.root.daemon.killed_command", str(node.root)]
    done = subprocess.run(
        [*argv, *begin, "--", *go_on],
        capture_output=True,
        text=True,
        timeout=600,
        check=True,
        cwd=ROOT,
    )
    return json.loads(done.stdout)


def test_a_renewal_that_is_killed_at_each_of_its_steps_is_gone_on_with(
    master: Node, bring_in: Callable[[str], Node]
) -> None:
    other = bring_in("node2")
    master.do("node", "promote", "node2")
    before = {shown(master), shown(other)}
    wish = ["--new-cluster-certificate", "--key-kind", "p256"]

    done = killed_at_each_step(
        master, ["cluster", "renew-crypto", *wish], ["cluster", "renew-crypto"]
    )

    assert done["status"] == 0, done
    assert {"state", "state kept", "the end"} <= set(done["steps"])
    for what in ("prepare", "commit", "finish"):
        assert {f"{what} node2", f"{what} node2: done"} <= set(done["steps"]), done
    assert not before & {shown(master), shown(other)}
    for node in (master, other):
        assert len(anchors_of(keys_of(node).anchors())) == 1
        key = load_certificate(keys_of(node).own().certificate_pem).public_key()
        assert kind_of(key) is KeyKind.P256  # type: ignore[arg-type]
    assert keys_of(master).anchors() == keys_of(other).anchors()
    assert master.codes() == set() == other.codes()


def test_a_node_that_was_away_catches_up_by_itself(
    master: Node, bring_in: Callable[[str], Node]
) -> None:
    other, away = bring_in("node2"), bring_in("node3")
    assert away.daemon is not None and master.daemon is not None
    away.daemon.end()
    before = shown(away)

    renewed = master.run("cluster", "renew-crypto", "--new-cluster-certificate")
    assert renewed.returncode == 1 and "node3 is behind" in renewed.stderr
    assert master.codes() == {("node3", "node-silent")}
    assert ("node3", "renewal-pending") in warnings(master)
    for words in (["promote", "node2"], ["readd", "node2"], ["demote", "node2"]):
        refused = master.run("node", *words)
        assert refused.returncode == 1
        assert "a renewal is under way; it waits for node3" in refused.stderr

    master.daemon.end()
    away.serve()
    away.daemon.says("serving other nodes")
    assert ("node3", "node-refused") in master.codes()
    master.serve()
    master.daemon.says("every node has its new certificate")
    assert shown(away) != before
    assert keys_of(away).anchors() == keys_of(master).anchors() == keys_of(other).anchors()
    assert master.codes() == set()
    assert "renewal-pending" not in {code for _, code in warnings(master)}
    master.do("node", "promote", "node2")


def test_sync_lets_a_node_catch_up(master: Node, bring_in: Callable[[str], Node]) -> None:
    bring_in("node2")
    away = bring_in("node3")
    assert away.daemon is not None and master.daemon is not None
    away.daemon.end()
    renewed = master.run("cluster", "renew-crypto", "--new-node-certificates")
    assert renewed.returncode == 1

    master.daemon.end()  # which would see to it by itself
    away.serve()
    away.daemon.says("serving other nodes")
    master.do("cluster", "sync")
    assert not Paths(master.root).renewal.exists()
    assert master.codes() == set()


def break_list(node: Node) -> None:
    """Nobody but the node itself may order on it: the master is kept out."""
    state = node.state()
    (uuid,) = (one["uuid"] for one in state["nodes"] if one["name"] == "node2")
    path = Paths(node.root).key_files / "ssconf_master_candidates_certs"
    path.write_text(f"{uuid}={shown(node)}\n")


def lose_own_pair(node: Node) -> None:
    (Paths(node.root).key_files / "client.pem").unlink()


def lose_anchor(node: Node) -> None:
    (Paths(node.root).key_files / "server.pem").write_text("broken")


@pytest.mark.parametrize("spoil", [break_list, lose_own_pair, lose_anchor])
def test_the_last_resort_reaches_a_node_whose_files_are_broken(
    master: Node, bring_in: Callable[[str], Node], spoil: Callable[[Node], None]
) -> None:
    other = bring_in("node2")
    said = master.do("cluster", "certless", "enable", "--for", "10m")
    assert said.startswith("2 nodes run without client certificates until ")
    assert {("node2", "certless"), (master.state()["master"], "certless")} <= warnings(master)
    own = shown(other)

    spoil(other)
    assert other.daemon is not None
    other.daemon.end()
    other.serve()
    other.daemon.says("serving other nodes")
    codes = {code for name, code in master.codes() if name == "node2"}
    assert not codes & {"node-silent", "node-refused"}, codes
    master.do("node", "readd", "node2")
    master.do("cluster", "renew-crypto", "--node", "node2")
    assert shown(other) != own

    master.do("cluster", "certless", "disable")
    assert not master.has("certless.pem") and not other.has("certless.pem")
    assert master.codes() == set()
    assert not {code for _, code in warnings(master)} & {"certless", "certless-missing"}


def test_a_master_that_lost_its_pair_gets_another_by_the_last_resort(
    master: Node, bring_in: Callable[[str], Node]
) -> None:
    bring_in("node2")
    own = shown(master)
    master.do("cluster", "certless", "enable", "--for", "10m")

    lose_own_pair(master)
    assert "client.pem is missing" in master.do("cluster", "renew-crypto", "--dry-run", *RENEW)
    master.do("cluster", "renew-crypto", *RENEW)

    assert shown(master) != own
    master.do("cluster", "certless", "disable")
    assert master.codes() == set()


def test_a_node_without_the_common_pair_is_told_of_and_gets_it_by_hand(
    master: Node, bring_in: Callable[[str], Node], tmp_path: Path
) -> None:
    other = bring_in("node2")
    master.do("node", "promote", "node2")
    assert other.daemon is not None
    other.daemon.end()
    bundle = tmp_path / "bundle"
    handed = master.run("cluster", "certless", "enable", "--for", "10m", "--bundle", str(bundle))
    assert handed.returncode == 1 and "node2 does not have it" in handed.stderr
    (line,) = (one for one in handed.stderr.splitlines() if one.startswith("passphrase"))
    passphrase = line.partition(": ")[2]

    other.serve()
    other.daemon.says("serving other nodes")
    master.do("cluster", "sync")
    # Each shows its own pair first: a candidate without the common one is not shut out.
    assert master.codes() == set() == other.codes()
    assert ("node2", "certless-missing") in warnings(master)

    assert other.run("node", "certless", str(bundle), given="another passphrase\n").returncode == 1
    other.do("node", "certless", str(bundle), given=f"{passphrase}\n")
    assert ("node2", "certless") in warnings(master)
    shown_here = json.loads(other.do("cluster", "certless", "show", "--json"))
    assert shown_here == json.loads(master.do("cluster", "certless", "show", "--json"))

    (Paths(other.root).key_files / "certless.pem").write_text("broken")
    assert ("node2", "certless-missing") in warnings(master)
    other.daemon.end()
    other.serve()
    other.daemon.says("certless.pem was removed: it can't be used")
    assert not other.has("certless.pem")
    assert master.codes() == set()
