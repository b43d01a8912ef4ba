"""Many instances at once, and rivals for the same name, uid or image."""

import asyncio
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from hypervisor.images import ImageNotOpened
from kvmsec.agent import InstanceState
from kvmsec.errors import UidsInUse
from kvmsec.linux import processes
from kvmsec.node.images_in_use import ImageInUse
from tests.held_lock import held
from tests.root.hypervisor.jailed import spares_of
from uidpool.errors import PoolExhausted
from uidpool.ranges import UidRanges

pytestmark = pytest.mark.kvm

FLEET = 30
NAMESPACES = ("mnt", "net", "ipc", "uts", "pid", "cgroup")
SETTLED_S = 1.2  # Longer than a record must have stayed the same to be remembered.


def check_fleet(lab: Any) -> None:
    """A full pool: each instance has its own uid, and there is none for another."""
    running = lab.instances()
    assert len(running) == FLEET
    assert {one.state for one in running.values()} == {InstanceState.RUNNING}
    assert {one.uid for one in running.values()} == {*lab.pool}
    for one in running.values():
        assert processes.read_status(one.pid).uids == (one.uid,) * 4
    for kind in NAMESPACES:
        pids = (*(one.pid for one in running.values()), "self")
        assert len({os.readlink(f"/proc/{pid}/ns/{kind}") for pid in pids}) == FLEET + 1
    assert {(one.uid, one.instance) for one in lab.leases()} == {
        (one.uid, one.name) for one in running.values()
    }
    before = sorted(str(path) for path in lab.root.rglob("*"))
    with pytest.raises(PoolExhausted) as caught:
        lab.start("onemore")
    counts = caught.value
    assert (counts.size, counts.leased, counts.quarantined) == (FLEET, FLEET, 0)
    assert "30 leased, 0 resting, 0 quarantined" in counts.message
    log = str(lab.paths.instance_log("onemore"))
    assert sorted(str(path) for path in lab.root.rglob("*") if str(path) != log) == before


def check_all_is_released(lab: Any) -> None:
    assert not lab.leftovers()
    states = {one.uid: one.state for one in lab.run(lambda node: node.uid_states())}
    assert states == dict.fromkeys(lab.pool, "resting")


def test_a_whole_pool_is_started_at_once_by_one_node_and_one_more_is_refused(lab):
    names = [f"vm{number}" for number in range(FLEET)]

    async def start_all(node: Any) -> None:
        await asyncio.gather(*(node.start(lab.definition(name)) for name in names))

    async def stop_all(node: Any) -> None:
        await asyncio.gather(*(node.stop(name) for name in names))

    lab.run(start_all)
    check_fleet(lab)
    with lab.line("vm7") as line:
        assert line.ask(b"ehello\n") == "ECHO hello"
    lab.run(stop_all)
    check_all_is_released(lab)


def test_a_start_opens_no_file_of_those_that_run_on(lab):
    """Else each start would take longer than the one before."""

    async def count_opened(node: Any) -> list[int]:
        opened: list[str] = []
        places = (f"{lab.root}/", f"{lab.paths.uid_leases}/")

        def note(event: str, arguments: tuple[Any, ...]) -> None:
            if event == "open" and str(arguments[0]).startswith(places):
                opened.append(arguments[0])

        sys.addaudithook(note)  # It can't be taken back, and ends with this process.
        # What is opened once for all of them, and what is remembered only when it has settled.
        await node.start(lab.definition("first"))
        await asyncio.sleep(SETTLED_S)
        await node.start(lab.definition("second"))
        counts = []
        for fleet in (["a", "b"], [f"vm{number}" for number in range(12)]):
            for name in fleet:
                await node.start(lab.definition(name))
            await asyncio.sleep(SETTLED_S)
            await node.reconcile()
            opened.clear()
            await node.start(lab.definition(f"after-{len(fleet)}"))
            counts.append(len(opened))
        return counts

    few, many = lab.rival(count_opened).outcome()["value"]
    assert few == many > 0
    for name in lab.instances():
        lab.stop(name)


def test_an_instance_holds_little_of_the_node_s_memory_besides_qemu(lab):
    lab.start()
    place = lab.paths.instance("web").directory
    held = sum(path.lstat().st_blocks * 512 for path in [place, *place.rglob("*")])
    lab.stop()

    assert 0 < held <= 32 * 1024


