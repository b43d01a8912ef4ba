"""The IPC objects of the caller's IPC namespace: System V's and POSIX message queues.

Both outlive their processes. Those of an instance's own namespace end with it (ipc_namespaces(7)).
"""

import contextlib
import ctypes
import errno
import os
from collections.abc import Iterator
from typing import Final

from attrs import frozen

_IPC_RMID: Final = 0
_PROC_LIMIT_BYTES: Final = 16 << 20

# These three have the same number on every architecture (linux/scripts/syscall.tbl).
_NR_FSOPEN: Final = 430
_NR_FSCONFIG: Final = 431
_NR_FSMOUNT: Final = 432
_FSOPEN_CLOEXEC: Final = 1
_FSCONFIG_CMD_CREATE: Final = 6
_FSMOUNT_CLOEXEC: Final = 1

_libc: Final = ctypes.CDLL(None, use_errno=True)
_ID_COLUMNS: Final = {"shm": "shmid", "msg": "msqid", "sem": "semid"}


@frozen
class SysvObject:
    """A shared memory segment (`shm`), message queue (`msg`) or semaphore set (`sem`)."""

    kind: str
    id: int
    owner_uid: int
    creator_uid: int

    def __str__(self) -> str:
        return f"{self.kind} {self.id}"


def sysv_objects(uid: int) -> list[SysvObject]:
    """The System V objects that a uid owns or made (/proc/sysvipc, sysvipc(7)).

    The maker is counted since it keeps its rights when it gives the object away. Raises OSError.
    """
    found = []
    for kind, id_column in _ID_COLUMNS.items():
        for one in _read_table(f"/proc/sysvipc/{kind}", kind, id_column):
            if uid in (one.owner_uid, one.creator_uid):
                found.append(one)
    return found


def _read_table(path: str, kind: str, id_column: str) -> Iterator[SysvObject]:
    try:
        with open(path, "rb") as file:
            lines = file.read(_PROC_LIMIT_BYTES).decode("ascii", errors="replace").splitlines()
    except FileNotFoundError:
        return  # A kernel without System V IPC.
    columns = lines[0].split()
    where = [columns.index(name) for name in (id_column, "uid", "cuid")]
    for line in lines[1:]:
        words = line.split()
        number, owner, creator = (int(words[index]) for index in where)
        yield SysvObject(kind, number, owner, creator)


def remove_sysv_object(one: SysvObject) -> None:
    """Remove it; one that has gone is fine. A segment goes once nobody has it attached.

    Raises OSError. See shmctl(2), msgctl(2) and semctl(2).
    """
    if one.kind == "shm":
        result = _libc.shmctl(ctypes.c_int(one.id), _IPC_RMID, None)
    elif one.kind == "msg":
        result = _libc.msgctl(ctypes.c_int(one.id), _IPC_RMID, None)
    else:
        result = _libc.semctl(ctypes.c_int(one.id), 0, _IPC_RMID)
    if result < 0 and ctypes.get_errno() not in (errno.EINVAL, errno.EIDRM):
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))


@contextlib.contextmanager
def message_queues() -> Iterator[int | None]:
    """A descriptor of the directory that holds the POSIX message queues (mq_overview(7)).

    Their filesystem is opened detached, so that it needs neither a mount point nor /dev/mqueue
    (which may be another namespace's). None where the kernel has no such queues. Raises OSError.
    """
    try:
        context = _syscall(_NR_FSOPEN, b"mqueue", _FSOPEN_CLOEXEC)
    except OSError as error:
        if error.errno != errno.ENODEV:
            raise
        yield None
        return
    try:
        _syscall(_NR_FSCONFIG, context, _FSCONFIG_CMD_CREATE, None, None, 0)
        mount = _syscall(_NR_FSMOUNT, context, _FSMOUNT_CLOEXEC, 0)
    finally:
        os.close(context)
    try:
        directory = os.open(".", os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC, dir_fd=mount)
    finally:
        os.close(mount)
    try:
        yield directory
    finally:
        os.close(directory)


def _syscall(number: int, *arguments: int | bytes | None) -> int:
    words = [
        ctypes.c_long(argument) if isinstance(argument, int) else argument for argument in arguments
    ]
    result: int = _libc.syscall(ctypes.c_long(number), *words)
    if result < 0:
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
    return result
