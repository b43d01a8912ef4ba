"""How far a look at a uid goes, and that nobody who is in the way makes it less than a proof."""

import ctypes
import os
import resource
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from kvmsec.linux.children import Child, run_in_child
from kvmsec.linux.credentials import Credentials
from kvmsec.linux.processes import pids
from uidpool import usage
from uidpool.files import Bounds, let_look_deep
from uidpool.usage import Usage, inspect, is_evidently_clean

pytestmark = pytest.mark.root
Spawn = Callable[..., Child]
Cleaner = Callable[..., Usage]
libc = ctypes.CDLL(None, use_errno=True)


@pytest.fixture(autouse=True)
def quick_bounds(monkeypatch: pytest.MonkeyPatch) -> None:
    """More than other tests leave in /tmp, and time enough for a machine that others use."""
    monkeypatch.setattr(usage, "_QUICK_BOUNDS", Bounds(seconds=5, entries=50_000))


def act_as(uid: int, function: Callable[[], object]) -> object:
    return run_in_child(
        function, what="the test's child", timeout_s=20, credentials=Credentials(uid, uid)
    )


def dig(levels: int) -> None:
    os.chdir("/tmp")
    for _ in range(levels):
        os.mkdir("d")
        os.chdir("d")
    Path("bottom").touch()


def test_a_deep_tree_is_found_and_removed(uid: int, cleaner: Cleaner) -> None:
    act_as(uid, lambda: dig(300))
    assert inspect(uid).file_count == 301
    assert cleaner(uid).is_clean
    assert not Path("/tmp/d").exists()


def test_a_child_that_was_made_for_it_goes_as_deep_as_paths_do_not(
    uid: int, cleaner: Cleaner
) -> None:
    act_as(uid, lambda: dig(5000))  # A path has 4,096 bytes at most.

    def clean(*, deep: bool) -> str:
        _, allowed = resource.getrlimit(resource.RLIMIT_NOFILE)
        resource.setrlimit(resource.RLIMIT_NOFILE, (1024, allowed))
        if deep:
            let_look_deep()
        return cleaner(uid).reason()

    def said(deep: bool) -> str:
        return str(run_in_child(lambda: clean(deep=deep), what="cleaning", timeout_s=60))

    assert "deep" in said(False)
    assert said(True) == "nothing"
    assert not Path("/tmp/d").exists()


def test_files_of_a_neighbour_do_not_obscure_the_look(uid: int, cleaner: Cleaner) -> None:
    def crowd() -> None:
        for number in range(60_000):
            os.close(os.open(f"/tmp/{number}", os.O_CREAT | os.O_WRONLY))
        dig(200)

    act_as(uid + 100, crowd)
    try:
        assert inspect(uid).is_clean
        assert not is_evidently_clean(uid)
        act_as(uid, lambda: Path("/tmp/mine").touch())
        assert cleaner(uid).is_clean
        assert not Path("/tmp/mine").exists()
    finally:
        assert cleaner(uid + 100).is_clean


def test_who_is_in_the_way_is_named(uid: int, cleaner: Cleaner) -> None:
    def crowd() -> None:
        for number in range(100):
            Path(f"/dev/shm/{number}").touch()

    act_as(uid + 100, crowd)
    found = inspect(uid, bounds=Bounds(entries=50))
    assert found.is_obscured
    assert f"50 of 51 files looked at are uid {uid + 100}'s" in found.reason()
    assert cleaner(uid + 100).is_clean


def make_semaphores() -> None:
    for _ in range(2000):
        libc.semget(0, 1, 0o1600)


@pytest.mark.parametrize(
    "leave",
    [
        lambda: Path("/tmp/left").touch(),
        lambda: libc.shmget(0, 4096, 0o1600),
        lambda: libc.mq_open(b"/left", os.O_CREAT | os.O_RDWR, 0o600, None),
        # syscall(SYS_add_key, type, description, payload, size, KEY_SPEC_USER_KEYRING)
        lambda: libc.syscall(248, b"user", b"left", b"x", ctypes.c_size_t(1), ctypes.c_long(-4)),
    ],
    ids=["file", "ipc", "queue", "keys"],
)
def test_a_short_look_proves_a_uid_clean_or_nothing(
    uid: int, cleaner: Cleaner, leave: Callable[[], object]
) -> None:
    assert is_evidently_clean(uid)
    act_as(uid, leave)
    assert not is_evidently_clean(uid)
    assert cleaner(uid).is_clean
    assert is_evidently_clean(uid)


def test_a_short_look_sees_processes(uid: int, spawn: Spawn) -> None:
    child = spawn(uid)
    assert not is_evidently_clean(uid)
    child.kill()
    while inspect(uid).keys:  # Its keyrings are collected a moment later.
        time.sleep(0.005)
    assert is_evidently_clean(uid)


def test_a_short_look_passes_over_many_that_are_settled(
    uid: int, spawn: Spawn, monkeypatch: pytest.MonkeyPatch
) -> None:
    children = [spawn(uid + 100) for _ in range(3)]
    monkeypatch.setattr(usage, "_QUICK_PROCESSES", len(pids()) - 1)
    assert not is_evidently_clean(uid)
    assert is_evidently_clean(uid, lambda: {one.pid: uid + 100 for one in children})


def test_what_is_too_much_for_a_short_look_is_no_proof(uid: int, cleaner: Cleaner) -> None:
    act_as(uid + 100, make_semaphores)
    assert not is_evidently_clean(uid)
    assert inspect(uid).is_clean
    assert cleaner(uid + 100).is_clean
