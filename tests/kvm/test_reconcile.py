"""What became of instances that nobody stopped: seen at once, told as far as known, put right."""

import asyncio
import json
import os
import select
import signal
import subprocess
from pathlib import Path
from typing import Any

import pytest

from kvmsec.agent import InstanceState
from kvmsec.linux import namespaces, processes
from kvmsec.node.records import RecordUnreadable

pytestmark = pytest.mark.kvm

DEADLINE_S = 30.0
ANOTHER_BOOT = "00000000-0000-0000-0000-000000000000"


def end(pid: int, number: signal.Signals = signal.SIGKILL) -> None:
    """Signal a process and wait until it has ended."""
    pidfd = os.pidfd_open(pid)
    try:
        os.kill(pid, number)
        assert select.select([pidfd], [], [], DEADLINE_S)[0]
    finally:
        os.close(pidfd)


async def hear(events: Any, wanted: InstanceState) -> Any:
    async with asyncio.timeout(DEADLINE_S):
        async for event in events:
            if event.state is wanted:
                return event
    raise AssertionError("the events ended")


async def let_others_run() -> None:
    """Let what is due in the event loop happen: the watch that told of an end closes."""
    for _ in range(10):
        await asyncio.sleep(0)


def rewrite(path: Path, **changes: Any) -> None:
    record = json.loads(path.read_text())
    path.write_text(json.dumps(record | changes))


def test_a_crash_is_shown_by_listings_that_change_nothing_and_cleaned_by_the_next_command(lab):
    started = lab.start()
    end(started.pid)
    before = sorted(str(path) for path in lab.paths.run.rglob("*"))
    for _ in range(2):
        seen = lab.instances()["web"]
        assert (seen.state, seen.pid, seen.uid) == (InstanceState.CRASHED, None, started.uid)
    assert sorted(str(path) for path in lab.paths.run.rglob("*")) == before
    assert [one.uid for one in lab.leases()] == [started.uid]

    assert lab.reconcile() == ("web: crashed: killed by SIGKILL",)
    assert not lab.leftovers()
    seen = lab.run(lambda node: node.info("web"))
    assert (seen.state, seen.reason) == (InstanceState.CRASHED, "killed by SIGKILL")
    again = lab.start()
    assert again.uid != started.uid, "the uid rests"
    assert lab.stop().state is InstanceState.STOPPED
    assert not lab.instances()


def test_who_watches_its_instances_looks_none_of_them_up(lab, monkeypatch):
    """One poll(2) asks after all, so that a start does not grow with the fleet by that."""
    looked_up = []
    look = processes.is_alive

    def note(process: processes.ProcessId) -> bool:
        looked_up.append(process.pid)
        return look(process)

    async def act(node: Any) -> None:
        started = await node.start(lab.definition())
        monkeypatch.setattr(processes, "is_alive", note)
        assert await node.reconcile() == ()
        assert started.pid not in looked_up
        end(started.pid)
        assert await node.reconcile() == ("web: crashed: killed by SIGKILL",)

    lab.run(act)
    assert not lab.leftovers()


def test_what_nobody_saw_end_is_unknown_and_its_last_words_are_kept(lab):
    assert lab.rival(lambda node: node.start(lab.definition())).outcome()
    end(lab.instances()["web"].pid, signal.SIGTERM)
    assert lab.reconcile() == ("web: crashed: unknown: nothing was there to see it end",)
    seen = lab.instances()["web"]
    assert seen.state is InstanceState.CRASHED
    assert "terminating on signal 15" in seen.details["last_words"]
    assert "terminating on signal 15" in lab.run(lambda node: node.log("web")).qemu
    lab.stop()


def test_a_running_node_sees_every_end_at_once_and_cleans_up(lab):
    async def watch(node: Any) -> None:
        lab.note_what_is_there(node)
        events = node.events()
        first = asyncio.ensure_future(anext(events))
        await asyncio.sleep(0)
        started = await node.start(lab.definition())
        assert (await first).state is InstanceState.STARTING
        assert (await anext(events)).state is InstanceState.RUNNING

        os.kill(started.pid, signal.SIGKILL)
        crashed = await anext(events)
        assert (crashed.instance, crashed.state) == ("web", InstanceState.CRASHED)
        assert crashed.reason == "killed by SIGKILL"
        await let_others_run()
        assert not lab.leftovers(is_node_open=True)

        await node.start(lab.definition())
        with lab.line() as line:
            line.say(b"p")
            assert "exited with status 0" in (await hear(events, InstanceState.CRASHED)).reason
        await let_others_run()
        assert not lab.leftovers(is_node_open=True)

        await node.start(lab.definition())
        await node.stop("web", force=True)
        seen = [(await anext(events)).state.value for _ in range(4)]
        assert seen == ["starting", "running", "stopping", "stopped"]
        await node.start(lab.definition())
        await node.stop("web")
        seen = [(await anext(events)).state.value for _ in range(4)]
        assert seen == ["starting", "running", "stopping", "stopped"], "each is told once"
        await events.aclose()

    lab.run(watch)