def test_a_whole_pool_is_started_at_once_by_several_processes(lab):
    count = 3
    shares = [[f"vm{number}" for number in range(first, FLEET, count)] for first in range(count)]

    async def act(node: Any, share: list[str], verb: str) -> None:
        for name in share:
            subject = lab.definition(name) if verb == "start" else name
            await getattr(node, verb)(subject)

    for verb in ("start", "stop"):
        rivals = [
            lab.rival(lambda node, share=share, verb=verb: act(node, share, verb))
            for share in shares
        ]
        assert [rival.outcome() for rival in rivals] == [{"value": None}] * count
        if verb == "start":
            check_fleet(lab)
    check_all_is_released(lab)


def test_of_two_starts_of_one_name_one_wins_and_the_other_is_refused(lab):
    definition = lab.definition()
    for _ in range(4):
        rivals = [lab.rival(lambda node: node.start(definition)) for _ in range(3)]
        outcomes = [rival.outcome() for rival in rivals]
        assert sorted(one.get("error", "") for one in outcomes) == ["", *["AlreadyRunning"] * 2]
        assert len(lab.leases()) == 1
        lab.stop()
        assert not lab.leftovers()

    async def start_twice(node: Any) -> None:
        results = await asyncio.gather(
            *(node.start(definition) for _ in range(3)), return_exceptions=True
        )
        assert sorted(type(one).__name__ for one in results) == [
            *["AlreadyRunning"] * 2,
            "InstanceInfo",
        ]

    lab.run(start_twice)
    lab.stop()


def test_a_start_and_a_stop_at_once_leave_it_running_or_stopped(lab):
    definition = lab.definition()
    for number in range(6):
        starter = lab.rival(lambda node: node.start(definition))
        starter.ends_within(number * 0.02)
        stopper = lab.rival(lambda node: node.stop("web", force=True))
        assert "error" not in starter.outcome()
        stopped = stopper.outcome()
        assert stopped.get("error", "UnknownInstance") == "UnknownInstance"
        lab.reconcile()
        assert len(lab.leases()) == len(lab.instances())
        if lab.instances():
            assert lab.instances()["web"].state is InstanceState.RUNNING
            lab.stop()
        assert not lab.leftovers()


def test_a_start_is_born_into_what_was_made_after_the_one_before_even_if_that_failed(lab):
    def rooms_of(pid: int | str) -> dict[str, str]:
        return {kind: os.readlink(f"/proc/{pid}/ns/{kind}") for kind in ("net", "ipc", "uts")}

    async def made_ahead(node: Any, *taken: int) -> dict[str, str]:
        others = {room for pid in (*taken, "self") for room in rooms_of(pid).items()}
        async with asyncio.timeout(10):
            nursery = node.host.nursery
            while True:
                await asyncio.sleep(0.001)
                spares = spares_of(nursery)
                if spares and not (made := rooms_of(spares[-1])).items() & others:
                    return made

    async def act(node: Any) -> None:
        first = await node.start(lab.definition("first"))
        await made_ahead(node, first.pid)
        with pytest.raises(ImageNotOpened):
            await node.start(lab.definition("none", disks=[{"path": str(lab.root / "none.img")}]))
        made = await made_ahead(node, first.pid)
        second = await node.start(lab.definition("second"))
        assert rooms_of(second.pid) == made

    lab.run(act)
    for name in lab.instances():
        lab.stop(name)


def test_uids_that_leave_the_pool_while_starts_draw_are_held_by_nobody_or_stay(make_lab):
    lab = make_lab(uid_pool=UidRanges.parse("245000-245003"))
    going = UidRanges.parse("245000-245001")
    for number in range(4):
        rivals = [
            lab.rival(lambda node, name=name: node.start(lab.definition(name)))
            for name in ("one", "two")
        ]
        rivals[0].ends_within(number * 0.01)
        try:
            lab.modify(remove=going)
            has_left = True
        except UidsInUse as refused:
            assert {*refused.holders} <= {*going}
            has_left = False
        outcomes = [rival.outcome() for rival in rivals]
        assert {one.get("error", "PoolChanges") for one in outcomes} == {"PoolChanges"}
        pool = "245002-245003" if has_left else "245000-245003"
        assert (
            str(lab.run(lambda node: asyncio.to_thread(node.host.store.load))[0].uid_pool) == pool
        )
        assert {one.uid for one in lab.instances().values()} <= {*UidRanges.parse(pool)}
        assert lab.rules() == pool
        for name in lab.instances():
            lab.stop(name)
        if has_left:
            lab.modify(add=going)
        lab.run(lambda node: node.forget_resting())


