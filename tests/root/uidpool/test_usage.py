"""Everything that a uid can leave on a node is found, and is gone after a cleaning."""

import contextlib
import ctypes
import os
import socket
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from kvmsec.linux import namespaces
from kvmsec.linux.children import Child, run_in_child
from kvmsec.linux.credentials import Credentials
from kvmsec.linux.syscalls import mount, umount
from uidpool import usage
from uidpool.files import Bounds
from uidpool.usage import Usage, inspect

pytestmark = pytest.mark.root
Spawn = Callable[..., Child]
Cleaner = Callable[..., Usage]
PLACES = ("/dev/shm", "/tmp", "/var/tmp", "/run/lock")
libc = ctypes.CDLL(None, use_errno=True)


def act_as(uid: int, function: Callable[[], object]) -> object:
    return run_in_child(
        function, what="the test's child", timeout_s=20, credentials=Credentials(uid, uid)
    )


# --- IPC


def make_sysv() -> None:
    assert libc.shmget(0, 4096, 0o1600) >= 0
    assert libc.msgget(0, 0o1600) >= 0
    assert libc.semget(0, 1, 0o1600) >= 0


def test_system_v_objects_are_found_and_removed(uid: int, cleaner: Cleaner) -> None:
    act_as(uid, make_sysv)
    act_as(uid + 100, make_sysv)
    assert sorted(one.kind for one in inspect(uid).ipc) == ["msg", "sem", "shm"]
    assert cleaner(uid).is_clean
    assert len(inspect(uid + 100).ipc) == 3
    assert cleaner(uid + 100).is_clean


class IpcPermissions(ctypes.Structure):
    _fields_ = (
        ("key", ctypes.c_int),
        ("uid", ctypes.c_uint),
        ("gid", ctypes.c_uint),
        ("rest", ctypes.c_char * 240),
    )


def test_an_object_that_was_given_away_belongs_to_both(uid: int, cleaner: Cleaner) -> None:
    def give_away() -> None:
        number = libc.shmget(0, 4096, 0o1600)
        described = IpcPermissions()
        assert libc.shmctl(number, 2, ctypes.byref(described)) == 0  # IPC_STAT
        described.uid = uid + 100
        assert libc.shmctl(number, 1, ctypes.byref(described)) == 0  # IPC_SET

    act_as(uid, give_away)
    assert len(inspect(uid).ipc) == 1
    assert len(inspect(uid + 100).ipc) == 1
    assert cleaner(uid).is_clean
    assert inspect(uid + 100).is_clean


def test_a_segment_that_a_neighbour_keeps_attached_is_reported(
    uid: int, spawn: Spawn, cleaner: Cleaner
) -> None:
    number = act_as(uid, lambda: libc.shmget(0, 4096, 0o1666))
    libc.shmat.restype = ctypes.c_void_p
    neighbour = spawn(uid + 100, lambda: libc.shmat(number, None, 0))
    left = cleaner(uid)
    assert [one.kind for one in left.ipc] == ["shm"]
    assert f"shm {number}" in left.reason()
    neighbour.kill()
    assert cleaner(uid).is_clean


def make_queue(name: bytes) -> None:
    assert libc.mq_open(name, os.O_CREAT | os.O_RDWR, 0o600, None) >= 0


def test_a_posix_message_queue_is_found_and_removed(uid: int, cleaner: Cleaner) -> None:
    act_as(uid, lambda: make_queue(b"/mine"))
    act_as(uid + 100, lambda: make_queue(b"/theirs"))
    assert inspect(uid).files == ("/dev/mqueue/mine",)
    assert cleaner(uid).is_clean
    assert inspect(uid + 100).files == ("/dev/mqueue/theirs",)
    assert cleaner(uid + 100).is_clean


# --- keys

USER_KEYRING, USER_SESSION_KEYRING, PROCESS_KEYRING = -4, -5, -2


def keyctl(*words: int | None) -> int:
    return libc.syscall(250, *(None if word is None else ctypes.c_long(word) for word in words))


def add_key(name: bytes, keyring: int) -> int:
    number = libc.syscall(248, b"user", name, b"secret", ctypes.c_size_t(6), ctypes.c_long(keyring))
    assert number > 0
    return number


def persistent_keyring() -> int:
    return keyctl(22, -1, PROCESS_KEYRING)


def plant_keys() -> None:
    add_key(b"in-user", USER_KEYRING)
    add_key(b"in-user-session", USER_SESSION_KEYRING)
    add_key(b"in-persistent", persistent_keyring())


