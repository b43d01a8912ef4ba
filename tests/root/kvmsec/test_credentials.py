"""What is left of root after `become`: asked of the kernel, and tried."""

import ctypes
import errno
import os
import signal
import stat
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from kvmsec.linux import credentials, keyrings, namespaces, processes, syscalls
from kvmsec.linux.children import run_in_child
from kvmsec.linux.credentials import Credentials
from kvmsec.linux.errors import ChildFailed, ManyThreads

pytestmark = pytest.mark.root

SOMEBODY = Credentials(239901, 239902)
ROOT = Credentials(0, 0)


def as_somebody(function: Callable[[], Any], who: Credentials) -> Any:
    return run_in_child(function, what="acting", timeout_s=10, credentials=who)


def look() -> Any:
    status = processes.read_status(os.getpid())
    assert status is not None
    return [status.uids, status.gids, status.groups, status.capabilities, status.no_new_privs]


@pytest.mark.parametrize("who", [SOMEBODY, ROOT])
def test_nothing_is_left_but_the_ids(who: Credentials) -> None:
    os.setgroups([0, 4, 27])
    try:
        told = as_somebody(look, who)
    finally:
        os.setgroups([])
    assert told == [[who.uid] * 4, [who.gid] * 4, [], [0] * 5, True]


@pytest.mark.parametrize("who", [SOMEBODY, ROOT])
def test_no_other_process_of_the_uid_can_trace_it(who: Credentials) -> None:
    """Its memory is the launcher's, of which it is a copy, until it executes something else."""
    get_dumpable = 3
    assert as_somebody(lambda: syscalls.prctl(get_dumpable), who) == 0


def attempts(directory: Path) -> dict[str, Callable[[], Any]]:
    return {
        "mount": lambda: namespaces.mount("x", str(directory), "tmpfs", 0),
        "mknod": lambda: os.mknod(directory / "node", stat.S_IFBLK | 0o600, os.makedev(8, 0)),
        "chown": lambda: os.chown(directory / "file", 1, 1),
        "another uid": lambda: os.setresuid(1, 1, 1),
        "groups": lambda: os.setgroups([0]),
        "unshare": lambda: syscalls.unshare(namespaces.CLONE_NEWNET),
        "chroot": lambda: os.chroot("/"),
        "another's file": lambda: os.open(directory / "private", os.O_RDONLY),
        "a capability": lambda: syscalls.set_capabilities(1, 1, 0),
        "reboot": lambda: syscalls._checked(syscalls._libc.reboot(0)),
    }


@pytest.mark.parametrize("what", attempts(Path()))
@pytest.mark.parametrize("who", [SOMEBODY, ROOT])
def test_neither_somebody_nor_a_bare_root_can(what: str, who: Credentials, tmp_path: Path) -> None:
    tmp_path.parent.chmod(0o755)
    for path, owner in ((tmp_path / "file", who.uid), (tmp_path / "private", 239900)):
        path.touch(mode=0o600)
        os.chown(path, owner, owner)
    os.chown(tmp_path, who.uid, who.gid)
    for parent in (tmp_path, *tmp_path.parents[:-2]):
        parent.chmod(0o755)
    with pytest.raises(ChildFailed) as raised:
        as_somebody(attempts(tmp_path)[what], who)
    assert raised.value.kind in ("PermissionError", "OSError")
    assert f"[Errno {errno.EPERM}]" in raised.value.detail or "denied" in raised.value.detail


def test_the_session_keyring_of_roots_login_stays_behind() -> None:
    """Its keys would be the possessor's to read, whatever uid that has."""
    libc = ctypes.CDLL(None, use_errno=True)
    keyctl, add_key, session, search = 250, 248, -3, 10

    def search_it() -> int:
        found = libc.syscall(keyctl, search, session, b"user", b"kvmsec-test", 0)
        return found if found >= 0 else -ctypes.get_errno()

    def hold_a_key_and_ask() -> Any:
        keyrings.join_new_session()
        assert libc.syscall(add_key, b"user", b"kvmsec-test", b"secret", 6, session) > 0
        assert search_it() > 0
        return [as_somebody(search_it, SOMEBODY), as_somebody(search_it, ROOT)]

    try:
        keyrings.join_new_session()
    except OSError as error:
        if error.errno not in (errno.ENOSYS, errno.EPERM):
            raise
        pytest.skip("this kernel has no keys")
    told = run_in_child(hold_a_key_and_ask, what="holding a key", timeout_s=20)
    assert all(-found in (errno.ENOKEY, errno.EACCES) for found in told)


