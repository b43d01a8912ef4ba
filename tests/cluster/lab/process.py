"""A program that runs in a node, and what it left when it had ended."""

import os
import signal
from collections.abc import Callable
from pathlib import Path

from attrs import frozen

from kvmsec.linux.readiness import is_readable


@frozen
class Finished:
    """How a program ended: its status (negative: by that signal), None if its node died first."""

    argv: tuple[str, ...]
    status: int | None
    stdout: str
    stderr: str


class TookTooLong(AssertionError):
    """A program was still running past the time that the test gives it; it was killed."""


class Process:
    """A program in a node. `pid` is its number there; it ends with the node at the latest."""

    def __init__(
        self,
        argv: tuple[str, ...],
        pid: int,
        told_by: int,
        output: Path,
        send: Callable[[int, int, bool], None],
    ) -> None:
        self.argv = argv
        self.pid = pid
        self.output = output
        self._told_by = told_by
        self._send = send
        self._status: int | None = None

    @property
    def said(self) -> str:
        """What it has printed until now, on either stream."""
        return self.output.read_text(errors="replace")

    def ends_within(self, seconds: float) -> bool:
        return self._told_by < 0 or is_readable(self._told_by, seconds)

    def status(self, timeout_s: float) -> int | None:
        """Wait for its end. Raises TookTooLong, and ends it with all of its session then."""
        if self._told_by < 0:
            return self._status
        if not self.ends_within(timeout_s):
            self.end()
            raise TookTooLong(f"{' '.join(self.argv)} ran for more than {timeout_s:g} s\n")
        word = os.read(self._told_by, 16)
        self._status = int(word) if word else None
        self.forget()
        return self._status

    def signal(self, number: int) -> None:
        """Signal this process alone; one that has ended is fine."""
        self._send(self.pid, number, False)

    def end(self, timeout_s: float = 10.0) -> None:
        """SIGKILL it with all of its session, and wait until it is gone."""
        if self._told_by >= 0:
            self._send(self.pid, signal.SIGKILL, True)
            assert self.ends_within(timeout_s), f"{self.argv} outlives SIGKILL"
            self.status(0)

    def forget(self) -> None:
        """Close what tells of its end."""
        if self._told_by >= 0:
            os.close(self._told_by)
            self._told_by = -1