def test_a_uid_that_drains_is_not_drawn_again_and_leaves_once_it_is_released(make_lab):
    lab = make_lab(uid_pool=UidRanges.parse("245000-245001"))
    started = lab.start()
    leaving = UidRanges.of_uids([started.uid])
    with pytest.raises(UidsInUse, match="instance web"):
        lab.modify(remove=leaving)
    cluster = lab.modify(remove=leaving, drain=True)
    assert (cluster.uid_pool.size(), cluster.draining) == (1, leaving)
    assert lab.rules() == "245000-245001", "it is guarded as long as it is held"
    states = {one.uid: one.state for one in lab.run(lambda node: node.uid_states())}
    assert states == {started.uid: "draining"}
    other = lab.start("other")
    assert other.uid != started.uid
    with pytest.raises(PoolExhausted):
        lab.start("third")
    lab.stop()
    lab.stop("other")
    lab.reconcile()
    assert lab.rules() == str(other.uid)


def test_an_image_that_another_may_write_to_is_refused_by_whatever_path(lab):
    disk = lab.disk()
    link = lab.root / "link.raw"
    os.link(disk, link)
    lab.start("holder", disks=[{"path": str(disk)}])
    for path in (disk, link):
        for extra in ({}, {"readonly": True}):
            with pytest.raises(ImageInUse) as caught:
                lab.start("rival", disks=[{"path": str(path), **extra}])
            assert caught.value.holder == "holder"
    assert lab.instances().keys() == {"holder"}
    assert len(lab.leases()) == 1
    # Of two that start at once, one gets it.
    lab.stop("holder")
    definitions = [
        lab.definition(name, disks=[{"path": str(path)}])
        for name, path in (("one", disk), ("two", link))
    ]
    rivals = [lab.rival(lambda node, it=definition: node.start(it)) for definition in definitions]
    errors = [rival.outcome().get("error") for rival in rivals]
    assert sorted(str(error) for error in errors) == ["ImageInUse", "None"]
    for name in lab.instances():
        lab.stop(name)


def test_a_base_that_all_only_read_is_shared_and_never_written_beside_them(lab):
    base = lab.disk("base.raw")
    for name in ("one", "two"):
        overlay = lab.root / f"{name}.qcow2"
        make = ["qemu-img", "create", "-q", "-f", "qcow2", "-b", str(base), "-F", "raw"]
        subprocess.run([*make, str(overlay)], check=True)
        overlay.chmod(0o600)
        keys = overlaid(overlay, base)
        lab.start(name, disks=[keys])
        with lab.line(name) as line:
            assert line.ask(b"w").startswith("WROTE")
    lab.start("reader", disks=[{"path": str(base), "readonly": True}])
    with pytest.raises(ImageInUse):
        lab.start("writer", disks=[{"path": str(base)}])
    with pytest.raises(ImageInUse):
        lab.start("thief", disks=[overlaid(lab.root / "one.qcow2", base)])
    assert base.read_bytes() == bytes(1 << 20)
    for name in lab.instances():
        lab.stop(name)
    # The other way round: what is written to can't become a base.
    lab.start("writer", disks=[{"path": str(base)}])
    with pytest.raises(ImageInUse):
        lab.start("one", disks=[overlaid(lab.root / "one.qcow2", base)])
    lab.stop("writer")


def overlaid(overlay: Path, base: Path) -> dict[str, Any]:
    backing = [{"path": str(base), "format": "raw"}]
    return {"path": str(overlay), "format": "qcow2", "backing": backing}


@pytest.mark.parametrize("whose", ["rules", "records"])
def test_starts_that_wait_for_another_process_hold_up_nothing_else(lab, whose):
    web = lab.start()
    paths = lab.paths
    lock = {"rules": paths.run / "rules.lock", "records": paths.uid_leases / ".locks/records"}

    async def act(node: Any) -> None:
        with held(lock[whose]) as other:
            names = ("one", "two")
            starts = [asyncio.create_task(node.start(lab.definition(name))) for name in names]
            await asyncio.sleep(0.5)
            assert (await node.info("web")).pid == web.pid
            assert [one.done() for one in starts] == [False, False]
            other.close()
            await asyncio.gather(*starts)

    lab.run(act)
    assert lab.instances().keys() == {"web", "one", "two"}
    for name in lab.instances():
        lab.stop(name)
