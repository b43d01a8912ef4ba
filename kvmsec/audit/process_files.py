"""The files of one process in /proc: each read bounded, and never those of its pid's next holder.

A descriptor of /proc/PID stays with the process that it was opened for: once that is gone, every
look through it fails, whoever has the pid then (proc(5)).
"""

import errno
import os
from collections.abc import Iterator
from types import TracebackType
from typing import Final, Self

from kvmsec.linux.errors import Fault
from kvmsec.linux.files import read_bounded
from kvmsec.linux.namespaces import CLONE_NEWNET, setns
from kvmsec.linux.processes import pids

FILE_LIMIT_BYTES: Final = 4 << 20
_ENTRIES: Final = 1 << 14
_GONE: Final = (errno.ESRCH, errno.ENOENT)


class ProcessGone(Fault):
    """There is no such process, or it ended while it was read."""

    def __init__(self, pid: int) -> None:
        super().__init__(
            f"there is no process {pid}", hint="`kvmsec audit --all` lists the QEMU processes here"
        )
        self.pid = pid


class TooMuch(ValueError):
    """A process has more of something than the reader looks at."""


class ProcessFiles:
    """One process's directory in /proc, opened; reading raises OSError and TooMuch."""

    def __init__(self, pid: int) -> None:
        self.pid = pid
        try:
            self.directory = os.open(f"/proc/{pid}", os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        except (FileNotFoundError, ProcessLookupError):
            raise ProcessGone(pid) from None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        os.close(self.directory)

    def read(self, name: str, limit_bytes: int = FILE_LIMIT_BYTES) -> bytes:
        """A whole file; TooMuch when it has more than `limit_bytes`."""
        flags = os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK
        descriptor = os.open(name, flags, dir_fd=self.directory)
        try:
            return read_bounded(descriptor, limit_bytes)
        except ValueError:
            raise TooMuch(f"{name} has more than {limit_bytes} bytes") from None
        finally:
            os.close(descriptor)

    def link(self, name: str) -> str:
        """What a link of the kernel's says: a path or `net:[4026531840]`."""
        return os.readlink(name, dir_fd=self.directory)

    def status_of(self, name: str) -> os.stat_result:
        """What a link of the kernel's leads to (`exe`, `root`, `fd/3`), or a file's own status."""
        return os.stat(name, dir_fd=self.directory)

    def entries(self, name: str) -> list[str]:
        """The entries of a directory, as far as the reader goes; TooMuch beyond."""
        descriptor = os.open(
            name, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC, dir_fd=self.directory
        )
        try:
            found = []
            with os.scandir(descriptor) as listing:
                for entry in listing:
                    found.append(entry.name)
                    if len(found) > _ENTRIES:
                        raise TooMuch(f"{name} has more than {_ENTRIES} entries")
            return found
        finally:
            os.close(descriptor)

    def open_root(self) -> int:
        """A descriptor of its root directory."""
        return os.open("root", os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC, dir_fd=self.directory)

    def is_there(self) -> bool:
        """Whether it still runs: one that is gone has no files, and a zombie nothing but a name."""
        try:
            after_name = self._after_name()
        except OSError as error:
            if error.errno in _GONE:
                return False
            raise
        return after_name[0] not in (b"Z", b"X") or int(after_name[17]) > 1

    def start_ticks(self) -> int:
        """Its start in clock ticks since boot: with the pid, its identity."""
        return int(self._after_name()[19])

    def stack_start(self) -> int:
        """Where its stack begins: another place after each exec; 0 for who may not know."""
        return int(self._after_name()[25])

    def has_terminal(self) -> bool:
        """Whether it has a controlling terminal."""
        return self._after_name()[4] != b"0"

    def _after_name(self) -> list[bytes]:
        # The name may hold anything, spaces and parentheses too: count from the last parenthesis.
        stat = self.read("stat")
        return stat[stat.rindex(b")") + 2 :].split()


def open_host() -> ProcessFiles:
    """A process that stands for the host, what namespaces and root are compared with.

    Its first one; the caller where that may not be looked at (without root, or where it has
    privileges that the caller lacks).
    """
    init = ProcessFiles(1)
    try:
        init.link("ns/net")
        return init
    except PermissionError:
        os.close(init.directory)
        return ProcessFiles(os.getpid())


def enter_network_of(files: ProcessFiles) -> None:
    """Move the caller, a child of its own, into a process's network namespace. Raises OSError."""
    if files.link("ns/net") == os.readlink("/proc/self/ns/net"):
        return
    network = os.open("ns/net", os.O_RDONLY | os.O_CLOEXEC, dir_fd=files.directory)
    try:
        setns(network, CLONE_NEWNET)
    finally:
        os.close(network)


def others(pid: int) -> Iterator[ProcessFiles]:
    """Every other process that can be seen, each opened for as long as it is looked at."""
    for other in pids():
        if other == pid:
            continue
        try:
            files = ProcessFiles(other)
        except (ProcessGone, PermissionError):
            continue
        with files:
            yield files


def fields_of(status: bytes) -> dict[bytes, bytes]:
    """The lines of a /proc/PID/status; the kernel escapes newlines in a process's name."""
    lines = (line.partition(b":") for line in status.split(b"\n") if line)
    found: dict[bytes, bytes] = {}
    for key, _, value in lines:
        found.setdefault(key, value.strip())
    return found
