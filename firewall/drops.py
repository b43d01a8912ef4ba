"""The last refused packets, as far as the kernel's log still has them."""

import collections
import contextlib
import os
import re
import time
from collections.abc import Iterable, Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Final

from attrs import asdict, frozen

from firewall.policy import UidPairs
from firewall.routes import DISCARD_PORT

_KERNEL_LOG: Final = Path("/dev/kmsg")
_RECORD_BYTES: Final = 8192
_RECORDS_READ: Final = 200_000
_SHOWN: Final = 10
_FIELD: Final = re.compile(r"([A-Z]+)=(\S*)")
# An empty UDP datagram: the IP header and 8 bytes of UDP.
_CANARY_BYTES: Final = frozenset({"28", "48"})


@frozen
class Drop:
    """One line that the log rule wrote. `at` is ISO 8601, UTC; `is_canary` for our own test."""

    at: str
    uid: int | None
    interface: str
    source: str
    destination: str
    protocol: str
    port: int | None
    is_canary: bool

    def plain(self) -> dict[str, Any]:
        return asdict(self)


def read_last_drops(prefix: str, uids: UidPairs) -> tuple[Drop, ...]:
    """The last ten lines with the prefix, oldest first, from /dev/kmsg; see `parse_drops`.

    Raises OSError where the log may not be read (no such device, no CAP_SYSLOG).
    """
    descriptor = os.open(_KERNEL_LOG, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    try:
        return parse_drops(_records(descriptor), prefix, uids, time.time() - time.monotonic())
    finally:
        os.close(descriptor)


def _records(descriptor: int) -> Iterator[str]:
    """One record a read (Documentation/ABI/testing/dev-kmsg), to the end of the log."""
    for _ in range(_RECORDS_READ):
        # EPIPE: what was to come next has just been overwritten; the next read goes on after it.
        with contextlib.suppress(BrokenPipeError):
            try:
                yield os.read(descriptor, _RECORD_BYTES).decode(errors="replace")
            except BlockingIOError:
                return


def parse_drops(
    records: Iterable[str], prefix: str, uids: UidPairs, boot_time_s: float
) -> tuple[Drop, ...]:
    """The drops among records of /dev/kmsg; `boot_time_s` is when its clock stood at zero.

    Those of other uids are other rules', which may have the same prefix. A packet that has no uid
    any more may be anybody's.
    """
    last: collections.deque[Drop] = collections.deque(maxlen=_SHOWN)
    for record in records:
        head, _, message = record.partition(";")
        if message.startswith(prefix):
            microseconds = int(head.split(",")[2])
            line = message.split("\n", 1)[0].removeprefix(prefix)
            drop = _parse(line, boot_time_s + microseconds / 1e6)
            if drop.uid is None or any(first <= drop.uid <= end for first, end in uids):
                last.append(drop)
    return tuple(last)


def _parse(line: str, at_s: float) -> Drop:
    fields: dict[str, str] = {}
    for name, value in _FIELD.findall(line):
        fields.setdefault(name, value)  # LEN comes twice: the packet's is first.
    port = fields.get("DPT")
    return Drop(
        at=datetime.fromtimestamp(at_s, UTC).isoformat(timespec="milliseconds"),
        uid=int(fields["UID"]) if "UID" in fields else None,
        interface=fields.get("OUT", ""),
        source=fields.get("SRC", ""),
        destination=fields.get("DST", ""),
        protocol=fields.get("PROTO", "").lower(),
        port=int(port) if port else None,
        is_canary=port == str(DISCARD_PORT) and fields.get("LEN") in _CANARY_BYTES,
    )