@pytest.mark.parametrize(
    ("left_undone", "told"),
    [
        ("set_capabilities", "capabilities"),
        ("prctl", "bounding set"),
    ],
)
def test_a_drop_that_silently_did_nothing_is_found(left_undone: str, told: str) -> None:
    def become_badly() -> None:
        real = getattr(syscalls, left_undone)

        def reading_only(*arguments: int) -> int | None:
            asked = (23, 39, 3)  # CAPBSET_READ, GET_NO_NEW_PRIVS, GET_DUMPABLE
            reads = left_undone == "prctl" and arguments[0] in asked
            return real(*arguments) if reads else 0

        setattr(syscalls, left_undone, reading_only)
        credentials.become(ROOT)

    with pytest.raises(ChildFailed, match=told) as raised:
        run_in_child(become_badly, what="becoming", timeout_s=10)
    assert raised.value.kind == "PermissionError"


def test_acting_as_somebody_lasts_as_long_as_its_block() -> None:
    def act() -> Any:
        os.setgroups([4, 27])
        syscalls.end_with_parent(signal.SIGUSR1)
        before = [*look(), *kept()]
        with credentials.acting_as(SOMEBODY):
            inside = look()
        return [inside, before, [*look(), *kept()]]

    def kept() -> Any:
        get_dumpable = 3
        return [syscalls.prctl(get_dumpable), syscalls.signal_at_parents_end()]

    inside, before, after = run_in_child(act, what="acting", timeout_s=10)
    assert inside[0] == [0, SOMEBODY.uid, 0, SOMEBODY.uid]
    assert inside[1] == [0, SOMEBODY.gid, 0, SOMEBODY.gid]
    assert inside[2] == []
    effective = 2  # proc(5): inheritable, permitted, effective
    assert inside[3][effective] == 0
    assert after == before
    assert (after[2], after[5:]) == ([4, 27], [1, signal.SIGUSR1])


def test_no_handler_runs_as_somebody() -> None:
    def act() -> Any:
        seen = []
        signal.signal(signal.SIGUSR1, lambda number, frame: seen.append(os.geteuid()))
        with credentials.acting_as(SOMEBODY):
            signal.raise_signal(signal.SIGUSR1)
        return seen

    assert run_in_child(act, what="acting", timeout_s=10) == [0]


def test_who_acts_as_somebody_is_root_again_whatever_is_raised() -> None:
    def act() -> Any:
        try:
            with credentials.acting_as(SOMEBODY):
                raise KeyError
        except KeyError:
            return look()

    assert run_in_child(act, what="acting", timeout_s=10)[0] == [0] * 4


def test_who_could_change_only_some_ids_has_the_former_ones() -> None:
    def act() -> Any:
        os.setgroups([4])
        real = os.seteuid

        def refused(uid: int) -> None:
            if uid:
                raise PermissionError(errno.EPERM, os.strerror(errno.EPERM))
            real(uid)

        vars(os)["seteuid"] = refused
        try:
            with credentials.acting_as(SOMEBODY):
                pass
        except PermissionError:
            return look()[:3]

    assert run_in_child(act, what="acting", timeout_s=10) == [[0] * 4, [0] * 4, [4]]


def test_a_parent_that_ends_meanwhile_is_not_outlived() -> None:
    """The kernel forgets the wish with each change of ids, and tells nobody afterwards."""

    def act() -> Any:
        reader, writer = os.pipe()
        parent = os.fork()
        if parent == 0:
            if os.fork() == 0:
                act_until_alone(writer)
            os.read(reader, 1)  # It acts by now.
            os._exit(0)
        os.close(writer)
        os.waitpid(parent, 0)
        return os.read(reader, 1).decode()  # Empty once the grandchild has ended.

    def act_until_alone(writer: int) -> None:
        parent = os.getppid()
        syscalls.end_with_parent()
        with credentials.acting_as(SOMEBODY):
            os.write(writer, b"a")
            while os.getppid() == parent:
                os.sched_yield()
        os.write(writer, b"x")
        os._exit(0)

    assert run_in_child(act, what="acting", timeout_s=10) == ""


def test_a_process_with_several_threads_can_not_act_as_somebody() -> None:
    done = threading.Event()
    other = threading.Thread(target=done.wait)
    other.start()
    try:
        with pytest.raises(ManyThreads), credentials.acting_as(SOMEBODY):
            pass
    finally:
        done.set()
        other.join()
    assert os.geteuid() == 0
