"""QEMU with nothing around it: what every other way to start it is held against."""

import asyncio
import contextlib
import os
import socket
import subprocess
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Final

from attrs import frozen

from benchmarks.loop import Stopwatch
from hypervisor.features import find_qemu
from hypervisor.tiny import rom_path

SANDBOX: Final = (
    "-sandbox",
    "on,obsolete=deny,elevateprivileges=deny,spawn=deny,resourcecontrol=deny",
)
"""What libvirt and kvmsec give to QEMU, which then filters its own system calls."""

_CAPABILITIES: Final = b'{"execute": "qmp_capabilities"}\n'


@frozen
class Raw:
    """A QEMU that was started as root by a fork and an exec: its process and its monitor."""

    process: subprocess.Popen[bytes]
    path: Path

    def stop(self) -> float:
        """Kill it, and wait until it is gone; in seconds."""
        watch = Stopwatch()
        self.process.kill()
        self.process.wait()
        self.path.unlink()
        _line_of(self.path).unlink()
        return watch.lap()


def _line_of(monitor: Path) -> Path:
    """Where the serial line listens whose machine's monitor listens there."""
    return monitor.with_suffix(".line")


@frozen
class _Prepared:
    listeners: tuple[socket.socket, ...]
    argv: tuple[str, ...]

    def begin(self) -> subprocess.Popen[bytes]:
        given = [one.fileno() for one in self.listeners]
        return subprocess.Popen(self.argv, pass_fds=given, stderr=subprocess.DEVNULL)


@contextlib.contextmanager
def _prepared(path: Path, disk: Path | None, extra: Sequence[str]) -> Iterator[_Prepared]:
    argv = [str(find_qemu(None, None)), *machine_arguments(str(rom_path())), *extra]
    if disk is not None:
        argv += ["-drive", f"file={disk},format=raw,if=virtio"]
    with listening(path) as monitor, listening(_line_of(path)) as line:
        sockets = socket_arguments(monitor.fileno(), line.fileno())
        yield _Prepared((monitor, line), (*argv, *sockets))


@contextlib.contextmanager
def listening(path: Path) -> Iterator[socket.socket]:
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(path))
        listener.listen(1)
        yield listener


def machine_arguments(firmware: str) -> list[str]:
    """The instances' machine, paused until it is told to run."""
    accelerator = "kvm" if os.path.exists("/dev/kvm") else "tcg"
    machine = ["-M", "pc", "-m", "1", "-nodefaults", "-display", "none", "-S"]
    return [*machine, "-accel", accelerator, "-bios", firmware]


def socket_arguments(monitor: int, line: int) -> list[str]:
    """The instances' monitor and serial line, by the descriptors of sockets that listen."""
    chardevs = {"q": monitor, "l": line}
    listening = [f"socket,id={name},fd={fd},server=on,wait=off" for name, fd in chardevs.items()]
    made = [word for one in listening for word in ("-chardev", one)]
    return [*made, "-mon", "chardev=q,mode=control", "-serial", "chardev:l"]


def start(path: Path, disk: Path | None = None, extra: Sequence[str] = ()) -> tuple[Raw, float]:
    """The same machine as the instances', until the reply to `qmp_capabilities`; in seconds.

    `path` is where its monitor listens. Its guest is paused, as an instance's is at that reply.
    """
    with _prepared(path, disk, extra) as prepared:
        watch = Stopwatch()
        process = prepared.begin()
    greet(path)
    return Raw(process, path), watch.lap()


def greet(path: Path) -> None:
    """Return with the monitor's reply to `qmp_capabilities`."""
    with socket.socket(socket.AF_UNIX) as client, client.makefile("rb") as answers:
        client.connect(str(path))
        answers.readline()
        client.sendall(_CAPABILITIES)
        if not answers.readline():
            raise RuntimeError("QEMU ended before its monitor replied")


async def starting(path: Path) -> Raw:
    """As `start`, without a disk, for who starts many at once."""
    with _prepared(path, None, ()) as prepared:
        process = prepared.begin()
    reader, writer = await asyncio.open_unix_connection(path)
    await reader.readline()
    writer.write(_CAPABILITIES)
    await reader.readline()
    writer.close()
    return Raw(process, path)
