"""An instance that runs and means harm: what it can reach, and that its end is an end."""

import asyncio
import ctypes
import json
import os
import select
import signal
import socket
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from hypervisor.jail import SECCOMP
from kvmsec.agent import InstanceState
from kvmsec.linux import command
from kvmsec.linux.children import run_in_child
from kvmsec.linux.credentials import Credentials
from uidpool import usage

pytestmark = pytest.mark.kvm

libc = ctypes.CDLL(None, use_errno=True)
Start = Callable[..., Any]


@pytest.fixture
def start(place: Any, stand_ins: Path) -> Start:
    """Starts an instance whose stand-in for QEMU behaves as its name says."""

    def run(name: str, **machine: Any) -> Any:
        return place.lab.start(name, qemu=str(stand_ins / "qemu"), **machine)

    return run


# Its output --------------------------------------------------------------------------------------


@pytest.mark.parametrize("behaviour", ["links", "fifos", "directories", "sockets", "giant"])
def test_what_stands_in_its_logs_place_leads_nowhere(
    place: Any, start: Start, behaviour: str
) -> None:
    start(behaviour)
    told = place.kvmsec("instance", "log", behaviour)
    assert (told.status, told.err) == (0, "")
    assert "root:" not in told.out, "what only root can read is not shown"
    assert len(told.out) < 1 << 20
    place.lab.stop(behaviour)
    kept = place.lab.paths.instance_output(behaviour)
    assert b"root:" not in kept.read_bytes()
    assert kept.stat().st_size <= 2 << 20


def test_an_instance_that_fills_its_output_fills_nothing_else(place: Any, start: Start) -> None:
    before = os.statvfs(place.lab.root)
    start("fills")
    after = os.statvfs(place.lab.root)
    assert (before.f_bfree - after.f_bfree) * before.f_frsize < 256 * 1024
    (output,) = {line.split()[1] for line in place.lab._mounts() if "fills" in line}
    assert os.statvfs(output).f_bfree == 0
    place.lab.stop("fills")


# What it can reach -------------------------------------------------------------------------------


def test_nothing_of_the_node_can_be_opened_made_or_sent_to(place: Any, start: Start) -> None:
    start("explores")
    said = place.lab.run(lambda node: node.log("explores")).qemu
    found = dict(line.rsplit(": ", 1) for line in said.splitlines())
    place.lab.stop("explores")
    done = {act for act, result in found.items() if result == "done"}
    ours = {"open ..", "create /output/made", "own bytes as a program"}
    assert done - {"open /dev/kvm"} == ours
    assert found["open /etc/shadow"] == "No such file or directory"
    assert found["create /usr/made"] in ("Read-only file system", "No such file or directory")
    assert found["send to loopback"] == "Network is unreachable"
    ended = ("mount", "chroot", "become root", "a second program")
    assert {found[act] for act in ended} == {"Bad system call"}
    refused = "Address family not supported by protocol"
    assert (found["packet socket"], found["vsock socket"]) == (refused, refused)


# Its end -----------------------------------------------------------------------------------------


def test_a_guest_that_heeds_its_power_button_ends_by_itself(place: Any, start: Start) -> None:
    start("serves")
    assert place.lab.stop("serves", force=False, timeout_s=30).reason == "powered down"


@pytest.mark.parametrize(
    ("behaviour", "reason"),
    [
        ("deaf", "killed: the guest did not power down within 0.3 s"),
        ("goes-silent", "killed: QEMU's monitor did not "),
        ("floods-later", "killed: QEMU's monitor did not "),
    ],
)
def test_one_that_does_not_is_killed_in_time(
    place: Any, start: Start, behaviour: str, reason: str
) -> None:
    start(behaviour)
    assert reason in place.lab.stop(behaviour, force=False, timeout_s=0.3).reason


def crash_of(place: Any, stand_ins: Path, name: str) -> str:
    """Start one that crashes; gives the reason that whoever listens is told."""
    definition = place.lab.definition(name, qemu=str(stand_ins / "qemu"))

    async def see_it(node: Any) -> str:
        events = node.events()
        async with asyncio.timeout(30):
            heard = asyncio.ensure_future(anext(events))
            await node.start(definition)
            while (event := await heard).state is not InstanceState.CRASHED:
                heard = asyncio.ensure_future(anext(events))
        await events.aclose()
        return str(event.reason)

    return str(place.lab.run(see_it))


def test_a_forbidden_call_is_the_end_and_told_as_what_it_is(place: Any, stand_ins: Path) -> None:
    reason = crash_of(place, stand_ins, "mounts")
    assert "killed by SIGSYS: it made a system call that only a QEMU which somebody" in reason
    place.lab.stop("mounts")


