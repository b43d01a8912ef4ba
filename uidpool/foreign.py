"""Uids that belong to somebody else on a Debian host with systemd, whether in use or not.

Sources: "Users, Groups, UIDs and GIDs on systemd Systems" (systemd's UIDS-GIDS document) and
Debian Policy 9.2.2. Nothing here reads the host.
"""

from typing import Final

from attrs import frozen

from uidpool.ranges import EMPTY, UidRanges


@frozen
class ForeignRange:
    """A range of uids with who owns it; one that is not `can_be_freed` is never a pool's."""

    uids: UidRanges
    owner: str
    can_be_freed: bool = True


def _foreign(first: int, last: int, owner: str, *, can_be_freed: bool = True) -> ForeignRange:
    return ForeignRange(UidRanges.of((first, last)), owner, can_be_freed)


FOREIGN: Final = (
    _foreign(0, 0, "root", can_be_freed=False),
    _foreign(1, 99, "Debian's static system users", can_be_freed=False),
    _foreign(100, 999, "system users made by packages", can_be_freed=False),
    _foreign(60000, 60000, "Debian's static users made on demand"),
    _foreign(60001, 60513, "systemd-homed"),
    _foreign(60514, 60577, "host users mapped into systemd-nspawn containers"),
    _foreign(60578, 61183, "Debian's static users made on demand"),
    _foreign(61184, 64054, "systemd's DynamicUser"),
    _foreign(64055, 64055, "libvirt's QEMU user (and systemd's DynamicUser)"),
    _foreign(64056, 65519, "systemd's DynamicUser"),
    _foreign(65520, 65533, "reserved by Debian"),
    _foreign(65534, 65534, "nobody, shared by many programs", can_be_freed=False),
    _foreign(65535, 65535, "no uid at all to 16-bit programs", can_be_freed=False),
    _foreign(524288, 1879048191, "users of systemd-nspawn containers"),
    _foreign(2147352576, 2147483647, "systemd's foreign files"),
    _foreign(2147483648, 4294967295, "uids from 2^31 on, unsafe to use", can_be_freed=False),
)
"""Sorted, disjoint. The last but one is systemd's range of files that belong to no local user
(2147352576-2147418111), together with the rest below 2^31, which systemd leaves unassigned."""


def foreign_parts(uids: UidRanges, freed: UidRanges = EMPTY) -> list[tuple[UidRanges, str]]:
    """The parts of a set that are somebody else's, with who that is; `freed` ones are not."""
    parts = []
    for foreign in FOREIGN:
        part = uids & foreign.uids
        if foreign.can_be_freed:
            part -= freed
        if part:
            parts.append((part, foreign.owner))
    return parts


def never_freed() -> UidRanges:
    """The uids that no configuration can free."""
    ranges = [foreign.uids for foreign in FOREIGN if not foreign.can_be_freed]
    return UidRanges(tuple(pair for uids in ranges for pair in uids.ranges))
