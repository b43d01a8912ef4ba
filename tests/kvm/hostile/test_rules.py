"""The packet rules of instances: proved before each start, mended where someone broke them."""

import socket
import subprocess
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from kvmsec.errors import StartFailed
from kvmsec.linux.children import run_in_child
from kvmsec.linux.credentials import Credentials
from kvmsec.model.security import SecurityModel
from uidpool.ranges import EMPTY

pytestmark = pytest.mark.kvm

WITHOUT_REST = "[uids]\nreuse_delay_s = 0\n"
BACKENDS = ("nftables", "iptables")


def sh(command: str) -> str:
    done = subprocess.run(command.split(), capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"{command}: {done.stderr}"
    return done.stdout


@pytest.fixture(params=BACKENDS)
def place(request: pytest.FixtureRequest, make_place: Callable[[str], Any]) -> Iterator[Any]:
    """A node that is told which backend to take; rules beside kvmsec's own go afterwards."""
    yield make_place(f'[firewall]\nbackend = "{request.param}"\n{WITHOUT_REST}')
    for tool in ("iptables-legacy", "ip6tables-legacy"):
        while "-A OUTPUT -j ACCEPT" in sh(f"{tool} -S OUTPUT"):
            sh(f"{tool} -D OUTPUT -j ACCEPT")


def backend(place: Any) -> str:
    return str(place.lab.run(lambda node: node.show_rules())["backend"])


def break_rules(place: Any, how: str) -> None:
    """Do to the rules what another tool or an admin might."""
    tag = place.lab.paths.tag
    if backend(place) == "nftables":
        table = f"inet {tag}"
        sh(
            {
                "gone": f"nft delete table {table}",
                "flushed": f"nft flush chain {table} output",
                "accept in front": f"nft insert rule {table} output accept",
            }[how]
        )
        return
    for tool in ("iptables-legacy", "ip6tables-legacy"):
        sh(
            {
                "gone": f"{tool} -F OUTPUT",
                "flushed": f"{tool} -F",
                "accept in front": f"{tool} -I OUTPUT -j ACCEPT",
            }[how]
        )


def sends(uid: int) -> bool:
    """Whether a packet of this uid leaves its socket."""

    def send() -> bool:
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sender:
            try:
                sender.sendto(b"x", ("127.0.0.1", 9))
            except PermissionError:
                return False
        return True

    who = Credentials(uid, uid)
    return bool(run_in_child(send, what="sending", timeout_s=20, credentials=who))


@pytest.mark.parametrize("how", ["gone", "flushed", "accept in front"])
def test_a_start_puts_back_what_someone_broke(place: Any, how: str) -> None:
    break_rules(place, how)
    assert sends(245000)
    uid = place.lab.start().uid
    assert not sends(uid)
    assert place.kvmsec("firewall", "verify").status == 0
    place.lab.stop()


def test_rules_that_another_firewall_hides_are_no_proof(place: Any) -> None:
    sh("nft add table inet other")
    sh("nft add chain inet other out { type filter hook output priority -400 ; }")
    sh("nft add rule inet other out meta skuid 245000-245999 drop")
    try:
        error = place.refused(StartFailed)
    finally:
        sh("nft delete table inet other")
    assert "drop counter" in error.message
    assert "another firewall" in error.hint
    place.lab.start()
    place.lab.stop()


def test_the_user_of_the_model_user_is_under_the_rules_while_it_has_an_instance(
    place: Any,
) -> None:
    security = {"security_model": "user", "security_domain": place.lab.domain}
    before = place.lab.rules()
    place.lab.start("one", **security)
    place.lab.start("two", **security)
    assert not sends(place.lab.domain_uid)
    place.lab.stop("one")
    assert not sends(place.lab.domain_uid)
    place.lab.stop("two")
    assert place.lab.rules() == before
    assert sends(place.lab.domain_uid)


def test_the_model_none_needs_no_rules_and_makes_none(place: Any) -> None:
    place.lab.modify(security_model=SecurityModel.NONE, uid_pool=EMPTY)
    place.lab.start()
    assert backend(place) == "None"
    place.lab.stop()


def test_rules_are_not_removed_from_over_an_instance_unless_by_force(place: Any) -> None:
    uid = place.lab.start().uid
    place.kvmsec("firewall", "remove").refused("instances are running: web")
    assert not sends(uid)
    done = place.kvmsec("firewall", "remove", "--force")
    assert (done.status, done.err) == (0, "")
    assert backend(place) == "None"
    assert sends(uid)
    other = place.lab.start("other").uid
    assert not sends(uid) and not sends(other)
    place.lab.stop("web")
    place.lab.stop("other")


def test_a_switch_of_backends_removes_the_others_rules(place: Any) -> None:
    before = backend(place)
    (after,) = set(BACKENDS) - {before}
    place.lab.configure(f'[firewall]\nbackend = "{after}"\n{WITHOUT_REST}')
    uid = place.lab.start().uid
    applied = place.kvmsec("firewall", "apply")
    assert (applied.status, applied.err) == (0, "")
    assert backend(place) == after
    assert not sends(uid)
    assert place.kvmsec("firewall", "verify").status == 0
    place.lab.stop()
