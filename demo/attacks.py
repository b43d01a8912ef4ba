"""What a process tries that has an instance's uid and nothing else; and the same as root.

The second try is the control: a row counts only if what was refused to the instance works at all.
"""

import errno
import os
import pwd
import socket
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Final

from attrs import evolve, frozen

from kvmsec.linux.children import run_in_child
from kvmsec.linux.credentials import Credentials

_DEADLINE_S: Final = 5.0
_ALLOWED: Final = "works"
_ABSENT: Final = (
    errno.errorcode[errno.EAFNOSUPPORT],
    errno.errorcode[errno.EADDRNOTAVAIL],
)
_DISCARD: Final = 9  # the port of RFC 863


@frozen
class Attempt:
    """One thing that is tried, and the kernel's answers: to the instance's uid, and to root."""

    what: str
    act: Callable[[], object]
    as_instance: str = ""
    as_root: str = ""

    @property
    def is_refused(self) -> bool:
        return self.as_instance != _ALLOWED

    @property
    def problem(self) -> str | None:
        """What is wrong with this row, if anything is."""
        if self.as_root in _ABSENT and self.as_instance == self.as_root:
            return None  # The host has no IPv6: nobody can send there.
        if self.as_root != _ALLOWED:
            return f"{self.what}: proves nothing, since root got {self.as_root}"
        return None if self.is_refused else f"{self.what}: it worked"


def attempts_on(victim: Mapping[str, Any], root: Path) -> list[Attempt]:
    """Everything that is tried on a neighbour; `victim` is what `instance info` says of it."""
    name, pid = victim["name"], int(victim["pid"])
    state = root / "var/lib/kvmsec/cluster.json"
    return [
        Attempt(f"signal {name}'s QEMU", partial(os.kill, pid, 0)),
        Attempt(f"read {name}'s memory", partial(_read_memory, pid)),
        Attempt(f"open {name}'s disk", partial(_open, root / f"{name}.raw", os.O_RDWR)),
        Attempt(f"command {name} over QMP", partial(_connect, victim["qmp_socket"])),
        Attempt(f"type on {name}'s serial line", partial(_connect, victim["serial_socket"])),
        Attempt("read the cluster's state", partial(_open, state, os.O_RDONLY)),
        *packet_attempts(),
    ]


def packet_attempts() -> list[Attempt]:
    return [
        Attempt("send over IPv4", partial(_send, socket.AF_INET, "127.0.0.1")),
        Attempt("send over IPv6", partial(_send, socket.AF_INET6, "::1")),
    ]


def try_all(attempts: Sequence[Attempt], uid: int) -> list[Attempt]:
    """Try each as this uid (of its own group, with no capability), and then as root."""
    instance = Credentials(uid, pwd.getpwuid(uid).pw_gid)
    return [
        evolve(
            attempt,
            as_instance=_answer_to(attempt, instance),
            as_root=_answer_to(attempt, None),
        )
        for attempt in attempts
    ]


def _answer_to(attempt: Attempt, credentials: Credentials | None) -> str:
    answer = run_in_child(
        partial(_tried, attempt.act),
        what=attempt.what,
        credentials=credentials,
        timeout_s=_DEADLINE_S,
    )
    return str(answer)


def _tried(act: Callable[[], object]) -> str:
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
