"""An instance that runs and means harm: what it can reach, and that its end is an end."""

import asyncio
import ctypes
import json
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from hypervisor.jail import SECCOMP
from kvmsec.agent import InstanceState
from kvmsec.linux import unix_sockets
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


@pytest.mark.parametrize("behaviour", ["passes", "mute"])
def test_nor_is_anybody_held_up_by_what_it_passes_where_the_kernel_can_not_refuse_that(
    place: Any, stand_ins: Path, monkeypatch: pytest.MonkeyPatch, behaviour: str
) -> None:
    """Seccomp keeps it from a descriptor that takes an hour to close: it is left out here."""
    monkeypatch.setattr(unix_sockets, "_refuse_descriptors", lambda _: False)
    definition = place.lab.definition(behaviour, qemu=str(stand_ins / "taken-over"))
    without = frozenset({SECCOMP})
    place.lab.run(lambda node: node.start(definition), without_locks=without)
    began = time.monotonic()
    place.lab.stop(behaviour, force=False, timeout_s=1)
    assert time.monotonic() - began < 5
    assert not place.lab.leftovers()


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


def test_a_line_that_it_holds_shut_keeps_nobody_waiting(place: Any, start: Start) -> None:
    """The stand-in never takes a call on its serial line: the first one waits in the queue."""
    start("serves")
    place.kvmsec("instance", "console", "serves").refused("takes nobody else")
    place.lab.stop("serves")


# What its uid has outside ------------------------------------------------------------------------


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
