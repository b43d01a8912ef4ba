"""What the privileged tests of the uid pool share: a uid of their own each, and acting as it."""

import itertools
import os
import signal
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from kvmsec.linux.children import Child, start_child
from kvmsec.linux.credentials import Credentials
from uidpool import usage
from uidpool.ranges import UidRanges

REAPER_UID = 990
_uids = itertools.count(211000)

Spawn = Callable[..., Child]


@pytest.fixture
def cleaner(tmp_path: Path) -> usage.Cleaner:
    return usage.Cleaner(
        pool=UidRanges.parse("210000-219999"),
        reaper_uid=REAPER_UID,
        sweep_lock=tmp_path / "sweep.lock",
    )


@pytest.fixture
def uid(cleaner: usage.Cleaner) -> Iterator[int]:
    """A uid that has nothing; whatever it has at the end of the test is cleaned."""
    chosen = next(_uids)
    left = cleaner(chosen)
    assert left.is_clean, left.reason()
    yield chosen
    cleaner(chosen)


@pytest.fixture
def spawn() -> Iterator[Spawn]:
    """Starts a child as a uid, and returns once its function has; it then waits to be killed."""
    children: list[Child] = []

    def start(uid: int | None, function: Callable[[], object] = lambda: None) -> Child:
        reader, writer = os.pipe()

        def work() -> None:
            function()
            os.write(writer, b"!")
            signal.pause()

        credentials = None if uid is None else Credentials(uid, uid)
        child = start_child(work, what="the test's child", credentials=credentials, keep=[writer])
        os.close(writer)
        children.append(child)
        try:
            if not os.read(reader, 1):
                child.collect(10)
        finally:
            os.close(reader)
        return child

    yield start
    for child in children:
        child.close()
