"""What the host's packet rules make of each process's uid: by their structure, and by a packet."""

import errno
import os
from collections.abc import Sequence
from typing import Any, Final

import msgspec
from attrs import evolve

from firewall.backend import Dropped
from firewall.canary import probe
from firewall.coverage import read_coverage
from hypervisor.foreign_text import escaped
from kvmsec.audit.facts import Canary, Coverage, Credentials, Facts
from kvmsec.audit.process_files import open_host
from kvmsec.linux.children import run_in_child
from kvmsec.linux.errors import ChildFailed, ChildTimedOut
from kvmsec.linux.namespaces import CLONE_NEWNET, setns

_RULES_S: Final = 20.0
_CANARY_S: Final = 5.0
_REASON_CHARS: Final = 160
_TITLE_CHARS: Final = 120
_UNKNOWN_UID: Final = "what it depends on could not be read"


def cover(processes: Sequence[Facts]) -> list[Facts]:
    """Add what the host's rules, read once for all, make of each process's uid.

    The caller has one thread. Raises ManyThreads.
    """
    uids = sorted({one.credentials.uid for one in processes if one.credentials})
    if not uids:
        return [_unread(one, "coverage", _UNKNOWN_UID) for one in processes]
    try:
        answer = run_in_child(
            lambda: _read(uids), what="reading the packet rules", timeout_s=_RULES_S
        )
        found = msgspec.convert(answer, dict[str, Coverage])
    except (ChildFailed, ChildTimedOut, msgspec.ValidationError) as error:
        return [_unread(one, "coverage", str(error)) for one in processes]
    return [
        evolve(one, coverage=found.get(str(one.credentials.uid)))
        if one.credentials
        else _unread(one, "coverage", _UNKNOWN_UID)
        for one in processes
    ]


def _read(uids: Sequence[int]) -> Any:
    """The child's part: in the host's network, wherever the command was started."""
    _enter_host_network()
    return {
        str(uid): msgspec.to_builtins(
            Coverage(
                ipv4="ipv4" in found.families,
                ipv6="ipv6" in found.families,
                rules=tuple(escaped(title, limit_chars=_TITLE_CHARS) for title in found.tables),
            )
        )
        for uid, found in read_coverage(uids).items()
    }


def try_rules(process: Facts) -> Facts:
    """Send packets as the process's uid in the host's network, and add what became of them.

    The caller has one thread. Raises ManyThreads.
    """
    who = process.credentials
    if who is None:
        return _unread(process, "canary", _UNKNOWN_UID)
    try:
        answer = run_in_child(
            lambda: msgspec.to_builtins(_send(who)),
            what=f"sending packets as uid {who.uid}",
            timeout_s=_CANARY_S,
        )
        return evolve(process, canary=msgspec.convert(answer, Canary))
    except (ChildFailed, ChildTimedOut, msgspec.ValidationError) as error:
        return _unread(process, "canary", str(error))


def _send(who: Credentials) -> Canary:
    if os.geteuid() != 0:
        raise PermissionError(errno.EPERM, "sending packets as another uid needs root")
    _enter_host_network()
    # Whose drop it was doesn't matter here: the rules may be anybody's.
    report = probe(who.uid, min(who.gids), Dropped)
    return Canary(
        refused=tuple(str(one) for one in report.attempts if one.is_refused),
        sent=tuple(str(one) for one in report.failures),
    )


def _enter_host_network() -> None:
    with open_host() as host:
        if host.link("ns/net") == os.readlink("/proc/self/ns/net"):
            return
        network = os.open("ns/net", os.O_RDONLY | os.O_CLOEXEC, dir_fd=host.directory)
    try:
        setns(network, CLONE_NEWNET)
    finally:
        os.close(network)


def _unread(facts: Facts, part: str, reason: str) -> Facts:
    return evolve(facts, unread={**facts.unread, part: escaped(reason, limit_chars=_REASON_CHARS)})
