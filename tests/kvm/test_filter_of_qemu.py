"""kvmsec's filter of system calls around real QEMUs, and hosts that can't have one."""

import ctypes
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from hypervisor import seccomp
from hypervisor.seccomp import NoFilter
from hypervisor.seccomp.library import load_library
from kvmsec.linux import command, processes

pytestmark = pytest.mark.kvm

TOLERANT = '[confinement]\nmay_be_missing = ["seccomp"]\n'
BRIDGE = "kvmsecfilter"


def filters_of(pid: int) -> set[int | None]:
    """How many filters each thread of a process has."""
    statuses = [processes.read_status(f"{pid}/task/{task}") for task in threads_of(pid)]
    return {status.seccomp_filters for status in statuses if status is not None}


def threads_of(pid: int) -> list[Any]:
    return os.listdir(f"/proc/{pid}/task")


@pytest.fixture
def bridge() -> Iterator[str]:
    command.run(("ip", "link", "add", BRIDGE, "type", "bridge"), timeout_s=10)
    command.run(("ip", "link", "set", BRIDGE, "up"), timeout_s=10)
    yield BRIDGE
    command.run(("ip", "link", "del", BRIDGE), timeout_s=10)


def check_life(lab: Any, **machine: Any) -> None:
    started = lab.start(**machine)
    with lab.line() as line:
        assert line.ask(b"ehello\n") == "ECHO hello"
        assert filters_of(started.pid) <= {2, None}
        assert len(threads_of(started.pid)) > 1
        lab.run(lambda node: node.reboot("web"))
        # The power button is one that it heeds only once it is up again.
        assert line.hear_line().startswith("KVMSEC-TINY up")
    assert lab.stop(force=False).reason == "powered down"


AIO = pytest.mark.parametrize(
    "options", [{"aio": "threads"}, {"aio": "native", "cache": "none"}], ids=["threads", "native"]
)


def disks_of(lab: Any, devices: tuple[str, ...], options: dict[str, str]) -> list[dict[str, str]]:
    paths = (str(lab.disk(f"{number}.raw")) for number in range(len(devices)))
    return [
        {"path": path, "device": device, **options}
        for path, device in zip(paths, devices, strict=True)
    ]


@AIO
def test_a_guest_lives_its_whole_life_with_every_kind_of_disk(
    lab: Any, options: dict[str, str]
) -> None:
    devices = ("ide", "virtio", "scsi", "cdrom")
    check_life(lab, vcpus=2, disks=disks_of(lab, devices, options))


@AIO
@pytest.mark.parametrize("machine", ["q35", "microvm"])
def test_machines_that_the_tiny_guest_does_not_know_start_and_end(
    lab: Any, machine: str, options: dict[str, str]
) -> None:
    started = lab.start(machine=machine, vcpus=2, disks=disks_of(lab, ("virtio",) * 2, options))
    assert filters_of(started.pid) <= {2, None}
    lab.stop()


def test_the_sectors_of_a_disk_are_read_and_written_with_native_io(lab: Any) -> None:
    disk = lab.disk()
    lab.start(disks=[{"path": str(disk), "aio": "native", "cache": "none"}])
    with lab.line() as line:
        assert line.ask(b"3") == "SECTOR 3"
        assert line.ask(b"w") == "WROTE 3 00000001"
    assert disk.read_bytes()[3 * 512 :][:16] == b"KVMSEC-W00000001"
    lab.stop()


def test_taps_and_vhost_work_under_it(lab: Any, bridge: str) -> None:
    vhost = Path("/dev/vhost-net").exists()
    nics = [{"bridge": bridge, "vhost": vhost}, {"bridge": bridge, "model": "e1000"}]
    check_life(lab, nics=nics)


def test_emulation_works_under_it(lab: Any) -> None:
    check_life(lab, accelerator="tcg", vcpus=2)


# Hosts without libseccomp


@pytest.fixture
def without_library(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The loader finds no libseccomp, in this process."""
    load = ctypes.CDLL

    def find(name: str | None, **options: Any) -> ctypes.CDLL:
        if name == "libseccomp.so.2":
            raise OSError(f"{name}: cannot open shared object file: No such file or directory")
        return load(name, **options)

    load_library.cache_clear()
    monkeypatch.setattr(ctypes, "CDLL", find)
    yield
    load_library.cache_clear()


def forgetful(lab: Any) -> Any:
    """Without what was remembered: a filter that was compiled needs no library."""
    for file in lab.paths.features.iterdir():
        file.unlink()
    return lab


@pytest.mark.usefixtures("without_library")
def test_without_the_library_nothing_is_started_and_nothing_is_left(
    make_lab: Callable[..., Any],
) -> None:
    lab = forgetful(make_lab(""))
    with pytest.raises(NoFilter, match=r"libseccomp\.so\.2") as caught:
        lab.start()
    assert caught.value.hint is not None
    assert "apt-get install libseccomp2" in caught.value.hint
    assert not lab.leftovers()
    assert not lab.instances()


@pytest.mark.usefixtures("without_library")
def test_where_it_may_be_missing_qemus_own_filter_is_left_and_the_log_warns(
    make_lab: Callable[..., Any],
) -> None:
    lab = forgetful(make_lab(TOLERANT))
    started = lab.start()
    assert filters_of(started.pid) <= {1, None}
    assert "runs without kvmsec's filter of system calls" in lab.run(log_of_web)
    lab.stop()


def test_what_may_be_missing_is_used_where_it_is_there(make_lab: Callable[..., Any]) -> None:
    lab = make_lab(TOLERANT)
    started = lab.start()
    assert filters_of(started.pid) <= {2, None}
    assert "warning" not in lab.run(log_of_web)
    lab.stop()


async def log_of_web(node: Any) -> str:
    return str((await node.log("web")).kvmsec)


# What is remembered


def test_the_second_start_compiles_nothing(lab: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    lab.start()
    lab.stop()
    monkeypatch.setattr(seccomp, "load_library", lambda: pytest.fail("it was compiled again"))
    lab.start()
    lab.stop()
