"""Encounters over what an instance leaves behind: for its uid's next holder, and on the node."""

import contextlib
import ctypes
import os
import select
import signal
import socket
import stat
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final
from unittest.mock import patch

from hypervisor.jail import SECCOMP
from kvmsec.errors import UnknownInstance
from kvmsec.linux import command, keyrings, tun
from kvmsec.linux.children import run_in_child, start_child
from kvmsec.linux.credentials import Credentials
from kvmsec.linux.errors import ChildFailed, Fault
from tests.attacks.attack import SUCCEEDED, Encounter, Refusal, in_room
from tests.attacks.attacker import Answer, Instance, Unconfined
from tests.attacks.setting import BRIDGE, SOMEBODY
from tests.attacks.stage import DEADLINE_S, Stage, is_ended
from tests.kvm.lab import POOL
from uidpool.errors import PoolExhausted
from uidpool.ranges import UidRanges

_HOLDER: Final = "holder"
_libc: Final = ctypes.CDLL(None, use_errno=True)
_ADD_KEY, _KEYCTL = 248, 250  # x86_64
_KEYCTL_UNLINK, _KEYCTL_SEARCH, _KEYCTL_GET_PERSISTENT = 9, 10, 22  # linux/keyctl.h
_USER_KEYRING, _PROCESS_KEYRING = -4, -2
_LEFT_KEY: Final = b"left-behind"
_LEFT_QUEUE: Final = b"/left-behind"
_LEFT_SEGMENT: Final = 0x1EF7
"""As launcher.c has them."""
_IPC_RMID: Final = 0
_PLANTED: Final = 8
"""What `_planted` leaves: four files, three objects of the kernel's, and a process."""
_ANOTHER: Final = 248900


# For the next holder ------------------------------------------------------------------------------


@contextmanager
def _no_other_uid(stage: Stage, uid: int | None) -> Iterator[None]:
    """Let the next instance have this very uid, or none, under the model that draws them."""
    if not stage.is_pool:
        yield
        return
    stage.lab.modify(uid_pool=UidRanges.parse(f"{uid},{stage.setting.victim.uid}"))
    try:
        yield
    finally:
        stage.lab.modify(uid_pool=POOL)


def _order(stage: Stage, text: str) -> Answer:
    with Instance(stage.lab.paths.instance(_HOLDER).serial_socket) as inside:
        return inside.order(text)


def _found_by_next_holder(stage: Stage) -> Answer:
    """A set-uid copy; and what the filter keeps it from: keys in two keyrings, and memory.

    Message queues it is kept from by its limits.
    """
    program = stage.setting.program
    first = stage.start(_HOLDER, by=program)
    left = _order(stage, "leave-behind /output")
    there = _order(stage, "find-behind /output")
    stage.lab.stop(_HOLDER)
    with _no_other_uid(stage, first.uid):
        second = stage.start(_HOLDER, by=program)
        found = _order(stage, "find-behind /output")
        stage.lab.stop(_HOLDER)
    if not stage.is_pool:
        _forget_what_is_left(first.uid or 0)
    things = 4 if SECCOMP in stage.without else 1
    if second.uid != first.uid or there.found != f"found {things} things":
        return Answer("BROKEN", f"{first.uid}, {second.uid}: {there}")
    return Answer("GONE", left.found) if found.word == "NONE" else found


def _found_by_same_user(stage: Stage) -> Answer:
    place = stage.setting.scratch / "of-somebody"
    place.mkdir()
    place.chmod(0o777)
    try:
        with Unconfined(stage.setting.program, uid=SOMEBODY) as first:
            first.order(f"leave-behind {place}")
        with Unconfined(stage.setting.program, uid=SOMEBODY) as second:
            found = second.order(f"find-behind {place}")
            return found if found.found == "found 5 things" else Answer("BROKEN", found.found)
    finally:
        (place / "set-uid").unlink(missing_ok=True)
        place.rmdir()
        _forget_what_is_left(SOMEBODY)


def _forget_what_is_left(uid: int) -> None:
    """Keys and objects that no model but `pool` takes back, and nobody does of a plain process.

    To look for keys gives a uid some: one that is clean is not to be looked at so.
    """

    def forget() -> None:
        persistent = _libc.syscall(_KEYCTL, _KEYCTL_GET_PERSISTENT, -1, _PROCESS_KEYRING)
        for keyring in (_USER_KEYRING, persistent):
            key = _libc.syscall(_KEYCTL, _KEYCTL_SEARCH, keyring, b"user", _LEFT_KEY, 0)
            _libc.syscall(_KEYCTL, _KEYCTL_UNLINK, key, keyring)

    who = Credentials(uid, uid)
    run_in_child(forget, what="forgetting keys", timeout_s=DEADLINE_S, credentials=who)
    if (segment := _libc.shmget(_LEFT_SEGMENT, 0, 0)) >= 0:
        _libc.shmctl(segment, _IPC_RMID, None)
    _libc.mq_unlink(_LEFT_QUEUE)


# Outside its jail ---------------------------------------------------------------------------------


