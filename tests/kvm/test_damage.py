"""A node whose files or rules were damaged: what runs can be ended, and nothing is let go."""

import os
import signal
from collections.abc import Iterator
from typing import Any

import pytest

from kvmsec.agent import InstanceState
from kvmsec.errors import BadConfig, StartFailed, StoreUnreadable
from kvmsec.linux import command
from kvmsec.linux.processes import boot_id
from uidpool.errors import UidHeld
from uidpool.ranges import UidRanges

pytestmark = pytest.mark.kvm

USER: dict[str, Any] = {"security_model": "user", "security_domain": "guestkeeper"}
PLAIN_UID = 246100


@pytest.fixture
def plain_user() -> Iterator[str]:
    """A user that is fit for a pool and for a domain alike."""
    line = f'u plainuser {PLAIN_UID} "anybody" / /usr/sbin/nologin\n'
    command.run(["systemd-sysusers", "-"], input=line.encode(), timeout_s=30)
    yield "plainuser"
    command.run(["userdel", "plainuser"], timeout_s=30)


def test_a_user_whose_uid_another_root_has_drawn_is_refused(make_lab, plain_user):
    """Under `pool` a stop ends everything of the uid, whoever started it."""
    first, second = make_lab(uid_pool=UidRanges.of((PLAIN_UID, PLAIN_UID))), make_lab()
    assert first.start("held").uid == PLAIN_UID

    with pytest.raises(UidHeld) as caught:
        second.start("guest", security_model="user", security_domain=plain_user)

    assert "held" in caught.value.message
    first.stop("held")


def test_rules_that_were_being_changed_are_settled_by_the_next_command(lab):
    """A launcher that is killed while the rules change leaves a note that no policy has."""
    lab.start("web", **USER)

    async def stop_and_die(node: Any) -> None:
        kind = type(node.host.rules.firewall)
        apply = kind.apply

        def apply_and_die(firewall: Any, policy: Any) -> None:
            os.kill(os.getpid(), signal.SIGKILL)
            apply(firewall, policy)

        kind.apply = apply_and_die  # in this process alone
        await node.stop("web", force=True)

    rival = lab.rival(stop_and_die)
    assert rival.ends_within(30)
    assert rival.outcome() is None
    lab.reconcile()
    assert lab.rules() == str(lab.pool)


@pytest.mark.parametrize("what", ["config", "cluster"])
def test_an_instance_can_be_ended_on_a_damaged_node(lab, what):
    lab.start("web")
    path = getattr(lab.paths, what)
    before = path.read_bytes() if path.exists() else None
    path.write_text("[firewall\n")
    path.chmod(0o600)

    try:
        with pytest.raises((BadConfig, StoreUnreadable)):
            lab.start("db")
        assert lab.stop("web").state is InstanceState.STOPPED
    finally:
        path.unlink() if before is None else path.write_bytes(before)


def test_no_pid_is_shown_that_is_not_the_instances(lab):
    started = lab.start("web")
    record = lab.paths.instance("web").record
    boot = started.details["generation"]
    good = record.read_bytes()
    record.write_bytes(good.replace(boot_id().encode(), b"another-boot"))
    seen = lab.instances()["web"]
    assert (seen.state, seen.reason) == (InstanceState.STOPPED, "host rebooted")
    assert (seen.pid, seen.started_at) == (None, None)
    record.write_bytes(good)
    assert lab.instances()["web"].details["generation"] == boot
    lab.stop("web")


def test_what_qemu_says_can_steer_no_terminal_through_an_error() -> None:
    error = StartFailed("web", "QEMU exited with status 1", output="no \x1b[31mluck\r\nnext")

    assert "\x1b" not in error.message and "\r" not in error.message
    assert error.message.splitlines()[1:] == [r"no \x1b[31mluck", "next"]
    assert error.output == "no \x1b[31mluck\r\nnext"
