"""Of whom a watch says that he runs, and which uid is his for good."""

import asyncio
import subprocess
from collections.abc import Iterator
from contextlib import AbstractAsyncContextManager, ExitStack, nullcontext
from pathlib import Path

import pytest
from attrs import evolve

from kvmsec.agent import InstanceState
from kvmsec.linux import processes
from kvmsec.model.security import SecurityModel
from kvmsec.node.host import Host
from kvmsec.node.records import InstanceRecord
from kvmsec.node.watches import Watches
from kvmsec.paths import Paths
from tests.unit.node.a_record import record_of


@pytest.fixture
def sleeper() -> Iterator["subprocess.Popen[bytes]"]:
    with ExitStack() as stack:
        process = stack.enter_context(subprocess.Popen(["sleep", "60"]))
        stack.callback(process.kill)
        yield process


def running(process: "subprocess.Popen[bytes]") -> InstanceRecord:
    found = processes.identify(process.pid)
    return record_of("web", 2000, state=InstanceState.RUNNING, process=found)


def watches(root: Path) -> Watches:
    def turn(name: str) -> AbstractAsyncContextManager[None]:
        return nullcontext()

    return Watches(Host(Paths(root)), turn)


def settled(root: Path, record: InstanceRecord) -> tuple[int, dict[int, int]]:
    async def ask() -> tuple[int, dict[int, int]]:
        watching = watches(root)
        watching.watch(record)
        found = len(watching.alive()), watching.settled()
        await watching.close()
        return found

    return asyncio.run(ask())


def test_an_instance_that_was_proved_to_have_its_uid_has_it(
    tmp_path: Path, sleeper: "subprocess.Popen[bytes]"
) -> None:
    assert settled(tmp_path, running(sleeper)) == (1, {sleeper.pid: 2000})


@pytest.mark.parametrize(
    "change",
    [
        {"state": InstanceState.STARTING},
        {"state": InstanceState.STOPPING},
        {"model": SecurityModel.USER},
        {"model": SecurityModel.NONE, "uid": 0},
    ],
    ids=str,
)
def test_nothing_is_said_of_the_uid_of_others(
    tmp_path: Path, sleeper: "subprocess.Popen[bytes]", change: dict[str, object]
) -> None:
    """A user's may have other processes, which root's helpers let take more ids (newuidmap(1))."""
    assert settled(tmp_path, evolve(running(sleeper), **change)) == (1, {})


def test_who_has_ended_has_no_uid(tmp_path: Path, sleeper: "subprocess.Popen[bytes]") -> None:
    async def ask() -> None:
        watching = watches(tmp_path)
        watching.watch(running(sleeper))
        sleeper.kill()
        sleeper.wait()
        assert (watching.alive(), watching.settled()) == (frozenset(), {})
        await watching.close()

    asyncio.run(ask())


def test_a_pid_that_is_another_process_by_now_is_not_watched(
    tmp_path: Path, sleeper: "subprocess.Popen[bytes]"
) -> None:
    record = running(sleeper)
    assert record.process is not None
    other = evolve(record.process, start_ticks=record.process.start_ticks - 1)
    assert settled(tmp_path, evolve(record, process=other)) == (0, {})