@contextmanager
def _planted(uid: int) -> Iterator[Callable[[], list[str]]]:
    """All that a uid can leave on a node, as if the instance had got out of its jail.

    Gives a look at what of it is there; the rest is taken back.
    """
    keys_before = keyrings.key_count(uid)
    files = [Path(place, f"left-{uid}") for place in ("/tmp", "/var/tmp", "/dev/shm", "/run/lock")]

    def leave() -> int:
        for file in files:
            file.write_text("still here")
        segment = _libc.shmget(_LEFT_SEGMENT, 4096, 0o1600)  # IPC_CREAT
        queue = _libc.mq_open(_LEFT_QUEUE, os.O_RDWR | os.O_CREAT, 0o600, None)
        key = _libc.syscall(_ADD_KEY, b"user", _LEFT_KEY, b"x", 1, _USER_KEYRING)
        if min(segment, queue, key) < 0:
            raise OSError(ctypes.get_errno(), "could not be left")
        if (staying := os.fork()) == 0:
            os.setsid()
            for number in signal.valid_signals() - {signal.SIGKILL, signal.SIGSTOP, 32, 33}:
                signal.signal(number, signal.SIG_IGN)
            os.closerange(3, 64)
            while True:
                signal.pause()
        return staying

    who = Credentials(uid, uid)
    staying = int(run_in_child(leave, what="leaving", timeout_s=DEADLINE_S, credentials=who))

    def look() -> list[str]:
        found = [str(file) for file in files if file.exists()]
        found += ["a segment"] * (_libc.shmget(_LEFT_SEGMENT, 0, 0) >= 0)
        found += ["a queue"] * (_has_queue())
        found += ["a process"] * (not is_ended(staying))
        return [*found, *["a key"] * (keyrings.key_count(uid) > keys_before)]

    try:
        yield look
    finally:
        if not is_ended(staying):
            os.kill(staying, signal.SIGKILL)
        for file in files:
            file.unlink(missing_ok=True)
        if keyrings.key_count(uid) > keys_before:
            _forget_what_is_left(uid)


def _has_queue() -> bool:
    queue = int(_libc.mq_open(_LEFT_QUEUE, os.O_RDONLY))
    if queue >= 0:
        os.close(queue)
    return queue >= 0


def _swept(stage: Stage) -> Answer:
    info = stage.start("serves")
    with _planted(info.uid or 0) as look:
        before = look()
        stage.lab.stop("serves")
        after = look()
    if len(before) != _PLANTED:
        return Answer("BROKEN", f"planted: {before}")
    return Answer(SUCCEEDED if after else "GONE", f"{after} of {before}")


def _swept_by_nobody(stage: Stage) -> Answer:
    with _planted(_ANOTHER) as look:
        after = look()
    return Answer(SUCCEEDED if len(after) == _PLANTED else "BROKEN", f"{after}")


@contextmanager
def _stuck(uid: int) -> Iterator[Path]:
    """A directory of a uid's that can't be removed: it holds what is somebody else's."""
    held = Path(f"/tmp/held-{uid}")
    held.mkdir()
    other = held / "somebody else's"
    other.touch()
    os.chown(other, _ANOTHER, _ANOTHER)
    os.chown(held, uid, uid)
    try:
        yield held
    finally:
        other.unlink(missing_ok=True)
        if held.exists():
            held.rmdir()


def _kept_from_others(stage: Stage) -> Answer:
    info = stage.start("serves")
    lab, uid = stage.lab, info.uid or 0
    with _stuck(uid) as held:
        lab.stop("serves")
        with _no_other_uid(stage, uid):
            try:
                second = stage.start("serves")
            except PoolExhausted as error:
                answer = Answer("KEPT", str(error))
            else:
                lab.stop("serves")
                is_met = (second.uid or 0) == uid and held.exists()
                answer = Answer(SUCCEEDED if is_met else "GONE", f"{held} is there")
    if stage.is_pool:
        lab.run(lambda node: node.release_uid(uid))
    return answer


def _removed_in_vain(_: Stage) -> Answer:
    with _stuck(SOMEBODY) as held:
        with contextlib.suppress(OSError):
            held.rmdir()
        return Answer(SUCCEEDED if held.exists() else "GONE", f"{held} is there")


# Taps ---------------------------------------------------------------------------------------------


def _has_interface(name: str) -> bool:
    return name in {one for _, one in socket.if_nameindex()}


def _tap_kept(stage: Stage) -> Answer:
    info = stage.start("keeps-tap", nics=[{"bridge": BRIDGE}])
    (tap,) = info.details["taps"]
    said = stage.output_of("keeps-tap")
    pidfd = os.pidfd_open(info.pid)
    signal.pidfd_send_signal(pidfd, signal.SIGKILL)
    assert select.select([pidfd], [], [], DEADLINE_S)[0]
    os.close(pidfd)
    was_kept = _has_interface(tap)
    stage.lab.reconcile()
    with contextlib.suppress(UnknownInstance):
        stage.lab.stop("keeps-tap")
    if was_kept != ("persist: done" in said):
        return Answer("BROKEN", said)
    return Answer(SUCCEEDED if _has_interface(tap) else "GONE", said.replace("\n", "; "))