def test_a_node_tells_of_ends_that_others_brought_and_collects_their_zombies(lab):
    async def watch(node: Any) -> None:
        lab.note_what_is_there(node)
        events = node.events()
        first = asyncio.ensure_future(anext(events))
        await asyncio.sleep(0)
        started = await node.start(lab.definition())
        await first
        assert lab.rival(lambda other: other.stop("web")).outcome() is not None
        await hear(events, InstanceState.STOPPED)
        await let_others_run()
        assert processes.read_status(started.pid) is None, "a zombie stays"

        started = await node.start(lab.definition())
        end(started.pid)
        assert lab.rival(lambda other: other.reconcile()).outcome() is not None
        await hear(events, InstanceState.CRASHED)
        await node.start(lab.definition())
        await node.stop("web", force=True)
        await events.aclose()

    lab.run(watch)
    # One that is gone before anybody listens is told of as well.
    started = lab.start()
    end(started.pid)
    told = lab.run(lambda node: hear(node.events(), InstanceState.CRASHED))
    assert told.instance == "web"
    lab.stop()


def test_a_slow_listener_loses_the_oldest_events_only(lab):
    async def listen_late(node: Any) -> None:
        slow, quick = node.events(), node.events()
        firsts = [asyncio.ensure_future(anext(events)) for events in (slow, quick)]
        await asyncio.sleep(0)
        for number in range(300):
            node._watches.publish(f"vm{number}", InstanceState.RUNNING)
        assert [(await first).instance for first in firsts] == ["vm44", "vm44"]
        assert [(await anext(slow)).instance for _ in range(255)][-1] == "vm299"
        node._watches.publish("last", InstanceState.RUNNING)
        assert (await anext(slow)).instance == "last"
        assert (await anext(quick)).instance == "vm45"

    lab.run(listen_late)


def test_a_kill_for_want_of_memory_is_told_as_one(lab):
    started = lab.start()
    group = next((path for path in lab.groups() if "/memory/" in path and "vm-" in path), None)
    group = group or next(path for path in lab.groups() if "vm-" in path)
    v1 = Path(group, "memory.limit_in_bytes")
    limit, usage = (
        (v1, Path(group, "memory.usage_in_bytes"))
        if v1.exists()
        else (Path(group, "memory.max"), Path(group, "memory.current"))
    )
    if not limit.exists():
        pytest.skip("this kernel's control groups do not limit memory")

    limit.write_text(str(int(usage.read_text()) + (4 << 20)))
    Path(f"/proc/{started.pid}/oom_score_adj").write_text("1000")
    # A small program that wants more than there is, where the kernel chooses QEMU first.
    crowd = 'echo $$ >"$0/cgroup.procs" && exec dd if=/dev/zero of=/dev/null bs=64M count=1'
    pidfd = os.pidfd_open(started.pid)
    subprocess.run(["sh", "-c", crowd, group], check=False, stderr=subprocess.DEVNULL)
    assert select.select([pidfd], [], [], DEADLINE_S)[0]
    os.close(pidfd)
    assert lab.reconcile() == ("web: crashed: killed by the kernel: out of memory",)
    assert lab.instances()["web"].reason == "killed by the kernel: out of memory"
    lab.stop()


def test_records_and_leases_of_another_boot_are_of_instances_that_stopped(lab):
    started = lab.start()
    end(started.pid)
    files, groups = lab.paths.instance("web"), lab.groups()
    lease = lab.paths.uid_leases / str(started.uid)
    record = json.loads(files.record.read_text())
    # What a reboot does: nothing of the kernel's is left, the files are; pids are others' now.
    namespaces.umount(str(files.output), namespaces.MNT_DETACH)
    for group in reversed(groups):
        os.rmdir(group)
    os.waitpid(started.pid, 0)
    mine = processes.myself()
    another = {"pid": mine.pid, "start_ticks": mine.start_ticks, "boot_id": ANOTHER_BOOT}
    rewrite(files.record, process=another, launcher=record["launcher"] | another)
    rewrite(lease, boot_id=ANOTHER_BOOT)
    seen = lab.instances()["web"]
    assert (seen.state, seen.reason) == (InstanceState.STOPPED, "host rebooted")
    assert lab.reconcile() == ("web: stopped: host rebooted",)
    assert not lab.leftovers()
    seen = lab.instances()["web"]
    assert (seen.state, seen.reason) == (InstanceState.STOPPED, "host rebooted")
    assert lab.start().state is InstanceState.RUNNING
    lab.stop()