def test_a_crash_is_told_with_the_last_words(place: Any, stand_ins: Path) -> None:
    assert "killed by SIGSEGV" in crash_of(place, stand_ins, "crashes")
    found = place.lab.instances()["crashes"]
    assert found.state is InstanceState.CRASHED
    assert "the guest won" in found.details["last_words"]
    place.lab.stop("crashes")
    assert place.lab.instances() == {}


def test_children_that_nobody_waits_for_end_with_it(place: Any, start: Start) -> None:
    info = start("children")
    assert "children: done" in place.lab.run(lambda node: node.log("children")).qemu
    assert len(usage.inspect(info.uid).processes) > 20
    place.lab.stop("children")
    assert usage.inspect(info.uid).is_clean


def test_a_line_that_it_holds_shut_keeps_nobody_waiting(place: Any, start: Start) -> None:
    """The stand-in never takes a call on its serial line: the first one waits in the queue."""
    start("serves")
    place.kvmsec("instance", "console", "serves").refused("takes nobody else")
    place.lab.stop("serves")


@pytest.fixture
def bridge() -> Iterator[str]:
    name = "brhostile"
    command.run(("ip", "link", "add", name, "type", "bridge"), timeout_s=10)
    yield name
    command.run(("ip", "link", "del", name), timeout_s=10)


def test_a_tap_that_it_made_last_goes_all_the_same(
    bridge: str, place: Any, stand_ins: Path
) -> None:
    """Where seccomp lets it: that refuses it first (tests/attacks, `persist-tap`)."""
    qemu = str(stand_ins / "qemu")
    definition = place.lab.definition("keeps-tap", qemu=qemu, nics=[{"bridge": bridge}])
    without = frozenset({SECCOMP})
    info = place.lab.run(lambda node: node.start(definition), without_locks=without)
    (tap,) = info.details["taps"]
    assert "persist: done" in place.lab.run(lambda node: node.log("keeps-tap")).qemu
    pidfd = os.pidfd_open(info.pid)
    signal.pidfd_send_signal(pidfd, signal.SIGKILL)
    assert select.select([pidfd], [], [], 30)[0]
    os.close(pidfd)
    socket.if_nametoindex(tap)  # Its holder is gone, and it is not.
    place.lab.reconcile()
    with pytest.raises(OSError, match="no interface"):
        socket.if_nametoindex(tap)


# What its uid has outside ------------------------------------------------------------------------


def plant(uid: int) -> None:
    """Everything that a uid can leave on a node, as if the instance had got out of its jail."""
    files = [Path(place, f"left-{uid}") for place in ("/tmp", "/var/tmp", "/dev/shm", "/run/lock")]

    def leave() -> None:
        for file in files:
            file.write_text("still here")
        segment = libc.shmget(0x246, 4096, 0o1600)  # IPC_CREAT
        queue = libc.mq_open(b"/left", os.O_RDWR | os.O_CREAT, 0o600, None)
        # syscall(SYS_add_key, type, description, payload, size, KEY_SPEC_USER_KEYRING)
        key = libc.syscall(248, b"user", b"left", b"x", 1, -4)
        if min(segment, queue, key) < 0:
            raise OSError(ctypes.get_errno(), "could not be left")
        if os.fork() == 0:
            os.setsid()
            for number in signal.valid_signals() - {signal.SIGKILL, signal.SIGSTOP}:
                signal.signal(number, signal.SIG_IGN) if number not in (32, 33) else None
            os.closerange(3, 64)
            while True:
                signal.pause()

    run_in_child(leave, what="leaving", timeout_s=20, credentials=Credentials(uid, uid))


def test_all_that_the_uid_left_on_the_node_goes_with_the_instance(place: Any, start: Start) -> None:
    info = start("serves")
    plant(info.uid)
    found = usage.inspect(info.uid)
    assert len(found.processes) == 2 and found.ipc and found.keys and found.file_count >= 4
    assert place.lab.stop("serves").reason == "killed, as asked"
    assert usage.inspect(info.uid).is_clean


def test_what_can_not_be_cleaned_keeps_the_uid_from_being_drawn(place: Any, start: Start) -> None:
    info = start("serves")
    held = Path(f"/tmp/held-{info.uid}")
    held.mkdir()
    (held / "somebody else's").touch()
    os.chown(held, info.uid, info.uid)
    reason = place.lab.stop("serves").reason
    assert f"uid {info.uid} is quarantined" in reason
    assert str(held) in reason
    (listed,) = json.loads(place.kvmsec("uids", "list", "--json").out)
    assert (listed["uid"], listed["state"]) == (info.uid, "quarantined")
    assert str(held) in listed["reason"]
    place.kvmsec("uids", "release", str(info.uid)).refused(str(held))
    (held / "somebody else's").unlink()
    released = place.kvmsec("uids", "release", str(info.uid))
    assert (released.status, released.err) == (0, "")
    assert usage.inspect(info.uid).is_clean
    assert not held.exists()
