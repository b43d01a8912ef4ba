"""What the privileged tests of uids share: a uid of their own each, and acting as it."""

import itertools
import os
import signal
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import pytest

from kvmsec.linux.children import Child, start_child
from kvmsec.linux.credentials import Credentials
from uidpool import provision, usage
from uidpool.ranges import UidRanges
from uidpool.snapshot import Snapshot

USERS = UidRanges.parse("211000-211199")
_uids = itertools.count(211000)  # A test has uid + 100 as well.

Cleaner = Callable[..., usage.Usage]
Spawn = Callable[..., Child]


@pytest.fixture(scope="module")
def reaper_uid() -> Iterator[int]:
    """The reaper, made along with the users that `uid` gives out."""
    provision.apply(provision.plan(USERS, Snapshot.read()))
    reaper = provision.look_up_reaper()
    assert reaper is not None
    yield reaper.uid
    provision.remove(provision.plan_removal(USERS, Snapshot.read()))


@pytest.fixture
def cleaner(tmp_path: Path, reaper_uid: int) -> Cleaner:
    """`usage.clean` for one uid."""
    return partial(usage.clean, reaper_uid=reaper_uid, sweep_lock=tmp_path / "sweep.lock")


@pytest.fixture
def uid(cleaner: Cleaner) -> Iterator[int]:
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