def test_an_instance_of_another_release_is_known_and_stopped(lab):
    """A running instance survives an upgrade, and the way back."""
    started = lab.start()
    record = lab.paths.instance("web").record
    rewrite(record, invented={"later": [1, 2]})
    seen = lab.instances()["web"]
    assert (seen.state, seen.pid) == (InstanceState.RUNNING, started.pid)
    assert not lab.reconcile()
    # Of a later format it can't be known what else it means.
    rewrite(record, format=7)
    assert "format 7" in lab.instances()["web"].reason
    assert len(lab.reconcile()) == 1
    # One that an earlier release wrote: it lacks what has a default.
    document = json.loads(record.read_text())
    for key in ("argv", "accelerator", "qemu_version", "format", "invented"):
        document.pop(key)
    record.write_text(json.dumps(document))
    assert lab.instances()["web"].pid == started.pid
    assert lab.stop(force=False).reason == "powered down"


@pytest.mark.parametrize("garbage", [b"", b"{", b'{"name": "web"}', b"\xff" * 4096])
def test_an_instance_whose_record_is_garbled_is_left_alone_and_said(lab, garbage):
    keys = {"security_model": "user", "security_domain": lab.domain}
    pooled, owned = lab.start("pooled"), lab.start("owned", **keys)
    kept = {}
    for name in ("pooled", "owned"):
        record = lab.paths.instance(name).record
        kept[record] = record.read_bytes()
        record.write_bytes(garbage)
    said = lab.reconcile()
    assert len(said) == 2 and all("left as it is" in line for line in said)
    assert processes.read_status(pooled.pid).uids[0] == pooled.uid, "it still runs"
    assert processes.read_status(owned.pid).uids[0] == owned.uid
    assert [one.uid for one in lab.leases()] == [pooled.uid]
    for act in (lab.start, lab.stop):
        with pytest.raises(RecordUnreadable) as caught:
            act("pooled")
        assert "can't be used" in caught.value.message and "remove" in caught.value.hint
    seen = lab.instances()
    assert {one.state for one in seen.values()} == {InstanceState.UNKNOWN}
    assert "record.json can't be used" in seen["pooled"].reason
    # Others live as ever, and the rules of the uid that may be running stand.
    lab.start("other", **keys)
    lab.stop("other")
    assert lab.rules() == f"{lab.pool},{lab.domain_uid}"
    for record, content in kept.items():
        record.write_bytes(content)
        lab.stop(record.parent.name)
    assert lab.rules() == str(lab.pool)


class StartsMeanwhile:
    """Stands for a part of a node; has another process start `web` before it answers a question."""

    def __init__(self, part: Any, question: str, lab: Any) -> None:
        self._part = part
        self._question = question
        self._lab = lab

    def __getattr__(self, name: str) -> Any:
        if name == self._question:
            self._question = ""
            launcher = self._lab.rival(lambda node: node.start(self._lab.definition()))
            assert "error" not in launcher.outcome()
        return getattr(self._part, name)


@pytest.mark.parametrize("question", ["claims.leases", "hierarchy.mounts"])
def test_what_is_started_while_leaks_are_looked_for_is_none(lab, question):
    part, name = question.split(".")

    async def reconcile(node: Any) -> Any:
        setattr(node.host, part, StartsMeanwhile(getattr(node.host, part), name, lab))
        return await node.reconcile()

    assert not lab.run(reconcile)
    with lab.line() as line:
        assert line.ask(b"ehello\n") == "ECHO hello"
    lab.stop()


@pytest.mark.parametrize("running", [(), ("web",), ("web", "db")], ids=len)
def test_a_group_without_an_instance_is_removed_beside_those_that_run(lab, running):
    for name in running:
        lab.start(name)
    lab.start("gone")
    groups = [path for path in lab.groups() if path.endswith("/vm-gone")]
    lab.stop("gone")
    assert lab.reconcile() == ()
    before = lab.groups()
    for path in groups:
        os.makedirs(path)
    assert sorted(lab.reconcile()) == sorted(f"cgroup {path}: removed" for path in groups)
    assert lab.groups() == before
    for name in running:
        lab.stop(name)
