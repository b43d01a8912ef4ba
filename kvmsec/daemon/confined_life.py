"""How the front and the courier begin: told by their command line, shut in, and heard to be."""

import json
import os
import socket
import sys
from collections.abc import Sequence
from importlib import import_module
from pathlib import Path
from typing import Final

from hypervisor.seccomp import Filter, NoFilter, find_filter
from hypervisor.seccomp.rules import Rule
from kvmsec.daemon.confined_child import CONTROL, READY
from kvmsec.daemon.confinement import Confinement, ConfinementFailed, enter
from kvmsec.linux.credentials import Credentials

_STANDARD: Final = (0, 1, 2)


_LATE: Final = (
    *("encodings.idna", "encodings.ascii", "encodings.latin_1", "encodings.utf_8", "stringprep"),
    *("asyncio.sslproto", "ssl", "traceback", "linecache", "logging", "warnings", "zoneinfo"),
    *("kvmsec.pki.certificates", "kvmsec.pki.contexts", "kvmsec.pki.judgement"),
    *("hypervisor.foreign_text", "kvmsec.daemon.told", "kvmsec.daemon.system_calls"),
    *("concurrent.futures.thread", "email.utils", "http.cookies"),
    "cryptography.hazmat.backends.openssl.backend",
)
"""What is imported once it is needed, by Python or by us: too late then, with an empty tree."""


def import_all(*modules: str) -> None:
    """Import what this process will need, and everything that asyncio and aiohttp put off."""
    for name in (*_LATE, *modules):
        import_module(name)


def shut_in(rules: Sequence[Rule]) -> tuple[socket.socket, ...]:
    """Confine this process as its command line says; returns its control and its other sockets.

    Everything that it will ever import is there by now. What goes wrong is said on the control
    socket, and ends the process.
    """
    told = json.loads(sys.argv[1])
    count = 1 + int(told["sockets"])
    sockets = tuple(socket.socket(fileno=CONTROL + index) for index in range(count))
    for one in sockets:
        one.set_inheritable(False)
    control = sockets[0]
    try:
        enter(
            Confinement(
                name=told["name"],
                credentials=Credentials(told["uid"], told["gid"]),
                mount_point=told["mount_point"],
                system_calls=_filter(rules, told),
                descriptors=frozenset({*_STANDARD, *(one.fileno() for one in sockets)}),
            )
        )
    except (ConfinementFailed, NoFilter) as error:
        step = getattr(error, "step", "system calls")
        number, detail = getattr(error, "errno", 0), getattr(error, "detail", error.message)
        report = {"step": step, "errno": number, "detail": detail}
        control.sendall(json.dumps(report).encode() + b"\n")
        os._exit(1)
    control.sendall(READY)
    return sockets


def _filter(rules: Sequence[Rule], told: dict[str, object]) -> Filter | None:
    cache = told["cache"]
    try:
        return find_filter(None if cache is None else Path(str(cache)), rules)
    except NoFilter:
        if told["filter_may_be_missing"]:
            return None
        raise
