"""Starts and stops that are interrupted at every point, and QEMUs that end by themselves."""

import asyncio
import os
import random
import select
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from hypervisor import process
from hypervisor.errors import JailFailed, QemuNotFound
from hypervisor.newborn import Newborn
from hypervisor.process import QemuGone
from kvmsec.agent import InstanceState
from kvmsec.errors import NotReady, StartFailed
from kvmsec.linux import command, files, namespaces
from kvmsec.linux.errors import Fault
from kvmsec.linux.locks import FileLock
from kvmsec.node import dismantle, image_holdings, records
from kvmsec.node.launch import STEPS
from tests.root.hypervisor.jailed import wait_for_spare

pytestmark = pytest.mark.kvm

STEP_NAMES = [step.name for step in STEPS]
BRIDGE = "kvmsectest"


@pytest.fixture
def bridge(lab: Any) -> Iterator[str]:
    command.run(("ip", "link", "add", BRIDGE, "type", "bridge"), timeout_s=10)
    command.run(("ip", "link", "set", BRIDGE, "up"), timeout_s=10)
    yield BRIDGE
    command.run(("ip", "link", "del", BRIDGE), timeout_s=10)


@pytest.fixture
def machine(lab: Any, bridge: str) -> dict[str, Any]:
    """A machine that has one of everything that has to be taken back."""
    lab.note_what_is_there()
    return {"disks": [{"path": str(lab.disk())}], "nics": [{"bridge": bridge}]}


def at(step: str, act: Any) -> Any:
    def on_step(name: str) -> None:
        if name == step:
            act()

    return on_step


def kill_myself() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def interrupt_myself() -> None:
    os.kill(os.getpid(), signal.SIGINT)


def end(pid: int, by: signal.Signals = signal.SIGKILL) -> None:
    pidfd = os.pidfd_open(pid)
    try:
        os.kill(pid, by)
        assert select.select([pidfd], [], [], 30)[0]
    finally:
        os.close(pidfd)


def check_nothing_is_left(lab: Any) -> None:
    assert not lab.leftovers()
    assert not lab.instances()
    assert lab.rules() == str(lab.pool)


def test_a_launcher_that_is_killed_at_any_step_leaves_nothing_that_the_next_does_not_undo(
    lab, machine
):
    definition = lab.definition(**machine)
    for step in STEP_NAMES:
        launcher = lab.rival(lambda node: node.start(definition), on_step=at(step, kill_myself))
        assert launcher.outcome() is None, step
        lab.reconcile()
        assert not lab.leftovers(), f"killed before {step!r}"
    started = lab.start(**machine)
    assert started.uid in lab.pool
    lab.stop()
    check_nothing_is_left(lab)


def test_a_launcher_that_is_killed_between_steps_leaves_nothing_either(lab, machine):
    """At moments that nobody chose; the seed is said when it fails."""
    definition = lab.definition(**machine)
    chance = random.Random(seed := random.randrange(1 << 32))
    for _ in range(24):
        launcher = lab.rival(lambda node: node.start(definition))
        launcher.ends_within(chance.uniform(0, 0.15))
        launcher.kill()
        launcher.outcome()
        # A child that it had just forked holds its lock too, for as long as it takes to close it.
        with FileLock(lab.paths.instance_lock("web")):
            pass
        lab.reconcile()
        if finished := lab.instances():
            assert finished["web"].state == "running", f"seed {seed}"
            lab.stop()
        assert not lab.leftovers(), f"seed {seed}"
    check_nothing_is_left(lab)


def test_a_launcher_that_is_killed_while_it_has_the_lock_of_the_images_leaves_no_file(lab, machine):
    definition = lab.definition(**machine)

    async def start_until_it_says_what_is_open(node: Any) -> None:
        image_holdings.publish = lambda *_: kill_myself()
        await node.start(definition)

    launcher = lab.rival(start_until_it_says_what_is_open)
    assert launcher.outcome() is None
    assert lab.paths.images_lock.exists()
    lab.reconcile()
    assert not lab.paths.images_lock.exists()
    check_nothing_is_left(lab)


@pytest.mark.parametrize("error", [Fault("injected"), OSError(28, "injected"), KeyError("bug")])
def test_a_step_that_fails_undoes_all_before_it_at_once(lab, machine, error):
    definition = lab.definition(**machine)

    def fail() -> None:
        raise error

    async def start_in_vain(node: Any) -> None:
        lab.note_what_is_there(node)
        for step in STEP_NAMES:
            node._on_step = at(step, fail)
            with pytest.raises(Exception, match=r"injected|bug"):
                await node.start(definition)
            assert not lab.leftovers(is_node_open=True), f"failed at {step!r}"
            assert not await node.list()
        node._on_step = at("", fail)
        await node.start(definition)
        await node.stop("web", force=True)

    lab.run(start_in_vain)
    check_nothing_is_left(lab)


