"""Drop counters straight from the kernel: a start reads them twice, and nft takes 2 ms each time.

One dump of the named counters over netlink; libnftables would first fetch every table, chain and
set that this host has. The socket is made for each reading, in the caller's network namespace.
"""

import os
import socket
import struct
from collections.abc import Callable, Iterator
from typing import Final

from firewall.backend import Dropped
from firewall.errors import RulesUnreadable
from firewall.nftables.library import NETLINK_NETFILTER
from firewall.nftables.ruleset import COUNTERS

_BUFFER_BYTES: Final = 1 << 18
_DEADLINE_S: Final = 2.0
_TRIES: Final = 8

# linux/netlink.h
_REQUEST_DUMP: Final = 0x1 | 0x300
_DUMP_INTERRUPTED: Final = 0x10
_NLMSG_ERROR: Final = 2
_NLMSG_DONE: Final = 3
_HEADER: Final = struct.Struct("=IHHII")
_TYPE_MASK: Final = 0x3FFF
# linux/netfilter/nfnetlink.h and nf_tables.h
_GET_OBJECTS: Final = 10 << 8 | 19
_INET: Final = 1
_FAMILY_HEADER_BYTES: Final = 4
_OBJ_TABLE, _OBJ_NAME, _OBJ_TYPE, _OBJ_DATA = 1, 2, 3, 4
_COUNTER_PACKETS: Final = 2
_OBJECT_COUNTER: Final = 1


class _Interrupted(Exception):
    """The rules changed in the middle of the dump."""


def read_dropped(is_ours: Callable[[str], bool]) -> Dropped:
    """Packets dropped by the tables `inet NAME` that `is_ours`. Raises RulesUnreadable."""
    for _ in range(_TRIES):
        try:
            counters = [one for one in _dump() if is_ours(one[0])]
        except _Interrupted:
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
    request = _HEADER.pack(_HEADER.size + len(body), _GET_OBJECTS, _REQUEST_DUMP, 1, 0) + body
    counters: list[tuple[str, str, int]] = []
    with socket.socket(
        socket.AF_NETLINK, socket.SOCK_RAW | socket.SOCK_CLOEXEC, NETLINK_NETFILTER
    ) as kernel:
        kernel.settimeout(_DEADLINE_S)
        kernel.send(request)
        while True:
            for kind_of_message, payload in _messages(kernel.recv(_BUFFER_BYTES)):
                if kind_of_message == _NLMSG_DONE:
                    return counters
                counters += _counter(payload)


def _messages(data: bytes) -> Iterator[tuple[int, bytes]]:
    start = 0
    while start + _HEADER.size <= len(data):
        size, kind, flags, _, _ = _HEADER.unpack_from(data, start)
        payload = data[start + _HEADER.size : start + size]
        if flags & _DUMP_INTERRUPTED:
            raise _Interrupted
        if kind == _NLMSG_ERROR:
            number = -struct.unpack_from("=i", payload)[0]
            raise OSError(number, os.strerror(number))
        yield kind, payload
        start += max(size + (-size % 4), _HEADER.size)


def _counter(payload: bytes) -> list[tuple[str, str, int]]:
    found = _attributes(payload[_FAMILY_HEADER_BYTES:])
    if int.from_bytes(found.get(_OBJ_TYPE, b""), "big") != _OBJECT_COUNTER:
        return []
    packets = _attributes(found[_OBJ_DATA])[_COUNTER_PACKETS]
    table, name = (found[key].rstrip(b"\0").decode() for key in (_OBJ_TABLE, _OBJ_NAME))
    return [(table, name, int.from_bytes(packets, "big"))]


def _attributes(data: bytes) -> dict[int, bytes]:
    found = {}
    start = 0
    while start + 4 <= len(data):
        size, kind = struct.unpack_from("=HH", data, start)
        found[kind & _TYPE_MASK] = data[start + 4 : start + size]
        start += max(size + (-size % 4), 4)
    return found
