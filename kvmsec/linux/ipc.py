"""The IPC objects of the caller's IPC namespace: System V's and POSIX message queues.

Both outlive their processes. Those of an instance's own namespace end with it (ipc_namespaces(7)).
"""

import contextlib
import errno
import os
from collections.abc import Iterator
from typing import Final

from attrs import frozen

from kvmsec.linux import syscalls

_PROC_LIMIT_BYTES: Final = 16 << 20

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


def sysv_objects(uid: int, *, limit_bytes: int = _PROC_LIMIT_BYTES) -> list[SysvObject]:
    """The System V objects that a uid owns or made (/proc/sysvipc, sysvipc(7)).

    The maker is counted since it keeps its rights when it gives the object away. Raises OSError,
    and that too (EFBIG) when one of the kernel's tables is longer than `limit_bytes`.
    """
    found = []
    for kind, id_column in _ID_COLUMNS.items():
        for one in _read_table(f"/proc/sysvipc/{kind}", kind, id_column, limit_bytes):
            if uid in (one.owner_uid, one.creator_uid):
                found.append(one)
    return found


def _read_table(path: str, kind: str, id_column: str, limit_bytes: int) -> Iterator[SysvObject]:
    try:
        with open(path, "rb") as file:
            table = file.read(limit_bytes + 1)
    except FileNotFoundError:
        return  # A kernel without System V IPC.
    if len(table) > limit_bytes:
        raise OSError(errno.EFBIG, os.strerror(errno.EFBIG), path)
    lines = table.decode("ascii", errors="replace").splitlines()
    columns = lines[0].split()
    where = [columns.index(name) for name in (id_column, "uid", "cuid")]
    for line in lines[1:]:
        words = line.split()
        number, owner, creator = (int(words[index]) for index in where)
        yield SysvObject(kind, number, owner, creator)


def remove_sysv_object(one: SysvObject) -> None:
    """Remove it; one that has gone is fine. A segment goes once nobody has it attached.

    Raises OSError.
    """
    try:
        syscalls.remove_sysv_object(one.kind, one.id)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.EIDRM):
            raise


@contextlib.contextmanager
def message_queues() -> Iterator[int | None]:
    """A descriptor of the directory that holds the POSIX message queues (mq_overview(7)).

    Their filesystem is opened detached, so that it needs neither a mount point nor /dev/mqueue
    (which may be another namespace's). None where the kernel has no such queues. Raises OSError.
    """
    try:
        mount = syscalls.mount_detached("mqueue")
    except OSError as error:
        if error.errno != errno.ENODEV:
            raise
        yield None
        return
    try:
        directory = os.open(".", os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC, dir_fd=mount)
    finally:
        os.close(mount)
    try:
        yield directory
    finally:
        os.close(directory)