def search_keys() -> list[str]:
    """The planted keys that the caller finds."""
    rings = {b"in-user": USER_KEYRING, b"in-user-session": USER_SESSION_KEYRING,
             b"in-persistent": persistent_keyring()}  # fmt: skip
    return [
        name.decode()
        for name, ring in rings.items()
        if libc.syscall(250, 10, ctypes.c_long(ring), b"user", name, 0) > 0  # KEYCTL_SEARCH
    ]


def test_the_next_holder_finds_no_key_of_the_last(uid: int, cleaner: Cleaner) -> None:
    act_as(uid, plant_keys)
    assert act_as(uid, search_keys) == ["in-user", "in-user-session", "in-persistent"]
    assert inspect(uid).keys >= 6
    left = cleaner(uid)
    assert left.is_clean, left.reason()
    assert act_as(uid, search_keys) == []


def test_keys_that_expired_or_were_revoked_hold_nothing_up(uid: int, cleaner: Cleaner) -> None:
    def plant() -> None:
        keyctl(3, add_key(b"revoked", USER_KEYRING))
        keyctl(15, add_key(b"expiring", USER_KEYRING), 1)
        add_key(b"in-process", PROCESS_KEYRING)
        keyctl(5, add_key(b"no-rights", USER_KEYRING), 0)

    act_as(uid, plant)
    left = cleaner(uid)
    assert left.is_clean, left.reason()


@pytest.mark.parametrize(
    "name",
    [
        *(b"a\nb", b"a\rb", b"\n\r\n"),
        b"a\nzz I--Q 1 perm 3f %d 0 x",
        # That of the process's own keyring (-2), for who takes it for a row.
        b"a\nfffffffe I--Q--- 1 perm 3f3f0000 %d 0 user x",
    ],
)
def test_a_keys_name_is_no_line_of_its_own(uid: int, cleaner: Cleaner, name: bytes) -> None:
    """The kernel shows it as it is, and a key that everybody may view to everybody."""

    chosen = name.replace(b"%d", b"%d" % uid)

    def plant_for_all() -> None:
        key = add_key(chosen, PROCESS_KEYRING)
        assert keyctl(5, key, 0x3F3F3F3F) == keyctl(8, key, USER_KEYRING) == 0

    act_as(uid + 100, plant_for_all)
    act_as(uid, plant_keys)
    assert act_as(uid, lambda: chosen in Path("/proc/keys").read_bytes())
    for one in (uid, uid + 100):
        left = cleaner(one)
        assert left.is_clean, left.reason()


@contextlib.contextmanager
def acting_in_a_user_namespace(uid: int, function: Callable[[], object]) -> Iterator[None]:
    """Run a function as the uid in a user namespace; its keyrings stay until the block ends."""
    parent, child = socket.socketpair()
    pid = os.fork()
    if pid == 0:
        try:
            parent.close()
            namespaces.unshare(0x10000000)  # CLONE_NEWUSER
            child.send(b"unshared")
            child.recv(9)
            inner = os.fork()
            if inner == 0:
                os.setresuid(uid, uid, uid)
                function()
                os._exit(0)
            os.waitpid(inner, 0)
            child.send(b"acted")
            child.recv(9)
        finally:
            os._exit(0)
    child.close()
    parent.recv(9)
    for name in ("uid_map", "gid_map"):
        Path(f"/proc/{pid}/{name}").write_text("0 0 1000000")
    parent.send(b"mapped")
    parent.recv(9)
    yield
    parent.close()
    os.waitpid(pid, 0)


def test_a_key_out_of_reach_is_reported(
    uid: int, cleaner: Cleaner, monkeypatch: pytest.MonkeyPatch
) -> None:
    with acting_in_a_user_namespace(uid, plant_keys), monkeypatch.context() as patient:
        # None of them will ever be collected, however long it waits.
        patient.setattr(usage, "_COLLECTED_WITHIN_S", 1.0)
        left = cleaner(uid)
        assert left.keys > 0
        assert "keys in the kernel" in left.reason()
    deadline = time.monotonic() + 5
    while inspect(uid).keys and time.monotonic() < deadline:
        time.sleep(0.01)
    assert cleaner(uid).is_clean


# --- files


def leave_files(place: str) -> None:
    base = Path(place) / "left"
    base.mkdir()
    (base / "file").write_text("x")
    (base / "link").symlink_to("/etc/passwd")
    os.mkfifo(base / "fifo")
    with socket.socket(socket.AF_UNIX) as bound:
        bound.bind(str(base / "socket"))
    os.link(base / "file", Path(place) / "hard")
    (base / "inner/deep").mkdir(parents=True)
    (base / "inner/deep/file").write_text("x")
    (base / "inner/deep").chmod(0)
    base.chmod(0o300)


