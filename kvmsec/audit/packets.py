"""What the host's packet rules make of each process's uids: by their structure, and by a packet."""

import errno
import os
from collections.abc import Mapping, Sequence
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
_UIDS: Final = 8
"""As many of one process are looked at: four, and those of a thread that has others."""
_MANY_UIDS: Final = f"it has more than {_UIDS} uids"
_REASON_CHARS: Final = 160
_TITLE_CHARS: Final = 120
_UNKNOWN_UID: Final = "what it depends on could not be read"


def cover(processes: Sequence[Facts]) -> list[Facts]:
    """Add what the host's rules, read once for all, make of each process's uids.

    A family is closed where it is to every one of them: a process may send as any. The caller
    has one thread. Raises ManyThreads.
    """
    known = [one.credentials for one in processes if one.credentials]
    # One process must not make the rules of all others take too long to read.
    uids = sorted({uid for who in known if len(who.uids) <= _UIDS for uid in who.uids})
    if not uids:
        return [_unread(one, "coverage", _UNKNOWN_UID) for one in processes]
    try:
        answer = run_in_child(
            lambda: _read(uids), what="reading the packet rules", timeout_s=_RULES_S
        )
        found = msgspec.convert(answer, dict[str, Coverage])
    except (ChildFailed, ChildTimedOut, msgspec.ValidationError) as error:
        return [_unread(one, "coverage", str(error)) for one in processes]
    return [_covered(one, found) for one in processes]


def _covered(process: Facts, found: Mapping[str, Coverage]) -> Facts:
    who = process.credentials
    if who is None:
        return _unread(process, "coverage", _UNKNOWN_UID)
    if len(who.uids) > _UIDS:
        return _unread(process, "coverage", _MANY_UIDS)
    each = [found[str(uid)] for uid in who.uids]
    together = Coverage(
        ipv4=all(one.ipv4 for one in each),
        ipv6=all(one.ipv6 for one in each),
        rules=tuple(dict.fromkeys(rule for one in each for rule in one.rules)),
    )
    return evolve(process, coverage=together)


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
    if len(uids) > _UIDS:
        return _unread(process, "canary", _MANY_UIDS)
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
