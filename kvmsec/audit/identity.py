"""Who a process is: its ids, groups, capabilities and filters, of all its threads together."""

import grp
import pwd
from collections.abc import Callable, Iterable
from typing import Final

from hypervisor.foreign_text import escaped
from kvmsec.audit.facts import Credentials, Sharers
from kvmsec.audit.process_files import ProcessFiles, TooMuch, fields_of, open_host, others
from kvmsec.linux.processes import CAPABILITY_SETS

_STATUS_BYTES: Final = 1 << 20  # 65,536 groups (NGROUPS_MAX) of ten digits fit.
_THREADS: Final = 4096
_GROUPS_SHOWN: Final = 64
_NO_LOGIN: Final = ("nologin", "false", "sync")


def read_credentials(files: ProcessFiles) -> Credentials:
    """Every thread's ids and privileges, the most that any has. Raises OSError, TooMuch, KeyError.

    Each thread has credentials and filters of its own (pthreads(7), seccomp(2)).
    """
    threads = files.entries("task")
    if len(threads) > _THREADS:
        raise TooMuch(f"it has more than {_THREADS} threads")
    seen = [_read_thread(files, f"task/{thread}/status") for thread in threads]
    together = [one for one in seen if one is not None]
    if not together:
        raise ProcessLookupError("no thread of it is there")
    main = fields_of(files.read("status", _STATUS_BYTES))
    uids = _union(one[b"Uid"] for one in together)
    gids = _union(one[b"Gid"] for one in together)
    groups = _union(one[b"Groups"] for one in together)
    user, has_login_shell = _account(min(uids))
    filters = [one.get(b"Seccomp_filters") for one in together]
    return Credentials(
        uids=uids,
        gids=gids,
        groups=groups,
        capabilities=_capabilities(together),
        no_new_privs=all(one.get(b"NoNewPrivs") == b"1" for one in together),
        seccomp=min(int(one.get(b"Seccomp", b"0")) for one in together),
        seccomp_filters=None if None in filters else min(int(one or 0) for one in filters),
        umask=int(main[b"Umask"], 8) if b"Umask" in main else None,
        tracer_pid=max(int(one.get(b"TracerPid", b"0")) for one in together),
        group_names=tuple(map(_group_name, groups[:_GROUPS_SHOWN])),
        own_group_names=tuple(map(_group_name, gids[:_GROUPS_SHOWN])),
        user=user,
        has_login_shell=has_login_shell,
    )


def _read_thread(files: ProcessFiles, path: str) -> dict[bytes, bytes] | None:
    try:
        return fields_of(files.read(path, _STATUS_BYTES))
    except (FileNotFoundError, ProcessLookupError):
        return None  # Ended since it was listed.


def _union(lines: Iterable[bytes]) -> tuple[int, ...]:
    return tuple(sorted({int(word) for line in lines for word in line.split()}))


def _capabilities(threads: list[dict[bytes, bytes]]) -> tuple[int, int, int, int, int]:
    masks = []
    for name in CAPABILITY_SETS:
        mask = 0
        for one in threads:
            mask |= int(one[name.encode()], 16)
        masks.append(mask)
    inheritable, permitted, effective, bounding, ambient = masks
    return inheritable, permitted, effective, bounding, ambient


def _account(uid: int) -> tuple[str | None, bool]:
    try:
        entry = pwd.getpwuid(uid)
    except (KeyError, OverflowError):
        return None, False
    shell = entry.pw_shell.rpartition("/")[2]
    has_shell = bool(entry.pw_shell) and shell not in _NO_LOGIN
    return escaped(entry.pw_name, limit_chars=32), has_shell


def _group_name(gid: int) -> str:
    try:
        return escaped(grp.getgrgid(gid).gr_name, limit_chars=32)
    except (KeyError, OverflowError):
        return str(gid)


def read_sharers(
    files: ProcessFiles, uids: tuple[int, ...], is_qemu: Callable[[ProcessFiles], bool]
) -> Sharers:
    """How many others have one of its uids; who is in a PID namespace of its own belongs to it."""
    wanted = {str(uid).encode() for uid in uids}
    own = _pid_namespace(files)
    is_apart = own is not None and own != _host_pid_namespace()
    processes = qemus = 0
    for other in others(files.pid):
        try:
            status = fields_of(other.read("status", _STATUS_BYTES))
            if not wanted & set(status.get(b"Uid", b"").split()) or b"VmSize" not in status:
                continue
            if is_apart and _pid_namespace(other) == own:
                continue
            processes += 1
            qemus += is_qemu(other)
        except (OSError, TooMuch):
            continue
    return Sharers(processes, qemus)


def _pid_namespace(files: ProcessFiles) -> str | None:
    try:
        return files.link("ns/pid")
    except OSError:
        return None


def _host_pid_namespace() -> str | None:
    with open_host() as host:
        return _pid_namespace(host)
