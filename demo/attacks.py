"""What a process tries that has an instance's uid: in its jail, out of it, and the same as root.

The last try is the control: a row counts only if what was refused to the instance works at all.
Each refusal has to be one that its lock gives, so that no other lock hides that it is gone.
"""

import errno
import json
import os
import pwd
import signal
import socket
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Final

from attrs import frozen

from kvmsec.linux import namespaces
from kvmsec.linux.children import run_in_child
from kvmsec.linux.credentials import Credentials, become

_DEADLINE_S: Final = 5
_ALLOWED: Final = "works"
_ABSENT: Final = (
    errno.errorcode[errno.EAFNOSUPPORT],
    errno.errorcode[errno.EADDRNOTAVAIL],
)
_DISCARD: Final = 9  # the port of RFC 863
_JAIL: Final = (
    namespaces.CLONE_NEWNS
    | namespaces.CLONE_NEWPID
    | namespaces.CLONE_NEWNET
    | namespaces.CLONE_NEWIPC
    | namespaces.CLONE_NEWUTS
    | namespaces.CLONE_NEWCGROUP
)


@frozen
class Refusal:
    """The lock that refuses, and the errors that the kernel gives then."""

    lock: str
    answers: tuple[str, ...]


_PIDS: Final = Refusal("PID namespace", ("ESRCH",))
_TREE: Final = Refusal("root tree", ("ENOENT",))
# Loopback is down there, and has no address of IPv6 then.
_NETWORK: Final = Refusal("network namespace", ("ENETUNREACH", "EADDRNOTAVAIL"))
_NO_SIGNAL: Final = Refusal("a uid of its own", ("EPERM",))
_NO_TRACE: Final = Refusal("a uid of its own", ("EACCES",))
_ROOTS: Final = Refusal("files are root's alone", ("EACCES",))
_RULES: Final = Refusal("packet rules", ("EPERM",))


@frozen
class Attempt:
    """One thing that is tried, and who has to refuse it: in the jail, and to the uid alone."""

    what: str
    act: Callable[[], object]
    in_jail: Refusal
    outside: Refusal


@frozen
class Tried:
    """The kernel's answers to an attempt; `in_jail` is None where it wasn't tried there."""

    attempt: Attempt
    by: str
    in_jail: str | None
    outside: str
    as_root: str

    @property
    def is_refused(self) -> bool:
        return _ALLOWED not in (self.in_jail, self.outside)

    @property
    def problems(self) -> Iterator[str]:
        """What is wrong with this row."""
        what = f"{self.by} tries to {self.attempt.what}"
        if self.as_root in _ABSENT and self.outside == self.as_root:
            return  # The host has no IPv6: nobody can send there.
        if self.as_root != _ALLOWED:
            yield f"{what}: proves nothing, since root got {self.as_root}"
        for place, answer, wanted in (
            ("in its jail", self.in_jail, self.attempt.in_jail),
            ("outside its jail", self.outside, self.attempt.outside),
        ):
            if answer is not None and answer not in wanted.answers:
                expected = " or ".join(wanted.answers)
                yield f"{what}, {place}: {answer}, where {wanted.lock} gives {expected}"


def attempts_on(victim: Mapping[str, Any], root: Path) -> list[Attempt]:
    """Everything that is tried on a neighbour; `victim` is what `instance info` says of it."""
    name, pid = victim["name"], int(victim["pid"])
    qmp, serial = victim["qmp_socket"], victim["serial_socket"]
    disk, state = root / f"{name}.raw", root / "var/lib/kvmsec/cluster.json"
    return [
        Attempt("signal another's QEMU", partial(os.kill, pid, 0), _PIDS, _NO_SIGNAL),
        Attempt("read another's memory", partial(_read_memory, pid), _TREE, _NO_TRACE),
        Attempt("open another's disk", partial(_open, disk, os.O_RDWR), _TREE, _ROOTS),
        Attempt("command another over QMP", partial(_connect, qmp), _TREE, _ROOTS),
        Attempt("type on another's serial line", partial(_connect, serial), _TREE, _ROOTS),
        Attempt("read the cluster's state", partial(_open, state, os.O_RDONLY), _TREE, _ROOTS),
        *packet_attempts(),
    ]


def packet_attempts() -> list[Attempt]:
    return [
        Attempt("send over IPv4", partial(_send, socket.AF_INET, "127.0.0.1"), _NETWORK, _RULES),
        Attempt("send over IPv6", partial(_send, socket.AF_INET6, "::1"), _NETWORK, _RULES),
    ]


def try_all(
    attempts: Sequence[Attempt], attacker: Mapping[str, Any], *, also_in_jail: bool = False
) -> list[Tried]:
    """Try each as the attacker's uid (of its own group, with no capability), and then as root.

    `attacker` is what `instance info` says of it.
    """
    uid, pid = int(attacker["uid"]), int(attacker["pid"])
    instance = Credentials(uid, pwd.getpwuid(uid).pw_gid)
    every = partial(_try_each, attempts)
    nowhere: list[None] = [None] * len(attempts)
    in_jail = _in_child(partial(_in_jail_of, pid, instance, every)) if also_in_jail else nowhere
    outside = _in_child(every, instance)
    as_root = _in_child(every)
    return [
        Tried(attempt, attacker["name"], jailed, alone, root)
        for attempt, jailed, alone, root in zip(attempts, in_jail, outside, as_root, strict=True)
    ]


def _in_child(work: Callable[[], list[str]], who: Credentials | None = None) -> list[str]:
    answers = run_in_child(work, what="an attack", credentials=who, timeout_s=_DEADLINE_S)
    return [str(answer) for answer in answers]


def _in_jail_of(pid: int, who: Credentials, work: Callable[[], list[str]]) -> list[str]:
    """Do it in the namespaces of a process, its tree among them; the caller is a child of its own.

    Without the filter of system calls and the control groups, which stay the process's own.
    """
    pidfd = os.pidfd_open(pid)
    namespaces.setns(pidfd, _JAIL)
    os.close(pidfd)
    reader, writer = os.pipe()
    child = os.fork()  # Only a child is in the PID namespace: setns(2).
    if child == 0:
        try:
            signal.alarm(_DEADLINE_S)
            become(who)
            os.write(writer, json.dumps(work()).encode())
        finally:
            os._exit(0)
    os.close(writer)
    with open(reader, "rb") as answers:
        said = answers.read()
    os.waitpid(child, 0)
    found: list[str] = json.loads(said)
    return found


def _try_each(attempts: Sequence[Attempt]) -> list[str]:
    return [_answer_to(attempt.act) for attempt in attempts]


def _answer_to(act: Callable[[], object]) -> str:
    try:
        act()
    except OSError as refusal:
        return errno.errorcode.get(refusal.errno or 0, str(refusal))
    return _ALLOWED


def _open(path: Path, flags: int) -> None:
    os.close(os.open(path, flags | os.O_CLOEXEC))


def _connect(path: str) -> None:
    with socket.socket(socket.AF_UNIX) as client:
        client.connect(path)


def _send(family: socket.AddressFamily, address: str) -> None:
    with socket.socket(family, socket.SOCK_DGRAM) as sender:
        sender.sendto(b"", (address, _DISCARD))


def _read_memory(pid: int) -> None:
    memory = os.open(f"/proc/{pid}/mem", os.O_RDONLY | os.O_CLOEXEC)
    first = Path(f"/proc/{pid}/maps").read_text().split("-", 1)[0]
    os.pread(memory, 16, int(first, 16))
    os.close(memory)
