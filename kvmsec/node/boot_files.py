"""Firmware, kernel and initrd: opened for QEMU, which can't take them as descriptors."""

import errno
import os
import stat
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Final

from hypervisor.jail import BootFile
from hypervisor.machine import Machine
from kvmsec.errors import KvmsecError
from kvmsec.linux.files import open_without_links

LIMIT_BYTES: Final = 1 << 30


class BootFileRefused(KvmsecError):
    """A firmware, kernel or initrd that can't be given to an instance."""

    def __init__(self, role: str, path: Path, problem: str, *, hint: str | None = None) -> None:
        another = f"name another file: `{role}` in the definition, or --{role}"
        super().__init__(f"{role} {path}: {problem}", hint=hint or another)
        self.role = role
        self.path = path


def open_all(machine: Machine, opened: ExitStack) -> tuple[BootFile, ...]:
    """Open the files that a machine boots from; `opened` closes them. Raises BootFileRefused."""
    return tuple(_open(role, path, opened) for role, path in _named(machine))


def _named(machine: Machine) -> Iterator[tuple[str, Path]]:
    for role in ("firmware", "kernel", "initrd"):
        path = getattr(machine, role)
        if path is not None:
            yield role, path


def _open(role: str, path: Path, opened: ExitStack) -> BootFile:
    try:
        descriptor = _open_regular(role, path)
    except OSError as error:
        if error.errno == errno.ELOOP:
            hint = "name the real path (`realpath` shows it); links can be swapped by others"
            raise BootFileRefused(
                role, path, "there is a symbolic link in it", hint=hint
            ) from error
        raise BootFileRefused(role, path, os.strerror(error.errno or 0)) from error
    opened.callback(os.close, descriptor)
    status = os.fstat(descriptor)
    if not 0 < status.st_size <= LIMIT_BYTES:
        raise BootFileRefused(role, path, f"it has {status.st_size} bytes, not 1 to {LIMIT_BYTES}")
    return BootFile(descriptor, status.st_size, role)


def _open_regular(role: str, path: Path) -> int:
    """Open for reading what was seen to be a file; a device's driver might act (a watchdog's)."""
    reference = open_without_links(path, os.O_PATH)
    try:
        if not stat.S_ISREG(os.fstat(reference).st_mode):
            raise BootFileRefused(role, path, "it is not a regular file")
        return os.open(f"/proc/self/fd/{reference}", os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    finally:
        os.close(reference)
