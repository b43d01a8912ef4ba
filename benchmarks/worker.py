"""A process that measures apart from the benchmark's own: a peer's, or a small one of kvmsec's."""

import contextlib
import json
import subprocess
from collections.abc import Iterator, Sequence
from typing import Any

from attrs import frozen


class WorkerFailed(Exception):
    """It could not do what it was told, or does not run."""


@frozen
class Worker:
    """Each order is a line of JSON, and so is its answer: see `workers/orders.py`."""

    process: subprocess.Popen[str]

    def ask(self, order: str, **arguments: object) -> Any:
        """Raises WorkerFailed with what the worker said."""
        assert self.process.stdin is not None and self.process.stdout is not None
        try:
            self.process.stdin.write(json.dumps({"order": order, **arguments}) + "\n")
            self.process.stdin.flush()
            line = self.process.stdout.readline()
        except BrokenPipeError:
            line = ""
        answer = json.loads(line) if line else {"failed": "it ended"}
        if "failed" in answer:
            raise WorkerFailed(f"{order}: {answer['failed']}")
        return answer["done"]


@contextlib.contextmanager
def running(argv: Sequence[str]) -> Iterator[Worker]:
    """A worker that ends with the block."""
    process = subprocess.Popen(argv, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert process.stdin is not None
    try:
        yield Worker(process)
    finally:
        with contextlib.suppress(BrokenPipeError):
            process.stdin.close()  # Which ends it.
        process.wait()
