"""What a uid still has on this node, and the end of all of it.

A uid goes to its next holder only when nothing is left: no process, no IPC object, no key and no
file where anybody may leave one.
"""

import contextlib
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Final

from attrs import evolve, frozen

from kvmsec.linux import keyrings
from kvmsec.linux.children import run_in_child
from kvmsec.linux.credentials import NOBODY, Credentials
from kvmsec.linux.errors import LinuxError
from kvmsec.linux.ipc import SysvObject, remove_sysv_object, sysv_objects
from uidpool.files import Bounds, Found, find_files, remove_files
from uidpool.processes import (
    Process,
    Settled,
    described,
    end_processes,
    find_processes,
    nobody_settled,
)

_SHOWN: Final = 5
# Together less than 20 ms, were all of it there to be looked at.
_QUICK_PROCESSES: Final = 400
_QUICK_TABLE_BYTES: Final = 64 * 1024
_QUICK_BOUNDS: Final = Bounds(seconds=0.008, entries=2000, depth=64)
_COLLECTED_WITHIN_S: Final = 15.0  # Some tens of ms; seconds where all CPUs are busy (RCU).
_COLLECTION_STEP_S: Final = 0.005


@frozen
class Usage:
    """What a uid has; `incomplete` says why it could not be found out for certain.

    `zombies` are ended processes that nobody has taken note of yet: they can do nothing, and do
    not count. `files` are some paths of `file_count`; `keys` is a number, since the kernel doesn't
    tell which. `is_crowded`: only the files could not all be looked at.
    """

    uid: int
    processes: tuple[Process, ...] = ()
    zombies: tuple[Process, ...] = ()
    ipc: tuple[SysvObject, ...] = ()
    keys: int = 0
    files: tuple[str, ...] = ()
    file_count: int = 0
    incomplete: str | None = None
    is_crowded: bool = False

    @property
    def is_clean(self) -> bool:
        return not (self.processes or self.ipc or self.keys or self.file_count or self.incomplete)

    @property
    def is_obscured(self) -> bool:
        """Whether nothing was found, and all but the files could be looked through."""
        found = self.processes or self.ipc or self.keys or self.file_count
        return self.is_crowded and not found

    def reason(self) -> str:
        """What is left in one line, safe to print; "nothing" when that is the case."""
        said = []
        if self.processes:
            said.append(f"processes {_some([str(one) for one in self.processes])}")
        if self.ipc:
            said.append(f"IPC objects {_some([str(one) for one in self.ipc])}")
        if self.keys:
            said.append(f"{self.keys} keys in the kernel")
        if self.file_count:
            names = [ascii(path)[:120] for path in self.files]
            said.append(f"files {_some(names, self.file_count)}")
        if self.incomplete:
            said.append(f"not looked through: {self.incomplete}")
        return "; ".join(said) or "nothing"


def _some(names: list[str], count: int | None = None) -> str:
    left_out = (len(names) if count is None else count) - len(names[:_SHOWN])
    return ", ".join(names[:_SHOWN]) + (f" and {left_out} more" if left_out > 0 else "")


def is_evidently_clean(uid: int, settled: Settled = nobody_settled) -> bool:
    """Whether a look of a few milliseconds proves that a uid has nothing; False proves nothing.

    For who has an event loop to keep running: a longer look belongs in a child then. No zombie
    either: it is to be reaped, or ended anew. Processes that are `settled` take no time. Raises
    nothing.
    """
    try:
        if find_processes(uid, settled=settled, at_most=_QUICK_PROCESSES):
            return False
        if sysv_objects(uid, limit_bytes=_QUICK_TABLE_BYTES) or keyrings.key_count(uid):
            return False
    except (OSError, ValueError):
        return False
    found = find_files(uid, bounds=_QUICK_BOUNDS)
    return not found.count and found.incomplete is None


def inspect(uid: int, *, bounds: Bounds | None = None) -> Usage:
    """What a uid has now; a part that can't be looked at makes the answer `incomplete`.

    Processes are looked for first: once there is none, none can come, and nothing is added behind
    the scan. About a millisecond on a node with a hundred processes, 20 us for each more, and 4 us
    for each file in the shared places.
    """
    return _looked_at(uid, lambda: find_files(uid, bounds=bounds))


def _looked_at(uid: int, look_at_files: Callable[[], Found]) -> Usage:
    problems: list[str] = []
    processes: list[Process] = []
    objects: list[SysvObject] = []
    keys = 0
    try:
        processes = find_processes(uid)
        objects = sysv_objects(uid)
        keys = keyrings.key_count(uid)
    except (OSError, ValueError) as error:
        problems.append(str(error))
    found = look_at_files()
    is_crowded = not problems and found.incomplete is not None
    if found.incomplete:
        problems.append(found.incomplete)
    return Usage(
        uid=uid,
        processes=described([one for one in processes if not one.is_zombie]),
        zombies=tuple(one for one in processes if one.is_zombie),
        ipc=tuple(objects),
        keys=keys,
        files=tuple(found.paths),
        file_count=found.count,
        incomplete="; ".join(problems) or None,
        is_crowded=is_crowded,
    )


def clean(uid: int, *, reaper_uid: int, sweep_lock: Path, timeout_s: float = 10.0) -> Usage:
    """End every process of a uid of the pool and remove what it left; returns what is still there.

    For the `pool` model alone: under another one a uid may have processes that are nobody's
    business here. What failed on the way is part of the answer. Raises NotSweepable for a uid that
    has something and can't be a pool's, and leaves that alone.
    """
    before = inspect(uid)
    if before.is_obscured or (before.is_clean and not before.zombies):
        return before
    failures: list[str] = []
    files: Found | None = None
    with _noting(failures):
        left = end_processes(uid, reaper_uid=reaper_uid, lock=sweep_lock, timeout_s=timeout_s)
        if not left:
            files = _remove_what_is_left(uid, failures)
    # Files that could not be removed were found by a scan when no process was there to add one.
    after = _looked_at(uid, lambda: find_files(uid) if files is None else files)
    if after.is_clean:
        return after
    problems = [*failures, after.incomplete] if after.incomplete else failures
    return evolve(after, incomplete="; ".join(problems) or None)


def _remove_what_is_left(uid: int, failures: list[str]) -> Found:
    """Once no process of the uid is there to put back what is taken; the files that are left."""
    with _noting(failures):
        for one in sysv_objects(uid):
            remove_sysv_object(one)
    with _noting(failures):
        _drop_keys(uid)
    return remove_files(uid)


@contextlib.contextmanager
def _noting(failures: list[str]) -> Iterator[None]:
    try:
        yield
    except (OSError, LinuxError) as error:
        failures.append(str(error))


def _drop_keys(uid: int) -> None:
    """Invalidate the uid's keys and wait until the kernel has collected them.

    The kernel tells nobody when it has, so this looks again every few milliseconds; it takes some
    tens of them.
    """
    if not keyrings.key_count(uid):
        return
    run_in_child(
        keyrings.invalidate_own_keys,
        what=f"dropping the keys of uid {uid}",
        timeout_s=_COLLECTED_WITHIN_S,
        credentials=Credentials(uid, NOBODY),
    )
    deadline = time.monotonic() + _COLLECTED_WITHIN_S
    while keyrings.key_count(uid) and time.monotonic() < deadline:
        time.sleep(_COLLECTION_STEP_S)