def test_a_child_that_can_not_be_told_its_jail_is_ended_and_collected(lab, machine, monkeypatch):
    def fail(*_: Any) -> None:
        raise JailFailed("order", 0, "injected")

    async def start_in_vain(node: Any) -> None:
        with pytest.raises(Fault, match="injected"):
            await node.start(lab.definition(**machine))
        # No zombie of it, which `leftovers` would collect.
        assert os.waitid(os.P_ALL, 0, os.WEXITED | os.WNOHANG | os.WNOWAIT) is None

    monkeypatch.setattr(Newborn, "become", fail)
    lab.run(start_in_vain)
    check_nothing_is_left(lab)


@pytest.mark.parametrize(
    ("step", "by", "words"),
    [
        ("ready", signal.SIGKILL, "QEMU killed by SIGKILL"),
        ("verify", signal.SIGKILL, "QEMU killed by SIGKILL"),
        ("verify", signal.SIGTERM, "QEMU exited with status 0"),
        ("run", signal.SIGKILL, "QEMU killed by SIGKILL"),
        ("run", signal.SIGTERM, "QEMU exited with status 0"),
    ],
)
def test_how_a_qemu_ended_is_told_whichever_step_meets_it(lab, machine, step, by, words):
    def end_it() -> None:
        record = records.load(lab.paths, "web")
        assert record is not None and record.process is not None
        end(record.process.pid, by)

    with pytest.raises(StartFailed) as failed:
        lab.run(lambda node: node.start(lab.definition(**machine)), on_step=at(step, end_it))
    assert failed.value.reason.startswith(words)
    assert "kvmsec instance log web" in str(failed.value.hint)
    assert ("terminating on signal 15" in failed.value.output) == (by == signal.SIGTERM)
    check_nothing_is_left(lab)


@pytest.mark.parametrize("held_up_at", ["child", "exec"])
def test_a_start_whose_birth_is_held_up_is_given_up_and_the_next_is_not(lab, machine, held_up_at):
    """Somebody stops what the child goes on from: before it was born, and before it is QEMU."""
    lab.configure("[uids]\nreuse_delay_s = 0\n[qemu]\nready_timeout_s = 1\n")
    definition = lab.definition(**machine)

    async def start_twice(node: Any) -> None:
        def stop_spare() -> None:
            os.kill(wait_for_spare(node.host.nursery)[-1], signal.SIGSTOP)

        node._on_step = at(held_up_at, stop_spare)
        with pytest.raises((NotReady, StartFailed), match="within 1 s"):
            await node.start(definition)
        node._on_step = at("", stop_spare)
        await node.start(definition)
        await node.stop("web", force=True)

    lab.run(start_twice)
    check_nothing_is_left(lab)


def test_a_start_that_is_cancelled_at_any_step_is_undone_or_done(lab, machine):
    definition = lab.definition(**machine)

    async def start_in_vain(node: Any) -> None:
        lab.note_what_is_there(node)
        for step in STEP_NAMES:
            start = asyncio.create_task(node.start(definition))
            node._on_step = at(step, start.cancel)
            with pytest.raises(asyncio.CancelledError):
                await start
            assert not lab.leftovers(is_node_open=True), f"cancelled at {step!r}"

    lab.run(start_in_vain)
    check_nothing_is_left(lab)


def test_a_start_that_is_cancelled_while_qemus_end_is_waited_for_is_undone(
    lab, machine, monkeypatch
):
    def seem_gone(_: Newborn) -> list[str]:
        raise QemuGone

    monkeypatch.setattr(process, "confinement_problems", seem_gone)

    async def start_in_vain(node: Any) -> None:
        loop = asyncio.get_running_loop()
        start = asyncio.create_task(node.start(lab.definition(**machine)))
        # Called no sooner than the start waits for something: for the end of a QEMU that lives.
        node._on_step = at("verify", lambda: loop.call_soon(start.cancel))
        with pytest.raises(asyncio.CancelledError):
            await start

    lab.run(start_in_vain)
    assert not lab.leftovers()
    check_nothing_is_left(lab)


def test_an_interrupt_from_the_keyboard_at_any_step_undoes_a_start(lab, machine):
    definition = lab.definition(**machine)
    for step in STEP_NAMES:
        launcher = lab.rival(
            lambda node: node.start(definition), on_step=at(step, interrupt_myself)
        )
        assert launcher.outcome()["error"] == "KeyboardInterrupt", step
        assert not lab.leftovers(), f"interrupted at {step!r}"
    check_nothing_is_left(lab)


