"""A packet that must be refused: the proof that a uid can send nothing, asked of the kernel itself.

Sent as the very uid, with no privilege, in the caller's network namespace: an empty UDP datagram
to the loopback address of each family and, only once that was refused, one to an address beyond
this host where there is a route to any (a rule that covers `lo` alone must not pass). Refused
means EPERM, which a DROP in the output hook gives to UDP, and that our own drop counter has risen:
another firewall's refusal proves nothing about our rules.
"""

import errno
import os
import socket
from collections.abc import Callable, Collection
from functools import partial
from typing import Any, Final

from attrs import frozen

from firewall.backend import Dropped
from firewall.policy import FAMILIES, Family
from firewall.routes import LOOPBACK, Target, candidates_beyond, find_routed_target
from kvmsec.linux.children import run_in_child
from kvmsec.linux.credentials import Credentials

DEADLINE_S: Final = 1.0

# Answers that say "this host does not have the family": no such socket, or no ::1 to send from
# (IPv6 switched off on lo). ENETUNREACH is none of them: that is `lo` being down, a family that
# is there and can send as soon as anybody configures an interface.
_FAMILY_ABSENT: Final = (errno.EAFNOSUPPORT, errno.EADDRNOTAVAIL)


@frozen
class Attempt:
    """One datagram: where to, and the error that it met (None: it was sent)."""

    family: Family
    address: str
    error: int | None
    is_loopback: bool

    @property
    def is_refused(self) -> bool:
        return self.error == errno.EPERM

    @property
    def is_family_absent(self) -> bool:
        return self.is_loopback and self.error in _FAMILY_ABSENT

    def __str__(self) -> str:
        said = "was sent" if self.error is None else f"gave {_describe(self.error)}"
        return f"a packet to {self.address} {said}"


@frozen
class Report:
    """What the canary met. `risen` is by how much our drop counters rose meanwhile."""

    uid: int
    attempts: tuple[Attempt, ...]
    risen: Dropped

    @property
    def failures(self) -> tuple[Attempt, ...]:
        """Attempts that were neither refused nor impossible."""
        return tuple(
            attempt
            for attempt in self.attempts
            if not attempt.is_refused and not attempt.is_family_absent
        )

    @property
    def absent(self) -> tuple[Family, ...]:
        """Families that this host doesn't have, as far as a packet can tell."""
        return tuple(
            family
            for family in FAMILIES
            if not any(one.family == family and one.is_refused for one in self.attempts)
            and any(one.family == family and one.is_family_absent for one in self.attempts)
        )

    @property
    def uncounted(self) -> tuple[Family, ...]:
        """Families in which packets were refused, but not (all) by rules of ours."""
        return tuple(family for family in FAMILIES if self.risen.of(family) < self._refused(family))

    def _refused(self, family: Family) -> int:
        return sum(one.is_refused for one in self.attempts if one.family == family)

    @property
    def is_proof(self) -> bool:
        """Every packet was refused, by our rules, in both families."""
        return not (self.failures or self.absent or self.uncounted)


Carrier = Callable[[Callable[[], Any]], Any]
"""Runs a function as the uid that is to be proved, and returns its answer as JSON has it."""


def probe(
    uid: int, gid: int, read_dropped: Callable[[], Dropped], carrier: Carrier | None = None
) -> Report:
    """Send the canary as `uid` and `gid`, within a second: by a child, or by the `carrier`.

    Raises ChildFailed and ChildTimedOut (kvmsec.linux.errors), and what `read_dropped` and the
    carrier raise.
    """
    # Here, and not where they are sent: that child touches no more than it must.
    send = partial(_send_all, candidates_beyond())
    before = read_dropped()
    answers = carrier(send) if carrier is not None else _send_by_child(uid, gid, send)
    after = read_dropped()
    risen = Dropped(*(max(0, after.of(family) - before.of(family)) for family in FAMILIES))
    return Report(uid, tuple(_parse(answer) for answer in answers), risen)


def _send_by_child(uid: int, gid: int, send: Callable[[], Any]) -> Any:
    return run_in_child(
        send,
        what=f"sending a packet as uid {uid}",
        credentials=Credentials(uid, gid),
        timeout_s=DEADLINE_S,
    )


def _parse(answer: Any) -> Attempt:
    """One answer of the child, which has the uid that is not trusted: taken word by word."""
    family, address, error, is_loopback = answer
    return Attempt(
        "ipv4" if family == "ipv4" else "ipv6",
        str(address),
        None if error is None else int(error),
        bool(is_loopback),
    )


def _send_all(candidates: Collection[Target]) -> list[tuple[str, str, int | None, bool]]:
    """The sender's part. Nothing is sent beyond the host unless all of loopback is closed."""
    answers: list[tuple[str, str, int | None, bool]] = []
    for target in LOOPBACK:
        answers.append((target.family, target.address, _send(target), True))
    if all(error in (errno.EPERM, *_FAMILY_ABSENT) for _, _, error, _ in answers):
        for family in FAMILIES:
            beyond = find_routed_target(family, candidates)
            if beyond is not None:
                answers.append((beyond.family, beyond.address, _send(beyond), False))
    return answers


def _send(target: Target) -> int | None:
    try:
        with socket.socket(
            target.socket_family, socket.SOCK_DGRAM | socket.SOCK_NONBLOCK
        ) as sender:
            sender.sendto(b"", target.socket_address)
    except OSError as error:
        return error.errno
    return None


def _describe(number: int) -> str:
    """`EPERM (Operation not permitted)`."""
    return f"{errno.errorcode.get(number, number)} ({os.strerror(number)})"
