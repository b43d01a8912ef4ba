"""A QEMU that its guest took over: nothing that it does keeps its own end from coming."""

import ctypes
import os
import signal
import socket
import stat
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from hypervisor.features import find_qemu
from hypervisor.jail import SECCOMP
from kvmsec.linux import command, readiness, tun, unix_sockets
from kvmsec.linux.children import Child, run_in_child, start_child
from kvmsec.linux.credentials import Credentials
from kvmsec.linux.errors import Fault
from kvmsec.node import dismantle
from uidpool import provision, usage
from uidpool.ranges import UidRanges
from uidpool.snapshot import Snapshot

pytestmark = pytest.mark.kvm

POOL = UidRanges.parse("248000-248009")
SOURCE = Path(__file__).with_name("taken_over.c")
WITHOUT_REST = "[uids]\nreuse_delay_s = 0\n"

Start = Callable[..., Any]


@pytest.fixture(scope="module")
def program(stand_ins: Path) -> Path:
    made = stand_ins / "taken-over"
    real = f'-DQEMU="{find_qemu(None, None)}"'
    subprocess.run(
        ["gcc", "-static", "-O1", "-Wall", "-Wno-return-type", real, SOURCE, "-o", made], check=True
    )
    return made


@pytest.fixture
def lab(pool_users: None, make_lab: Callable[..., Any]) -> Any:
    provision.apply(provision.plan(POOL, Snapshot.read()))
    return make_lab(WITHOUT_REST, uid_pool=POOL)


@pytest.fixture
def start(lab: Any, program: Path) -> Start:
    return lambda name, **machine: lab.start(name, qemu=str(program), **machine)


def seconds(work: Callable[[], Any]) -> float:
    began = time.monotonic()
    work()
    return time.monotonic() - began


def can_refuse_descriptors() -> bool:
    """Whether the kernel has SO_PASSRIGHTS for unix sockets (Linux 6.16)."""
    with socket.socket(socket.AF_UNIX) as one:
        try:
            one.setsockopt(socket.SOL_SOCKET, 83, 0)
        except OSError:
            return False
    return True


@pytest.mark.skipif(
    not can_refuse_descriptors(), reason="this kernel has no SO_PASSRIGHTS (Linux 6.16)"
)
def test_a_descriptor_that_it_passes_holds_nobody_up(lab: Any, start: Start) -> None:
    start("passes")
    assert seconds(lambda: lab.stop("passes", force=False, timeout_s=1)) < 5


@pytest.mark.parametrize("name", ["passes", "mute"])
def test_nor_does_it_where_the_kernel_can_not_refuse_it(
    lab: Any, start: Start, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    monkeypatch.setattr(unix_sockets, "_refuse_descriptors", lambda _: False)
    start(name)
    assert seconds(lambda: lab.stop(name, force=False, timeout_s=1)) < 5
    assert not lab.leftovers()


def test_a_mute_monitor_holds_a_stop_up_no_longer_than_it_was_told(lab: Any, start: Start) -> None:
    start("mute")
    assert seconds(lambda: lab.stop("mute", force=False, timeout_s=1)) < 5


def seize(libc: ctypes.CDLL, pid: int) -> int:
    result: int = libc.ptrace(0x4206, pid, None, None)  # PTRACE_SEIZE
    return result


def trace(pids: list[int], uid: int) -> None:
    """Have a process of the uid outside the jail trace some: they can't go before it does."""

    def work() -> None:
        reader, writer = os.pipe()
        if os.fork() == 0:
            os.setsid()
            libc = ctypes.CDLL(None, use_errno=True)
            problems = [os.strerror(ctypes.get_errno()) for pid in pids if seize(libc, pid) < 0]
            os.write(writer, f"{problems}".encode())
            os.closerange(3, 64)
            while True:
                signal.pause()
        assert os.read(reader, 1000) == b"[]"

    run_in_child(work, what="tracing", timeout_s=20, credentials=Credentials(uid, uid))


def test_a_tracer_outside_keeps_nothing_alive(
    lab: Any, start: Start, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(dismantle, "KILL_TIMEOUT_S", 1.0)
    info = start("parent")
    children = [one.pid for one in usage.inspect(info.uid).processes if one.pid != info.pid]
    trace(children, info.uid)
    assert lab.stop("parent").reason == "killed, as asked"
    assert usage.inspect(info.uid).is_clean


@pytest.fixture
def tap() -> Iterator[str]:
    name = "taptaken"
    command.run(("ip", "tuntap", "add", name, "mode", "tap", "user", "root"), timeout_s=10)
    yield name
    command.run(("ip", "link", "del", name), timeout_s=10)


def take_tap(name: str, uid: int) -> Child:
    """Have a process of another uid hold a tap, until it is closed."""

    def hold() -> None:
        os.close(os.dup(tun.attach(name)))
        time.sleep(60)

    holder = start_child(hold, what="holding a tap", credentials=Credentials(uid, uid))
    assert not readiness.is_readable(holder.fileno(), 0.5), holder.collect(5)
    return holder


@pytest.fixture
def tun_for_all(monkeypatch: pytest.MonkeyPatch) -> None:
    """The device as it is on most hosts, where each user may hold a tap that is his."""
    node = Path("/run/tun-for-all")
    if not node.exists():
        os.mknod(node, stat.S_IFCHR, os.makedev(10, 200))
        node.chmod(0o666)
    monkeypatch.setattr(tun, "_DEVICE", str(node))


@pytest.mark.usefixtures("tun_for_all")
def test_a_tap_that_it_gave_away_keeps_no_uid(lab: Any, program: Path, tap: str) -> None:
    """Where seccomp lets it: that refuses it first (tests/attacks, `give-tap`)."""
    definition = lab.definition("gives-tap", qemu=str(program), nics=[{"tap": tap}])
    info = lab.run(lambda node: node.start(definition), without_locks=frozenset({SECCOMP}))
    with take_tap(tap, 248900):
        with pytest.raises(Fault, match=tap):
            lab.stop("gives-tap")
        assert usage.inspect(info.uid).is_clean
        assert lab.leases() == []
    lab.stop("gives-tap")
