"""Becoming somebody who can do nothing, for good, and proving that nothing is left."""

import errno
import os
from typing import Final

from attrs import frozen

from kvmsec.linux import syscalls

_PR_SET_NO_NEW_PRIVS: Final = 38
_PR_GET_NO_NEW_PRIVS: Final = 39
_PR_CAPBSET_READ: Final = 23
_PR_CAPBSET_DROP: Final = 24
_PR_CAP_AMBIENT: Final = 47
_PR_CAP_AMBIENT_CLEAR_ALL: Final = 4


@frozen
class Credentials:
    """The uid and gid to become; there are never supplementary groups."""

    uid: int
    gid: int


def bounding_set() -> list[int]:
    """The capabilities still in the caller's bounding set, asked of the kernel one by one."""
    kept = []
    for capability in range(64):
        try:
            if syscalls.prctl(_PR_CAPBSET_READ, capability):
                kept.append(capability)
        except OSError as error:
            if error.errno != errno.EINVAL:
                raise
            break  # The first number that this kernel doesn't know.
    return kept


def drop_capabilities() -> None:
    """Empty all five capability sets of the caller; the bounding set first, since it needs one.

    Raises OSError. See capabilities(7).
    """
    for capability in bounding_set():
        syscalls.prctl(_PR_CAPBSET_DROP, capability)
    syscalls.prctl(_PR_CAP_AMBIENT, _PR_CAP_AMBIENT_CLEAR_ALL)


def become(credentials: Credentials) -> None:
    """Take the uid and gid, with no group, no capability and no way to gain one (no_new_privs).

    Verified by reading it back: a drop that silently did nothing raises PermissionError.
    """
    drop_capabilities()
    os.setgroups([])
    os.setresgid(credentials.gid, credentials.gid, credentials.gid)
    os.setresuid(credentials.uid, credentials.uid, credentials.uid)
    syscalls.set_capabilities(0, 0, 0)
    syscalls.prctl(_PR_SET_NO_NEW_PRIVS, 1)
    verify(credentials)


def verify(credentials: Credentials) -> None:
    """Raise PermissionError unless the caller is exactly these credentials and nothing more."""
    # Python 3.11 has no getresuid for the fsuid: the kernel sets it with the effective uid.
    uids, gids = os.getresuid(), os.getresgid()
    wanted_uids, wanted_gids = (credentials.uid,) * 3, (credentials.gid,) * 3
    if uids != wanted_uids or gids != wanted_gids or os.getgroups():
        raise PermissionError(f"still uids {uids}, gids {gids}, groups {os.getgroups()}")
    if kept := bounding_set():
        raise PermissionError(f"capabilities {kept} are still in the bounding set")
    if syscalls.prctl(_PR_GET_NO_NEW_PRIVS) != 1:
        raise PermissionError("no_new_privs is not set")
