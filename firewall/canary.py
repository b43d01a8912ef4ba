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
from typing import Final

from attrs import frozen

from firewall.backend import Dropped
from firewall.policy import FAMILIES, Family
from firewall.routes import LOOPBACK, Target, candidates_beyond, find_routed_target
from kvmsec.linux.credentials import Credentials, acting_as

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


def probe(uid: int, gid: int, read_dropped: Callable[[], Dropped]) -> Report:
    """Send the canary as `uid` and `gid`, by the calling process.

    Raises ManyThreads, OSError when it can't act as that uid, and what `read_dropped` raises.
    """
    candidates = candidates_beyond()
    before = read_dropped()
    with acting_as(Credentials(uid, gid)):
        attempts = _send_all(candidates)
    after = read_dropped()
    risen = Dropped(*(max(0, after.of(family) - before.of(family)) for family in FAMILIES))
    return Report(uid, attempts, risen)


def _send_all(candidates: Collection[Target]) -> tuple[Attempt, ...]:
    """Nothing is sent beyond the host unless all of loopback is closed."""
    attempts = tuple(_send(target, is_loopback=True) for target in LOOPBACK)
    if not all(one.is_refused or one.is_family_absent for one in attempts):
        return attempts
    beyond = (find_routed_target(family, candidates) for family in FAMILIES)
    return (*attempts, *(_send(one, is_loopback=False) for one in beyond if one is not None))


def _send(target: Target, *, is_loopback: bool) -> Attempt:
    error = None
    try:
        with socket.socket(
            target.socket_family, socket.SOCK_DGRAM | socket.SOCK_NONBLOCK
        ) as sender:
            sender.sendto(b"", target.socket_address)
    except OSError as failure:
        error = failure.errno
    return Attempt(target.family, target.address, error, is_loopback)


def _describe(number: int) -> str:
    """`EPERM (Operation not permitted)`."""
    return f"{errno.errorcode.get(number, number)} ({os.strerror(number)})"
