"""Two roots of kvmsec on one host share what is the kernel's, and touch nothing of each other's."""

import asyncio
import os
import select
import shutil
import signal
import subprocess
from typing import Any

import pytest

from kvmsec.agent import InstanceState
from kvmsec.node import output
from kvmsec.node.images_in_use import ImageInUse
from uidpool.errors import PoolExhausted
from uidpool.ranges import UidRanges

pytestmark = pytest.mark.kvm

SHARED = UidRanges.parse("245000-245005")


@pytest.fixture
def roots(make_lab: Any) -> tuple[Any, Any]:
    return make_lab(uid_pool=SHARED), make_lab(uid_pool=SHARED)


def test_two_roots_never_draw_one_uid_twice_and_an_exhausted_pool_counts_both(roots):
    first, second = roots
    rivals = [
        root.rival(lambda node, root=root: start_three(node, root))
        for root in roots
    ]  # fmt: skip
    assert [rival.outcome() for rival in rivals] == [{"value": None}] * 2
    # The same names in both: an instance is its root's.
    held = [one.uid for root in roots for one in root.instances().values()]
    assert sorted(held) == [*SHARED]
    for root in roots:
        with pytest.raises(PoolExhausted) as caught:
            root.start("onemore")
        assert (caught.value.size, caught.value.leased) == (6, 6)
        assert len(root.leases()) == 3
        root.reconcile()
    assert {one.state for root in roots for one in root.instances().values()} == {
        InstanceState.RUNNING
    }
    uid = first.instances()["vm0"].uid
    first.stop("vm0")
    states = {one.uid: one.state for one in second.run(lambda node: node.uid_states())}
    assert states[uid] == "resting", "a rest counts for all"
    for root in roots:
        for name in root.instances():
            root.stop(name)


async def start_three(node: Any, root: Any) -> None:
    await asyncio.gather(*(node.start(root.definition(f"vm{number}")) for number in range(3)))


def test_a_root_that_ends_or_puts_right_leaves_the_other_as_it_is(roots):
    first, second = roots
    assert first.paths.tag != second.paths.tag
    theirs = second.start()
    launcher = first.rival(lambda node: node.start(first.definition()))
    assert "error" not in launcher.outcome()
    launcher = first.rival(lambda node: node.start(first.definition("died")), on_step=die_at_ready)
    assert launcher.outcome() is None
    assert second.reconcile() == (), "what another root left is that root's to put right"
    assert len(first.leases()) == 2
    assert len(first.reconcile()) == 1
    first.stop()
    assert not first.leases() and not first.groups() and not first.instances()
    first.run(lambda node: node.remove_rules())
    assert (first.rules(), second.rules()) == ("", str(SHARED))
    first.destroy()
    assert second.instances()["web"].pid == theirs.pid
    assert {one.severity for one in second.run(lambda node: node.verify_rules())} == {"ok"}
    with second.line() as line:
        assert line.ask(b"ehello\n") == "ECHO hello"
    second.stop()
    assert second.rules() == str(SHARED)


def test_an_image_is_the_hosts_whatever_root_an_instance_was_started_from(roots):
    first, second = roots
    disk = first.disk()
    link = second.root / "link.raw"
    os.link(disk, link)
    first.start("holder", disks=[{"path": str(disk)}])
    for extra in ({}, {"readonly": True}):
        with pytest.raises(ImageInUse) as caught:
            second.start(disks=[{"path": str(link), **extra}])
        assert (caught.value.holder, caught.value.root) == ("holder", str(first.root))
        assert f"kvmsec --root {first.root} instance stop holder" in (caught.value.hint or "")
    assert not second.leases() and not second.holdings() and not second.instances()
    first.stop("holder")
    second.start(disks=[{"path": str(link), "readonly": True}])
    first.start("reader", disks=[{"path": str(disk), "readonly": True}])
    with pytest.raises(ImageInUse):
        first.start("writer", disks=[{"path": str(disk)}])
    first.stop("reader")
    second.stop()
    assert not first.leftovers() and not second.leftovers()


def test_a_base_that_another_root_writes_to_is_no_base(roots):
    first, second = roots
    base, overlay = first.disk("base.raw"), second.root / "overlay.qcow2"
    make = ["qemu-img", "create", "-q", "-f", "qcow2", "-b", str(base), "-F", "raw", str(overlay)]
    subprocess.run(make, check=True)
    overlay.chmod(0o600)
    backing = [{"path": str(base), "format": "raw"}]
    chain = [{"path": str(overlay), "format": "qcow2", "backing": backing}]
    first.start("writer", disks=[{"path": str(base)}])
    with pytest.raises(ImageInUse):
        second.start(disks=chain)
    first.stop("writer")
    second.start(disks=chain)
    with pytest.raises(ImageInUse):
        first.start("writer", disks=[{"path": str(base)}])
    first.start("reader", disks=[{"path": str(base), "readonly": True}])
    first.stop("reader")
    second.stop()


def test_of_two_roots_that_start_at_once_one_gets_the_image(roots):
    disk = roots[0].disk()
    definitions = [root.definition(disks=[{"path": str(disk)}]) for root in roots]
    rivals = [
        root.rival(lambda node, it=definition: node.start(it))
        for root, definition in zip(roots, definitions, strict=True)
    ]
    errors = [rival.outcome().get("error") for rival in rivals]
    assert sorted(str(error) for error in errors) == ["ImageInUse", "None"]
    for root in roots:
        for name in root.instances():
            root.stop(name)


def test_an_image_of_a_crashed_instance_is_free_once_its_root_took_it_back(roots):
    first, second = roots
    disk = first.disk()
    crashed = first.start(disks=[{"path": str(disk)}])
    end(crashed.pid)
    with pytest.raises(ImageInUse):
        second.start(disks=[{"path": str(disk)}])
    first.reconcile()
    second.start(disks=[{"path": str(disk)}])
    second.stop()


def test_a_root_without_its_files_holds_images_as_long_as_its_process_lives(roots):
    first, second = roots
    disk = first.disk()
    running = first.start(disks=[{"path": str(disk)}])
    place = first.paths.instance("web")
    output.unmount(place.output)
    shutil.rmtree(place.directory)
    with pytest.raises(ImageInUse):
        second.start(disks=[{"path": str(disk)}])
    end(running.pid)
    second.start(disks=[{"path": str(disk)}])
    second.stop()
    first.reconcile()


def end(pid: int) -> None:
    pidfd = os.pidfd_open(pid)
    signal.pidfd_send_signal(pidfd, signal.SIGKILL)
    select.select([pidfd], [], [])
    os.close(pidfd)


def die_at_ready(step: str) -> None:
    if step == "ready":
        os.kill(os.getpid(), signal.SIGKILL)
