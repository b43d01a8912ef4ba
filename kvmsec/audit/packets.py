"""What the host's packet rules make of each process's uids: by their structure, and by a packet."""

import errno
import os
from collections.abc import Sequence
from functools import partial
from typing import Any, Final

import msgspec
from attrs import evolve

from firewall.backend import Dropped
from firewall.canary import probe
from firewall.coverage import read_coverage
from hypervisor.foreign_text import escaped
from kvmsec.audit.facts import Canary, Coverage, Facts
from kvmsec.audit.process_files import enter_network_of, open_host
from kvmsec.linux.children import run_in_child
from kvmsec.linux.errors import ChildFailed, ChildTimedOut

_RULES_S: Final = 20.0
_CANARY_S: Final = 5.0
_UIDS_TRIED: Final = 8
_REASON_CHARS: Final = 160
_TITLE_CHARS: Final = 120
_UNKNOWN_UID: Final = "what it depends on could not be read"


def cover(processes: Sequence[Facts]) -> list[Facts]:
    """Add what the host's rules, read once for all, make of each process's uids.

    A family is closed where it is to every one of them: a process may send as any. The caller
    has one thread. Raises ManyThreads.
    """
    uids = sorted({uid for one in processes if one.credentials for uid in one.credentials.uids})
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
        evolve(one, coverage=_together([found[str(uid)] for uid in one.credentials.uids]))
        if one.credentials
        else _unread(one, "coverage", _UNKNOWN_UID)
        for one in processes
    ]


def _together(found: Sequence[Coverage]) -> Coverage:
    return Coverage(
        ipv4=all(one.ipv4 for one in found),
        ipv6=all(one.ipv6 for one in found),
        rules=tuple(dict.fromkeys(rule for one in found for rule in one.rules)),
    )


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
    """Send packets as each of the process's uids in the host's network; add what became of them.

    The caller has one thread. Raises ManyThreads.
    """
    who = process.credentials
    if who is None:
        return _unread(process, "canary", _UNKNOWN_UID)
    # Root may send as anybody: what becomes of its own packets tells.
    uids = (0,) if who.uid == 0 else who.uids
    if len(uids) > _UIDS_TRIED:
        return _unread(process, "canary", f"it has more than {_UIDS_TRIED} uids")
    refused: list[str] = []
    sent: list[str] = []
    for uid in uids:
        try:
            answer = run_in_child(
                partial(_send, uid, min(who.gids)),
                what=f"sending packets as uid {uid}",
                timeout_s=_CANARY_S,
            )
            found = msgspec.convert(answer, Canary)
        except (ChildFailed, ChildTimedOut, msgspec.ValidationError) as error:
            return _unread(process, "canary", str(error))
        refused += found.refused
        sent += found.sent
    return evolve(process, canary=Canary(refused=tuple(refused), sent=tuple(sent)))


def _send(uid: int, gid: int) -> Any:
    """The child's part, in the host's network too."""
    if os.geteuid() != 0:
        raise PermissionError(errno.EPERM, "sending packets as another uid needs root")
    _enter_host_network()
    # Whose drop it was doesn't matter here: the rules may be anybody's.
    report = probe(uid, gid, Dropped)
    return msgspec.to_builtins(
        Canary(
            refused=tuple(str(one) for one in report.attempts if one.is_refused),
            sent=tuple(str(one) for one in report.failures),
        )
    )


def _enter_host_network() -> None:
    with open_host() as host:
        enter_network_of(host)


def _unread(facts: Facts, part: str, reason: str) -> Facts:
    return evolve(facts, unread={**facts.unread, part: escaped(reason, limit_chars=_REASON_CHARS)})
