"""What an instance is lent, and the numbers under which QEMU finds it."""

import socket
from collections.abc import Mapping, Sequence
from itertools import count
from pathlib import PurePosixPath
from typing import Final

from attrs import frozen

from hypervisor.cmdline import Grants, ImageGrant, NicGrant, build
from hypervisor.images import OpenImage
from hypervisor.jail import BootFile
from hypervisor.machine import Machine
from hypervisor.tree import BOOT, OUTPUT
from kvmsec.node.engine import Engine
from kvmsec.node.output import SERIAL_LOG
from kvmsec.node.taps import OpenTap

_FIRST: Final = 3  # after standard input, output and error


@frozen
class Lent:
    """The launcher's own hold on everything that an instance gets."""

    qmp: socket.socket | None = None
    serial: socket.socket | None = None
    disks: tuple[tuple[OpenImage, ...], ...] = ()
    taps: tuple[OpenTap, ...] = ()
    boot_files: tuple[BootFile, ...] = ()

    def close_sockets(self) -> None:
        """Close the launcher's copies of the sockets that QEMU listens on."""
        for listener in (self.qmp, self.serial):
            if listener is not None:
                listener.close()


@frozen
class Placed:
    """A whole command line, and which of the launcher's descriptors is behind each number in it."""

    argv: tuple[str, ...]
    descriptors: Mapping[int, int]


def place(engine: Engine, machine: Machine, lent: Lent, extra: Sequence[str]) -> Placed:
    """Give each descriptor its number, and write the command line that uses them.

    Raises Unsupported and ForbiddenArguments.
    """
    placed: dict[int, int] = {}
    numbers = count(_FIRST)

    def put(descriptor: int) -> int:
        number = next(numbers)
        placed[number] = descriptor
        return number

    assert lent.qmp is not None
    boot = {file.name: PurePosixPath(BOOT, file.name) for file in lent.boot_files}
    grants = Grants(
        qmp=put(lent.qmp.fileno()),
        serial=put(lent.serial.fileno()) if lent.serial else None,
        serial_log=PurePosixPath(OUTPUT, SERIAL_LOG) if lent.serial else None,
        disks=tuple(
            tuple(ImageGrant(put(image.fd), image.kind == "block") for image in chain)
            for chain in lent.disks
        ),
        nics=tuple(
            NicGrant(
                put(tap.descriptor),
                None if tap.vhost_descriptor is None else put(tap.vhost_descriptor),
            )
            for tap in lent.taps
        ),
        firmware=boot.get("firmware"),
        kernel=boot.get("kernel"),
        initrd=boot.get("initrd"),
    )
    arguments = build(machine, engine.features, grants, accelerator=engine.accelerator, extra=extra)
    return Placed((engine.closure.program, *arguments), placed)
