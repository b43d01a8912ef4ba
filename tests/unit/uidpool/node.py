"""A node of the test's own: the records of its uids, and what these have."""

from pathlib import Path
from typing import Any

from uidpool.claims import Lease, State
from uidpool.ranges import UidRanges
from uidpool.usage import Usage
from uidpool.waiting import WaitingClaims

POOL = UidRanges.parse("210000-210003")


class Node:
    """A node's directories, with uids that are clean unless the test says otherwise."""

    def __init__(self, directory: Path) -> None:
        self.leases = directory / "run/uids"
        self.state = directory / "lib/uids"
        self.dirty: dict[int, Usage] = {}
        self.cleaned: list[int] = []

    def claims(self, root: str = "/") -> WaitingClaims:
        return WaitingClaims(
            self.leases, self.state, root=root, inspect=self.inspect, clean=self.clean
        )

    def inspect(self, uid: int) -> Usage:
        return self.dirty.get(uid, Usage(uid))

    def clean(self, uid: int) -> Usage:
        self.cleaned.append(uid)
        return self.inspect(uid)

    def files(self) -> list[str]:
        """Every record and every leftover, locks excepted."""
        found = [path for path in self.leases.rglob("*") if path.is_file()]
        found += [path for path in self.state.rglob("*") if path.is_file()]
        return sorted(path.name for path in found if path.parent.name != ".locks")


def draw(claims: WaitingClaims, instance: str = "vm", pool: UidRanges = POOL, **more: Any) -> Lease:
    return claims.draw(pool, instance=instance, generation="g1", **more)


def resting(claims: WaitingClaims) -> list[int]:
    return [one.uid for one in claims.states() if one.state is State.RESTING]
