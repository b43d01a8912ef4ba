"""Holding a confined process against what /proc shows of it, before it is handed anything."""

import os
from collections.abc import Iterator
from typing import Final

from kvmsec.daemon.confinement import ConfinementFailed
from kvmsec.linux import processes
from kvmsec.linux.credentials import Credentials

_OWN_NAMESPACES: Final = ("mnt", "pid", "ipc", "uts", "cgroup")
_FILTERED: Final = 2  # proc_pid_status(5), Seccomp: SECCOMP_MODE_FILTER


def require_confined(pid: int, credentials: Credentials, *, has_filter: bool) -> None:
    """Raise ConfinementFailed with all that a process still has which it should not."""
    if problems := list(find_gaps(pid, credentials, has_filter=has_filter)):
        raise ConfinementFailed("verification", 0, "; ".join(problems))


def find_gaps(pid: int, credentials: Credentials, *, has_filter: bool) -> Iterator[str]:
    """What a process has that a confined one has not; read as root of the node.

    One that ends meanwhile has ended, which is a gap too. Raises OSError where /proc can't be read.
    """
    status = processes.read_status(pid)
    if status is None or status.is_zombie:
        yield "it has ended"
        return
    if set(status.uids) != {credentials.uid} or set(status.gids) != {credentials.gid}:
        yield f"its uids are {status.uids}, its gids {status.gids}"
    if set(status.groups) - {credentials.gid}:
        yield f"it is in the groups {status.groups}"
    if any(status.capabilities):
        yield f"it has capabilities {status.capabilities}"
    if not status.no_new_privs:
        yield "it may gain privileges by an exec"
    if has_filter and status.seccomp != _FILTERED:
        yield "no filter of system calls is in force"
    try:
        yield from _shared_namespaces(pid)
        yield from _left_in_tree(pid)
    except (FileNotFoundError, ProcessLookupError):
        yield "it has ended"  # A zombie has a status, and neither namespaces nor a tree.


def _shared_namespaces(pid: int) -> Iterator[str]:
    for kind in _OWN_NAMESPACES:
        if os.readlink(f"/proc/{pid}/ns/{kind}") == os.readlink(f"/proc/self/ns/{kind}"):
            yield f"its {kind} namespace is the node's"


def _left_in_tree(pid: int) -> Iterator[str]:
    if found := sorted(set(os.listdir(f"/proc/{pid}/root")) - {"proc"}):
        yield f"its tree holds {found}"
    if (found := os.listdir(f"/proc/{pid}/root/proc")) != ["self"]:
        yield f"its /proc holds {sorted(found)}"