def test_files_are_found_in_every_shared_place_and_removed(uid: int, cleaner: Cleaner) -> None:
    for place in PLACES:
        act_as(uid, lambda place=place: leave_files(place))  # type: ignore[misc]
    found = inspect(uid)
    assert found.file_count == 9 * len(PLACES)
    assert len(found.files) == 20
    assert "more" in found.reason()
    assert cleaner(uid).is_clean
    assert Path("/etc/passwd").exists()
    for place in PLACES:
        assert not (Path(place) / "left").exists()
        assert not (Path(place) / "hard").exists()


def test_the_files_of_others_are_left_alone(uid: int, cleaner: Cleaner, tmp_path: Path) -> None:
    for place in PLACES:
        (Path(place) / "roots").write_text("x")
    act_as(uid, lambda: leave_files("/tmp"))
    assert cleaner(uid).is_clean
    assert all((Path(place) / "roots").exists() for place in PLACES)


def test_a_link_out_of_the_shared_places_is_not_followed(
    uid: int, cleaner: Cleaner, tmp_path: Path
) -> None:
    victim = Path("/var/lib/victim")
    victim.mkdir()
    (victim / "kept").write_text("x")
    os.chown(victim / "kept", uid, uid)
    os.chown(victim, uid, uid)
    act_as(uid, lambda: Path("/tmp/way-out").symlink_to(victim))
    assert inspect(uid).files == ("/tmp/way-out",)
    assert cleaner(uid).is_clean
    assert (victim / "kept").exists()


def test_a_directory_with_somebody_elses_file_stays_with_it(uid: int, cleaner: Cleaner) -> None:
    act_as(uid, lambda: Path("/tmp/shared").mkdir())
    kept = Path("/tmp/shared/roots")
    kept.write_text("x")
    left = cleaner(uid)
    assert left.files == ("/tmp/shared",)
    assert kept.read_text() == "x"
    kept.unlink()
    assert cleaner(uid).is_clean


@pytest.mark.parametrize("kind", ["tmpfs", "bind"])
def test_other_mounts_are_not_entered(uid: int, cleaner: Cleaner, kind: str) -> None:
    point, source = Path("/tmp/a mount"), Path("/tmp/source")
    point.mkdir()
    source.mkdir()
    if kind == "tmpfs":
        mount("x", str(point), "tmpfs", 0)
    else:
        mount("/var/lib", str(point), None, namespaces.MS_BIND)
    try:
        inside = point / "inside"
        inside.write_text("x")
        os.chown(inside, uid, uid)
        assert inspect(uid).is_clean
        assert cleaner(uid).is_clean
        assert inside.exists()
        inside.unlink()
    finally:
        umount(str(point))
        point.rmdir()
        source.rmdir()


def test_a_mounted_file_is_not_looked_at(uid: int) -> None:
    target, source = Path("/tmp/target"), Path("/var/lib/source")
    target.touch()
    source.touch()
    os.chown(source, uid, uid)
    mount(str(source), str(target), None, namespaces.MS_BIND)
    try:
        assert inspect(uid).is_clean
    finally:
        umount(str(target))
        target.unlink()
        source.unlink()


@pytest.mark.parametrize(
    ("bounds", "reason"),
    [
        (Bounds(entries=10), "more than 10 files"),
        (Bounds(seconds=0.0), "took over 0 s"),
        (Bounds(depth=3), "over 3 deep"),
        (Bounds(waiting=0), "more than 0 directories wait"),
    ],
)
def test_what_is_over_a_bound_is_no_proof(uid: int, bounds: Bounds, reason: str) -> None:
    deep = Path("/tmp/many/1/2/3/4")
    deep.mkdir(parents=True, exist_ok=True)
    for number in range(10):
        (deep / str(number)).touch()
    found = inspect(uid, bounds=bounds)
    assert not found.is_clean
    assert reason in (found.incomplete or "")
    assert len(found.reason()) < 400


def test_names_are_escaped_where_a_person_reads_them(uid: int, spawn: Spawn) -> None:
    act_as(uid, lambda: Path("/tmp/\x1b[2J\nfake").touch())
    spawn(uid, lambda: libc.prctl(15, b"\x1b[2J\nUid:\t0", 0, 0, 0))  # PR_SET_NAME
    reason = inspect(uid).reason()
    assert "\x1b" not in reason
    assert "\n" not in reason
    assert len(inspect(uid).processes) == 1
