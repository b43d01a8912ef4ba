"""A lock that another process has."""

import contextlib
import os
import signal
from collections.abc import Iterator
from pathlib import Path

from kvmsec.linux.children import Child, start_child
from kvmsec.linux.locks import FileLock


@contextlib.contextmanager
def held(path: Path) -> Iterator[Child]:
    """Another process has the lock, for as long as it is let live."""
    reader, writer = os.pipe()

    def hold() -> None:
        with FileLock(path):
            os.write(writer, b"!")
            signal.pause()

    with start_child(hold, what="the holder", keep=[writer]) as holder:
        os.close(writer)
        said = os.read(reader, 1)
        os.close(reader)
        assert said == b"!"
        yield holder
