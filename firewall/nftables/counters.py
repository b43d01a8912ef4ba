"""Drop counters straight from the kernel: a start reads them twice, and nft takes 2 ms each time.

One dump of the named counters over netlink; libnftables would first fetch every table, chain and
set that this host has. The socket is made for each reading, in the caller's network namespace.
"""

import struct
from collections.abc import Callable
from typing import Final

from firewall.backend import Dropped
from firewall.errors import RulesUnreadable
from firewall.nftables.library import NETLINK_NETFILTER
from firewall.nftables.ruleset import COUNTERS
from kvmsec.linux.netlink import DumpInterrupted, attributes, dump

_DEADLINE_S: Final = 2.0
_TRIES: Final = 8

# linux/netfilter/nfnetlink.h and nf_tables.h
_GET_OBJECTS: Final = 10 << 8 | 19
_INET: Final = 1
_FAMILY_HEADER_BYTES: Final = 4
_OBJ_TABLE, _OBJ_NAME, _OBJ_TYPE, _OBJ_DATA = 1, 2, 3, 4
_COUNTER_PACKETS: Final = 2
_OBJECT_COUNTER: Final = 1


def read_dropped(is_ours: Callable[[str], bool]) -> Dropped:
    """Packets dropped by the tables `inet NAME` that `is_ours`. Raises RulesUnreadable."""
    for _ in range(_TRIES):
        try:
            counters = [one for one in _dump() if is_ours(one[0])]
        except DumpInterrupted:
            continue
        except OSError as error:
            hint = "run as root, with CAP_NET_ADMIN in this network namespace"
            raise RulesUnreadable("nftables", str(error), hint=hint) from error
        return Dropped(
            *(sum(n for _, name, n in counters if name == ours) for ours in COUNTERS.values())
        )
    hint = "something changes the packet rules all the time: stop it, then try again"
    raise RulesUnreadable("nftables", "the rules never stood still", hint=hint)


def _dump() -> list[tuple[str, str, int]]:
    """Table, name and packets of every counter of the `inet` tables."""
    kind = struct.pack("=HH", 8, _OBJ_TYPE) + struct.pack(">I", _OBJECT_COUNTER)
    body = struct.pack("=BBH", _INET, 0, 0) + kind
    answers = dump(NETLINK_NETFILTER, _GET_OBJECTS, body, timeout_s=_DEADLINE_S)
    return [counter for answer in answers for counter in _counter(answer)]


def _counter(payload: bytes) -> list[tuple[str, str, int]]:
    found = attributes(payload[_FAMILY_HEADER_BYTES:])
    if int.from_bytes(found.get(_OBJ_TYPE, b""), "big") != _OBJECT_COUNTER:
        return []
    packets = attributes(found[_OBJ_DATA])[_COUNTER_PACKETS]
    table, name = (found[key].rstrip(b"\0").decode() for key in (_OBJ_TABLE, _OBJ_NAME))
    return [(table, name, int.from_bytes(packets, "big"))]