def test_a_full_disk_at_any_step_fails_the_start_and_leaves_nothing(lab, machine):
    """One file system holds all of the root: records, sockets and logs."""
    namespaces.mount("small", str(lab.root), "tmpfs", 0, "size=2m,mode=0700")
    lab.paths.make_directories()
    lab.init()
    lab.note_what_is_there()
    definition = lab.definition(nics=machine["nics"])
    ballast = lab.root / "ballast"
    try:
        for step in STEP_NAMES:
            with pytest.raises((Fault, OSError), match="No space left"):
                lab.run(
                    lambda node: node.start(definition), on_step=at(step, lambda: fill(ballast))
                )
            assert not lab.leases(), f"full at {step!r}"
            ballast.unlink()
            assert not lab.leftovers(is_node_open=True), f"full at {step!r}"
        lab.start()
        fill(ballast)
        lab.stop()
        ballast.unlink()
        check_nothing_is_left(lab)
        lab.destroy()
    finally:
        namespaces.umount(str(lab.root), namespaces.MNT_DETACH)


def fill(path: Path) -> None:
    """Write until there is no room, not even for a small file."""
    with path.open("ab", buffering=0) as ballast:
        for size in (65536, 4096, 1):
            try:
                while True:
                    ballast.write(bytes(size))
            except OSError:
                continue


STOP_STEPS = ("_end_process", "_end_cgroup", "_keep_words", "_release_uid", "remove_files")


def test_a_stop_that_is_killed_at_any_step_is_finished_by_the_next_command(
    lab, machine, monkeypatch
):
    for step in STOP_STEPS:
        lab.start(**machine)
        with monkeypatch.context() as patched:
            patched.setattr(dismantle, step, lambda *_: kill_myself())
            stopper = lab.rival(lambda node: node.stop("web", force=True))
        assert stopper.outcome() is None, step
        assert lab.instances()["web"].state == "stopping"
        assert any("its stop was interrupted" in line for line in lab.reconcile()), step
        assert not lab.leftovers(), f"killed before {step!r}"
    check_nothing_is_left(lab)


def test_a_stop_that_is_killed_at_any_moment_is_finished_by_the_next(lab, machine):
    chance = random.Random(seed := random.randrange(1 << 32))
    for number in range(12):
        lab.start(**machine)
        force = bool(number % 2)
        stopper = lab.rival(lambda node, force=force: node.stop("web", force=force))
        stopper.ends_within(chance.uniform(0, 0.05))
        stopper.kill()
        stopper.outcome()
        if lab.instances():
            lab.stop()
        lab.reconcile()
        assert not lab.leftovers(), f"seed {seed}"
    check_nothing_is_left(lab)


def test_a_kill_in_the_middle_of_any_write_leaves_no_half_of_it(lab, machine, monkeypatch):
    """A file is written beside its place and renamed into it: the kill comes in between."""
    definition = lab.definition(**machine)
    acts = {
        "start": lambda node: node.start(definition),
        "stop": lambda node: node.stop("web", force=True),
        "reconcile": lambda node: node.reconcile(),
    }
    for act, work in acts.items():
        for number in range(1, 100):
            if act != "start":
                started = lab.start(**machine)
            if act == "reconcile":
                end(started.pid)
            countdown = iter(range(number - 1))
            rename = files._rename

            def rename_or_die(*paths, countdown=countdown, rename=rename):
                if next(countdown, None) is None:
                    kill_myself()
                rename(*paths)

            with monkeypatch.context() as patched:
                patched.setattr(files, "_rename", rename_or_die)
                killed = lab.rival(work).outcome() is None
            lab.reconcile()
            if lab.instances():
                lab.stop()
            assert not lab.leftovers(is_node_open=True), f"{act}, write {number}"
            if not killed:
                break
        assert number > 1, act
    check_nothing_is_left(lab)


def test_a_qemu_that_is_not_there_is_told_wherever_one_looks_and_leaves_nothing(lab):
    missing = lab.root / "no-qemu"

    async def start(node: Any) -> list[InstanceState]:
        heard = []

        async def listen() -> None:
            async for event in node.events():
                heard.append(event.state)

        listening = asyncio.create_task(listen())
        await asyncio.sleep(0)
        with pytest.raises(QemuNotFound, match=str(missing)) as caught:
            await node.start(lab.definition(qemu=str(missing)))
        assert "--qemu" in str(caught.value.hint)
        async with asyncio.timeout(10):
            while len(heard) < 2:
                await asyncio.sleep(0.001)
        listening.cancel()
        return heard

    assert lab.run(start) == [InstanceState.STARTING, InstanceState.STOPPED]
    assert f"tried {missing}" in lab.run(lambda node: node.log("web")).kvmsec
    assert not lab.leftovers()
