"""The monitor's client and the QEMU that is installed understand each other."""

import asyncio
import signal
import socket
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from hypervisor.monitor import (
    CommandRefused,
    Monitor,
    MonitorClosed,
    MonitorTimedOut,
)

pytestmark = pytest.mark.kvm

# hlt; jmp to it: a processor that does nothing, at the reset vector of a ROM of 64 KiB.
ROM = bytes(0xFFF0) + b"\xf4\xeb\xfd" + bytes(13)

Start = Callable[..., subprocess.Popen[bytes]]


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Start]:
    """Start QEMU with a machine that stands still and the given arguments."""
    rom = tmp_path / "halt.rom"
    rom.write_bytes(ROM)
    started = []

    def run(*arguments: str, pass_fds: tuple[int, ...] = ()) -> subprocess.Popen[bytes]:
        machine = ["-machine", "pc,accel=tcg", "-m", "1", "-bios", str(rom), "-S"]
        silent = ["-nodefaults", "-no-user-config", "-display", "none"]
        argv = ["qemu-system-x86_64", *machine, *silent, *arguments]
        started.append(subprocess.Popen(argv, pass_fds=pass_fds, stdin=subprocess.DEVNULL))
        return started[-1]

    yield run
    for qemu in started:
        qemu.kill()
        qemu.wait()


@pytest.fixture
def path(tmp_path: Path, start: Start) -> Path:
    """The socket of a QEMU that has just been started: it listens before QEMU does anything."""
    place = tmp_path / "monitor"
    with socket.socket(socket.AF_UNIX) as listening:
        listening.bind(str(place))
        listening.listen(1)
        number = listening.fileno()
        chardev = f"socket,id=m,fd={number},server=on,wait=off"
        start("-chardev", chardev, "-mon", "chardev=m,mode=control", pass_fds=(number,))
    return place


def start_connected(start: Start) -> tuple[subprocess.Popen[bytes], socket.socket]:
    """A QEMU whose monitor is the other end of the socket that comes with it."""
    ours, theirs = socket.socketpair()
    with theirs:
        number = theirs.fileno()
        monitor = ("-chardev", f"socket,id=m,fd={number}", "-mon", "chardev=m,mode=control")
        return start(*monitor, pass_fds=(number,)), ours


def test_ready_is_when_the_machine_can_run(path: Path) -> None:
    async def live() -> None:
        async with await Monitor.connect(path, timeout_s=30) as monitor:
            assert await monitor.status() == "prelaunch"
            await monitor.cont()
            assert await monitor.status() == "running"
            assert "RESUME" in [event.name for event in monitor.events]

    asyncio.run(live())


def test_events_follow_what_is_done(path: Path) -> None:
    async def live() -> list[str]:
        async with await Monitor.connect(path, timeout_s=30) as monitor:
            await monitor.cont()
            await monitor.powerdown()
            await monitor.reset()
            while "RESET" not in (names := [event.name for event in monitor.events]):
                await monitor.status()
            return names

    assert [name for name in asyncio.run(live()) if name != "RTC_CHANGE"] == [
        "RESUME",
        "POWERDOWN",
        "RESET",
    ]


def test_qemus_own_errors_are_told(path: Path) -> None:
    async def live() -> None:
        async with await Monitor.connect(path, timeout_s=30) as monitor:
            with pytest.raises(CommandRefused) as unknown:
                await monitor.execute("no-such-command")
            assert unknown.value.error_class == "CommandNotFound"
            with pytest.raises(CommandRefused, match="no-such-node"):
                await monitor.execute("blockdev-del", {"node-name": "no-such-node"})
            assert await monitor.status() == "prelaunch"

    asyncio.run(live())


def test_the_largest_reply_fits(path: Path) -> None:
    async def live() -> int:
        async with await Monitor.connect(path, timeout_s=30) as monitor:
            return len(await monitor.execute("query-qmp-schema"))

    assert asyncio.run(live()) > 100


def test_a_second_client_waits_no_longer_than_its_deadline(path: Path) -> None:
    async def live() -> None:
        async with await Monitor.connect(path, timeout_s=30) as monitor:
            with pytest.raises(MonitorTimedOut) as caught:
                await Monitor.connect(path, timeout_s=0.3)
            assert caught.value.hint is not None
            assert await monitor.status() == "prelaunch"
        # And one that comes when the first has gone is served.
        async with await Monitor.connect(path, timeout_s=30) as monitor:
            assert await monitor.status() == "prelaunch"

    asyncio.run(live())


def test_a_qemu_that_is_killed_is_noticed_at_once(start: Start) -> None:
    qemu, ours = start_connected(start)

    async def live() -> None:
        async with await Monitor.attach(ours, timeout_s=30) as monitor:
            qemu.send_signal(signal.SIGSTOP)
            waiting = asyncio.create_task(monitor.status())
            await asyncio.sleep(0)
            qemu.kill()
            with pytest.raises(MonitorClosed):
                await waiting
            assert isinstance(monitor.ended, MonitorClosed)

    asyncio.run(live())


def test_a_qemu_that_stands_still_is_taken_up_again(start: Start) -> None:
    qemu, ours = start_connected(start)

    async def live() -> None:
        async with await Monitor.attach(ours, timeout_s=30) as monitor:
            qemu.send_signal(signal.SIGSTOP)
            with pytest.raises(MonitorTimedOut):
                await monitor.execute("query-status", timeout_s=0.2)
            qemu.send_signal(signal.SIGCONT)
            assert await monitor.status() == "prelaunch"

    asyncio.run(live())
