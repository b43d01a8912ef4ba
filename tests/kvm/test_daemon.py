"""A real daemon and real guests: who lives on without whom, and what is told of an end."""

import asyncio
import json
import os
import select
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from hypervisor import tiny
from kvmsec.agent import InstanceState
from kvmsec.daemon.reaching import reach
from tests.kvm.lab import Lab
from tests.root.daemon.cluster_of_two import KVMSEC, Daemon

pytestmark = pytest.mark.kvm

DEADLINE_S = 30.0


@pytest.fixture
def begin(lab: Lab) -> Iterator[Callable[[], Daemon]]:
    begun: list[Daemon] = []

    def start() -> Daemon:
        begun.append(Daemon(lab.root))
        begun[-1].says("only this host is served")
        return begun[-1]

    yield start
    for one in begun:
        one.close()


def command(lab: Lab, *words: str, **options: Any) -> "subprocess.Popen[str]":
    argv = [str(KVMSEC), "--root", str(lab.root), *words]
    pipe = subprocess.PIPE
    return subprocess.Popen(argv, stdout=pipe, stderr=pipe, text=True, **options)


def run(lab: Lab, *words: str) -> tuple[int, str, str]:
    process = command(lab, *words)
    told, errors = process.communicate(timeout=2 * DEADLINE_S)
    return process.returncode, told, errors


def start(lab: Lab, name: str = "web") -> None:
    words = ("--memory", "1", "--firmware", str(tiny.rom_path()), "--accel", lab.accelerator)
    status, _, errors = run(lab, "instance", "start", name, *words)
    assert status == 0, errors


def kill(pid: int) -> None:
    pidfd = os.pidfd_open(pid)
    try:
        os.kill(pid, signal.SIGKILL)
        assert select.select([pidfd], [], [], DEADLINE_S)[0]
    finally:
        os.close(pidfd)


def pause(lab: Lab) -> int:
    """Have the instance's QEMU hear nothing, so that a stop takes as long as it may."""
    pid: int = lab.instances()["web"].pid
    os.kill(pid, signal.SIGSTOP)
    return pid


def is_gone(lab: Lab, name: str = "web") -> bool:
    """Whether everything of an instance is taken back before the deadline."""
    deadline = time.monotonic() + DEADLINE_S
    while lab.paths.instance(name).directory.exists() and time.monotonic() < deadline:
        time.sleep(0.01)
    return not lab.paths.instance(name).directory.exists()


def test_an_instance_of_the_daemons_outlives_it_and_is_found_again(
    lab: Lab, begin: Callable[[], Daemon]
) -> None:
    first = begin()
    start(lab)
    pid = lab.instances()["web"].pid
    first.end(signal.SIGKILL)
    assert lab.instances()["web"].pid == pid

    second = begin()
    second.says("1 running instances found")
    kill(pid)
    second.says("instance web crashed: ")
    assert is_gone(lab)
    assert lab.instances()["web"].state is InstanceState.CRASHED


def test_it_lives_on_through_an_orderly_end_of_the_daemon(
    lab: Lab, begin: Callable[[], Daemon]
) -> None:
    daemon = begin()
    start(lab)
    pid = lab.instances()["web"].pid
    assert daemon.end(signal.SIGTERM) == 0
    assert lab.instances()["web"].pid == pid
    lab.stop()


def test_what_died_without_a_daemon_is_told_by_the_next_one(
    lab: Lab, begin: Callable[[], Daemon]
) -> None:
    first = begin()
    start(lab)
    pid = lab.instances()["web"].pid
    first.end(signal.SIGKILL)
    kill(pid)

    second = begin()
    second.says("instance web crashed: ")
    assert is_gone(lab)
    status, told, _ = run(lab, "instance", "list")
    assert status == 0
    assert "crashed" in told


def test_an_end_is_an_event_for_who_listens_to_the_daemon(
    lab: Lab, begin: Callable[[], Daemon]
) -> None:
    begin()
    start(lab)

    async def listen() -> list[tuple[str, InstanceState]]:
        node = await reach(lab.paths.node_socket)
        assert node is not None
        heard = []
        try:
            events = node.events()
            waiting = asyncio.ensure_future(anext(events))
            await asyncio.sleep(0.2)
            kill((await node.info("web")).pid or 0)
            async with asyncio.timeout(DEADLINE_S):
                event = await waiting
                heard.append((event.instance, event.state))
        finally:
            await node.close()
        return heard

    assert asyncio.run(listen()) == [("web", InstanceState.CRASHED)]


def test_an_order_that_is_under_way_ends_before_the_daemon_does(
    lab: Lab, begin: Callable[[], Daemon]
) -> None:
    daemon = begin()
    start(lab)
    pause(lab)
    stopping = command(lab, "instance", "stop", "web", "--timeout", "2")
    deadline = time.monotonic() + DEADLINE_S
    while not _is_begun(lab, "instance.stop") and time.monotonic() < deadline:
        time.sleep(0.01)
    daemon.process.send_signal(signal.SIGTERM)

    told, errors = stopping.communicate(timeout=DEADLINE_S)
    assert (stopping.returncode, errors) == (0, "")
    assert told.startswith("web stopped")
    assert daemon.process.wait(DEADLINE_S) == 0
    assert is_gone(lab)


def _is_begun(lab: Lab, call: str) -> bool:
    orders = lab.paths.orders
    return orders.exists() and f'"call": "{call}"' in orders.read_text()


def test_a_command_that_is_interrupted_takes_its_order_back(
    lab: Lab, begin: Callable[[], Daemon]
) -> None:
    begin()
    start(lab)
    pid = pause(lab)
    stopping = command(lab, "instance", "stop", "web", "--timeout", "600")
    deadline = time.monotonic() + DEADLINE_S
    while not _is_begun(lab, "instance.stop") and time.monotonic() < deadline:
        time.sleep(0.01)
    stopping.send_signal(signal.SIGINT)

    _, errors = stopping.communicate(timeout=DEADLINE_S)
    assert stopping.returncode == 130, errors
    assert "interrupted" in errors
    # Nobody works on it any more, whatever became of the guest.
    status, _, errors = run(lab, "instance", "stop", "web", "--force")
    assert (status, errors) == (0, "")
    assert not os.path.exists(f"/proc/{pid}")


def test_doctor_boots_its_guest_in_the_daemon_as_in_a_command(
    lab: Lab, begin: Callable[[], Daemon]
) -> None:
    begin()
    start(lab)
    _, told, errors = run(lab, "doctor", "--json")
    found = {one["code"]: one["message"] for one in json.loads(told)}
    assert "booted" in found[lab.accelerator], (found, errors)
    lab.stop()
