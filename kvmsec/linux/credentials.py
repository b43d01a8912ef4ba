"""Becoming somebody who can do nothing, for good, and proving that nothing is left."""

import contextlib
import errno
import os
import signal
from collections.abc import Iterator
from typing import Final

from attrs import frozen

from kvmsec.linux import forking, keyrings, syscalls

_PR_GET_DUMPABLE: Final = 3
_PR_SET_DUMPABLE: Final = 4
_DUMPABLE: Final = 1
_PR_SET_NO_NEW_PRIVS: Final = 38
_PR_GET_NO_NEW_PRIVS: Final = 39
_PR_CAPBSET_READ: Final = 23
_PR_CAPBSET_DROP: Final = 24
_PR_CAP_AMBIENT: Final = 47
_PR_CAP_AMBIENT_CLEAR_ALL: Final = 4


NOBODY: Final = 65534
"""The uid and the gid of nobody (Debian Policy 9.2.2)."""


@frozen
class Credentials:
    """The uid and gid to become; there are never supplementary groups."""

    uid: int
    gid: int


def bounding_set() -> list[int]:
    """The capabilities still in the caller's bounding set, asked of the kernel one by one."""
    return [number for number, has in _of_each_capability(_PR_CAPBSET_READ) if has]


def _of_each_capability(operation: int) -> Iterator[tuple[int, int]]:
    """Each capability's number and answer; the first that this kernel doesn't know is EINVAL."""
    for number in range(64):
        try:
            yield number, syscalls.prctl(operation, number)
        except OSError as error:
            if error.errno != errno.EINVAL:
                raise
            return


@contextlib.contextmanager
def acting_as(credentials: Credentials) -> Iterator[None]:
    """Within it root acts as somebody else: effective and filesystem ids, no effective capability.

    For a few system calls of our own: the real ids stay root's, so that nobody may signal or trace
    the caller and all can be taken back (seteuid(2)). No signal is handled meanwhile, for its
    handler would run as that somebody. For a process with one thread: the C library changes the
    ids of all, and they would act as somebody else as well. Raises ManyThreads, OSError.
    """
    forking.require_one_thread()
    uid, gid, groups = os.geteuid(), os.getegid(), os.getgroups()
    blocked = syscalls.set_signal_mask(forking.ALL_SIGNALS)
    try:
        with _kept_by_a_change_of_ids():
            try:
                os.setgroups([])
                os.setegid(credentials.gid)
                os.seteuid(credentials.uid)
                yield
            finally:
                os.seteuid(uid)
                os.setegid(gid)
                os.setgroups(groups)
    finally:
        syscalls.set_signal_mask(blocked)


@contextlib.contextmanager
def _kept_by_a_change_of_ids() -> Iterator[None]:
    """Put right afterwards what the kernel changes with a process's ids (credentials(7))."""
    parent, dumpable = os.getppid(), syscalls.prctl(_PR_GET_DUMPABLE)
    with_parent = syscalls.signal_at_parents_end()
    try:
        yield
    finally:
        if dumpable == _DUMPABLE:
            syscalls.prctl(_PR_SET_DUMPABLE, _DUMPABLE)
        if with_parent:
            syscalls.end_with_parent(with_parent)
            if os.getppid() != parent:  # It ended while nobody would have told.
                signal.raise_signal(with_parent)


def become(credentials: Credentials) -> None:
    """Leave the session keyring, where this host lets one, and take the uid and gid (`take`).

    For a process that runs kvmsec's own code: whoever must not go on without a session keyring of
    its own calls `leave_session_keyring` itself. Raises OSError.
    """
    try:
        leave_session_keyring()
    except OSError as error:
        if error.errno not in (errno.ENOSYS, errno.EPERM):
            raise
    take(credentials)


def leave_session_keyring() -> None:
    """Have a session keyring that is nobody else's, or none where there are no keys.

    While still root, so that the new keyring is none that the uid leaves behind. Raises OSError
    where it keeps the one that it inherited.
    """
    try:
        keyrings.join_new_session()
    except OSError as error:
        if error.errno != errno.ENOSYS or keyrings.are_known():
            raise


def take(credentials: Credentials) -> None:
    """Take the uid and gid, with no group, no capability and no way to gain one (no_new_privs).

    Until the caller executes a program, no process of that uid can trace it or read its memory.
    Uid 0 may be among them: what is left then is the owner of root's files without a capability.
    Verified by reading it back: a drop that silently did nothing raises PermissionError. Raises
    OSError. See capabilities(7).
    """
    # The bounding set first: to narrow it takes a capability.
    for _ in _of_each_capability(_PR_CAPBSET_DROP):
        pass
    syscalls.prctl(_PR_CAP_AMBIENT, _PR_CAP_AMBIENT_CLEAR_ALL)
    os.setgroups([])
    os.setresgid(credentials.gid, credentials.gid, credentials.gid)
    os.setresuid(credentials.uid, credentials.uid, credentials.uid)
    syscalls.set_capabilities(0, 0, 0)
    # A change of uid sees to that on most hosts: not where fs.suid_dumpable is 1, and not for root.
    syscalls.prctl(_PR_SET_DUMPABLE, 0)
    syscalls.prctl(_PR_SET_NO_NEW_PRIVS, 1)
    verify(credentials)


def verify(credentials: Credentials) -> None:
    """Raise PermissionError unless the caller is exactly these credentials and nothing more.

    The filesystem uid is set with the effective one, and the ambient set is never more than the
    permitted one.
    """
    uids, gids = os.getresuid(), os.getresgid()
    wanted_uids, wanted_gids = (credentials.uid,) * 3, (credentials.gid,) * 3
    if uids != wanted_uids or gids != wanted_gids or os.getgroups():
        raise PermissionError(f"still uids {uids}, gids {gids}, groups {os.getgroups()}")
    if any(syscalls.get_capabilities()):
        raise PermissionError(f"capabilities {syscalls.get_capabilities()} are still there")
    if kept := bounding_set():
        raise PermissionError(f"capabilities {kept} are still in the bounding set")
    if syscalls.prctl(_PR_GET_NO_NEW_PRIVS) != 1:
        raise PermissionError("no_new_privs is not set")
    if (dumpable := syscalls.prctl(_PR_GET_DUMPABLE)) != 0:
        raise PermissionError(f"it can be traced and leave a core (dumpable {dumpable})")
