"""Keys that the kernel holds for a uid, which outlive its processes (keyrings(7)).

A key in a uid's user keyring or persistent keyring is found by whoever has that uid next.
"""

import contextlib
import errno
import os
import re
from collections.abc import Callable
from typing import Final

from kvmsec.linux.syscalls import add_no_key, keyctl, request_no_key

_PROC_LIMIT_BYTES: Final = 16 << 20
# Serial number, flags, usage, timeout, permissions, owner (keyrings(7)).
_KEY_ROW: Final = re.compile(rb"^([0-9a-f]{8}) (?:[^ \n]+ +){4}(\d+) ", re.MULTILINE)

# linux/include/uapi/linux/keyctl.h
_GET_KEYRING_ID: Final = 0
_JOIN_SESSION_KEYRING: Final = 1
_SETPERM: Final = 5
_CLEAR: Final = 7
_INVALIDATE: Final = 21
_GET_PERSISTENT: Final = 22
_PROCESS_KEYRING: Final = -2
_SESSION_KEYRING: Final = -3
_USER_KEYRING: Final = -4
_USER_SESSION_KEYRING: Final = -5
_EVERY_RIGHT: Final = 0x3F3F0000  # of the possessor and the owner


def key_count(uid: int) -> int:
    """How many keys the kernel holds that belong to a uid, wherever they are linked.

    /proc/key-users counts every key, whereas /proc/keys shows a reader only those that it may
    view. Keys that nobody can reach any more are counted until the kernel has collected them,
    some tens of milliseconds. Raises OSError.
    """
    prefix = f"{uid}:".encode()
    try:
        with open("/proc/key-users", "rb") as file:
            lines = file.read(_PROC_LIMIT_BYTES).splitlines()
    except FileNotFoundError:
        return 0  # A kernel without keys.
    for line in lines:
        if line.lstrip().startswith(prefix):
            return int(line.split()[2].partition(b"/")[0])
    return 0


def invalidate_own_keys() -> int:
    """Drop every key and keyring of the calling process's uid; returns how many were dropped.

    To be called by a process that has become the uid: nobody else, root included, may do it. A
    key or keyring whose owner took every right on it away stays (`key_count` tells), until the
    next boot. Invalid keys are collected at once, revoked ones only after minutes.
    """
    join_new_session()
    dropped = 0
    # Looked up before any is dropped: while a user's keyring is invalid none of them is found.
    for key in dict.fromkeys([*_well_known_keyrings(), *_visible_keys(os.getuid())]):
        with contextlib.suppress(OSError):
            keyctl(_SETPERM, key, _EVERY_RIGHT)
        with contextlib.suppress(OSError):
            keyctl(_CLEAR, key)
        with contextlib.suppress(OSError):
            keyctl(_INVALIDATE, key)
            dropped += 1
    return dropped


def join_new_session() -> None:
    """Give the calling process a session keyring of its own, with nothing in it.

    Without it a process possesses the session keyring that it inherited: what an administrator's
    login put there can be read by whatever uid the process becomes. Read back, since a filter of
    system calls may answer without having done it. Raises OSError.
    """
    joined = keyctl(_JOIN_SESSION_KEYRING, None)
    if joined <= 0 or keyctl(_GET_KEYRING_ID, _SESSION_KEYRING, 0) != joined:
        raise OSError(errno.EPERM, "the kernel says so, and has joined no new session keyring")


def are_known() -> bool:
    """Whether there are keys for the calling process at all.

    There are none, and so no session keyring to share, where each of the three calls that know of
    keys answers ENOSYS: in a kernel without CONFIG_KEYS, or under a filter that says the same and
    that whatever the process becomes is under as well. One call alone says nothing: who may not
    join a keyring could still read a key of the one that it has by another call, or be asked for
    one by request_key(2).
    """
    return not all(map(_is_absent, (_ask_for_none, add_no_key, request_no_key)))


def _ask_for_none() -> int:
    return keyctl(_GET_KEYRING_ID, 0, 0)


def _is_absent(call: Callable[[], int]) -> bool:
    try:
        call()
    except OSError as error:
        return error.errno == errno.ENOSYS
    return False


def _well_known_keyrings() -> list[int]:
    found = []
    for operation, *arguments in (
        (_GET_KEYRING_ID, _USER_KEYRING, 1),
        (_GET_KEYRING_ID, _USER_SESSION_KEYRING, 1),
        # Linked into the process's own keyring, since only a possessor may drop it.
        (_GET_PERSISTENT, -1, _PROCESS_KEYRING),
    ):
        with contextlib.suppress(OSError):
            found.append(keyctl(operation, *arguments))
    return found


def _visible_keys(uid: int) -> list[int]:
    """The serial numbers of the keys of a uid that the caller may view (/proc/keys).

    A key's name, its last field, is shown as its owner chose it, newlines included: what then looks
    like no row is none, and what looks like one names a key that the caller has no more rights on.
    """
    with open("/proc/keys", "rb") as file:
        table = file.read(_PROC_LIMIT_BYTES)
    return [int(row[1], 16) for row in _KEY_ROW.finditer(table) if int(row[2]) == uid]
