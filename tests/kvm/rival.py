"""Other processes that act on the same node."""

import json
import os
import select
import signal
from collections.abc import Callable
from typing import Any

DEADLINE_S = 30.0


class Rival:
    """A process that was forked off to act on a node, and may be killed at it."""

    def __init__(self, work: Callable[[], object]) -> None:
        reader, writer = os.pipe()
        self.pid = os.fork()
        if self.pid == 0:
            self._work(work, writer)
        os.close(writer)
        self._reader = reader
        self.pidfd = os.pidfd_open(self.pid)

    @staticmethod
    def _work(work: Callable[[], object], writer: int) -> None:
        try:
            try:
                answer: dict[str, object] = {"value": work()}
            except BaseException as error:
                answer = {"error": type(error).__name__, "message": str(error)}
            os.write(writer, json.dumps(answer, default=str).encode())
        finally:
            os._exit(0)

    def kill(self) -> None:
        os.kill(self.pid, signal.SIGKILL)

    def ends_within(self, seconds: float) -> bool:
        return bool(select.select([self.pidfd], [], [], seconds)[0])

    def outcome(self) -> dict[str, Any] | None:
        """What it returned or raised; None when it was killed."""
        with open(self._reader, "rb") as pipe:
            ready, _, _ = select.select([self.pidfd, pipe], [], [], 2 * DEADLINE_S)
            assert ready, "the other process does not end"
            if pipe not in ready and not select.select([pipe], [], [], 0)[0]:
                said = b""  # It was killed, and something that it started still holds the pipe.
            else:
                said = os.read(pipe.fileno(), 1 << 20)
        assert self.ends_within(DEADLINE_S)
        os.waitpid(self.pid, 0)
        os.close(self.pidfd)
        return json.loads(said) if said else None