def _tap_kept_by_a_plain_process(stage: Stage) -> Answer:
    name = "tapkept"
    with _tap_of_bare(stage, name, "keeps-tap", by="qemu", words="owner"):
        return Answer(SUCCEEDED if _has_interface(name) else "GONE", "after its holder's end")


@contextmanager
def _tap_of_bare(stage: Stage, name: str, behaviour: str, *, by: str, words: str) -> Iterator[None]:
    command.run(("ip", "tuntap", "add", name, "mode", "tap", "user", "root"), timeout_s=DEADLINE_S)
    try:
        tap = tun.attach(name)
        tun.persist(tap, False)
        with stage.bare(behaviour, by=by, tap=tap) as hostile:
            os.close(tap)
            hostile.hear(words)
        yield
    finally:
        if _has_interface(name):
            command.run(("ip", "link", "del", name), timeout_s=DEADLINE_S)


@contextmanager
def _tun_for_all() -> Iterator[None]:
    """The device as it is on most hosts, where each user may hold a tap that is his."""
    node = Path("/run/tun-for-all")
    os.mknod(node, stat.S_IFCHR, os.makedev(10, 200))
    node.chmod(0o666)
    try:
        with patch.object(tun, "_DEVICE", str(node)):
            yield
    finally:
        node.unlink()


def _takes(name: str, uid: int) -> bool:
    """Whether a process of that uid may hold a tap."""

    def hold() -> None:
        os.close(tun.attach(name))

    try:
        who = Credentials(uid, uid)
        run_in_child(hold, what="holding a tap", timeout_s=DEADLINE_S, credentials=who)
    except ChildFailed:
        return False
    return True


@contextmanager
def _held(name: str, uid: int) -> Iterator[None]:
    reader, writer = os.pipe()

    def hold() -> None:
        tun.attach(name)
        os.write(writer, b"!")
        signal.pause()

    who = Credentials(uid, uid)
    with start_child(hold, what="holding a tap", credentials=who, keep=[writer]):
        os.close(writer)
        said = os.read(reader, 1)
        os.close(reader)
        assert said, f"uid {uid} could not hold {name}"
        yield


def _tap_given_away(stage: Stage) -> Answer:
    """Given to another user who holds it: that keeps the uid from nobody, and ends with a stop."""
    lab, tap = stage.lab, "taptaken"
    command.run(("ip", "tuntap", "add", tap, "mode", "tap", "user", "root"), timeout_s=DEADLINE_S)
    try:
        with _tun_for_all():
            stage.start("gives-tap", by="taken-over", nics=[{"tap": tap}])
            leases = len(lab.leases())
            if "owner: done" in stage.output_of("gives-tap"):
                with _held(tap, _ANOTHER), contextlib.suppress(Fault):
                    lab.stop("gives-tap")
                    return Answer("BROKEN", "a tap that somebody holds was put back")
                if stage.is_pool:
                    assert len(lab.leases()) == leases - 1, "the uid is free all the same"
            lab.stop("gives-tap")
            is_taken = _takes(tap, _ANOTHER)
        return Answer(SUCCEEDED if is_taken else "GONE", "after its stop")
    finally:
        command.run(("ip", "link", "del", tap), timeout_s=DEADLINE_S)


def _tap_given_away_by_a_plain_process(stage: Stage) -> Answer:
    name = "tapgiven"
    with _tun_for_all(), _tap_of_bare(stage, name, "gives-tap", by="taken-over", words="persist"):
        is_taken = _takes(name, _ANOTHER)
    return Answer(SUCCEEDED if is_taken else "GONE", "by another uid")


_GONE: Final = Refusal("clean before release", "GONE")
_NOT_DONE: Final = Refusal("seccomp", "GONE")
_BY_RECORD: Final = Refusal("records", "GONE")
_ALSO: Final[Any] = frozenset({"everything", "no seccomp"})

REMAINS: Final = in_room(
    "who comes after it",
    Encounter(
        "left-for-the-next-holder",
        _GONE,
        _found_by_next_holder,
        _found_by_same_user,
        locks=_ALSO,
        shared_second="user|none",
    ),
    Encounter("leave-outside", _GONE, _swept, _swept_by_nobody, shared="user|none"),
    Encounter(
        "leave-what-stays",
        Refusal("clean before release", "KEPT"),
        _kept_from_others,
        _removed_in_vain,
        shared="user|none",
    ),
    Encounter(
        "keep-tap",
        _NOT_DONE,
        _tap_kept,
        _tap_kept_by_a_plain_process,
        locks=_ALSO,
        second=_BY_RECORD,
    ),
    Encounter(
        "give-tap-away",
        _NOT_DONE,
        _tap_given_away,
        _tap_given_away_by_a_plain_process,
        locks=_ALSO,
        second=_BY_RECORD,
    ),
)
