"""Drop counters straight from libiptc: a start reads them twice, and has no time for a command.

The handle is made for each reading and freed after it, so that it is of the network namespace
that the caller has now (python-iptables keeps its handles, and takes half a second to import).
"""

import contextlib
import ctypes
import functools
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Final

from firewall.errors import RulesUnreadable
from firewall.policy import Family

_LIBRARIES: Final[dict[Family, tuple[str, str]]] = {
    "ipv4": ("libip4tc.so.2", "iptc"),
    "ipv6": ("libip6tc.so.2", "ip6tc"),
}
# The thread's own namespace: another thread may be elsewhere.
_NAMES: Final[dict[Family, Path]] = {
    "ipv4": Path("/proc/thread-self/net/ip_tables_names"),
    "ipv6": Path("/proc/thread-self/net/ip6_tables_names"),
}

_PRIVILEGE_HINT: Final = "run as root, with CAP_NET_ADMIN in this network namespace"


class _Counters(ctypes.Structure):
    """struct xt_counters of linux/netfilter/x_tables.h."""

    _fields_ = (("packets", ctypes.c_uint64), ("bytes", ctypes.c_uint64))


# Where struct ipt_entry and struct ip6t_entry keep them. libiptc's own iptc_read_counter finds a
# rule by walking to it from the first.
_COUNTERS_OFFSET: Final[dict[Family, int]] = {"ipv4": 96, "ipv6": 152}


def tables_in_use(family: Family) -> frozenset[str]:
    """The legacy tables that exist in this namespace; asking the kernel by name would make them.

    Raises RulesUnreadable without the privilege to know.
    """
    try:
        return frozenset(_NAMES[family].read_text().split())
    except FileNotFoundError:
        return frozenset()
    except PermissionError as error:
        raise RulesUnreadable("iptables", f"{family}: {error}", hint=_PRIVILEGE_HINT) from error


def read_dropped(family: Family, is_ours: Callable[[str], bool]) -> int:
    """Packets dropped by the chains of `filter` that `is_ours`. Raises RulesUnreadable."""
    if "filter" not in tables_in_use(family):
        return 0
    with _opened(family, "filter") as (call, handle):
        chains = list(_walk(call["first_chain"](handle), lambda: call["next_chain"](handle)))
        return sum(
            packets
            for chain in chains
            if is_ours(chain.decode())
            for target, (packets, _) in _rules(call, handle, chain, family)
            if target == b"DROP"
        )


def read_counters(family: Family, table: str, chain: str) -> list[tuple[int, int]]:
    """Packets and bytes of each rule of a chain, none where there is no such chain."""
    with _opened(family, table) as (call, handle):
        return [counters for _, counters in _rules(call, handle, chain.encode(), family)]


@contextlib.contextmanager
def _opened(family: Family, table: str) -> Iterator[tuple[dict[str, Any], int]]:
    call = _functions(family)
    handle = call["init"](table.encode())
    if not handle:
        detail = call["strerror"](ctypes.get_errno()).decode(errors="replace")
        raise RulesUnreadable("iptables", f"{family}: {detail}", hint=_PRIVILEGE_HINT)
    try:
        yield call, handle
    finally:
        call["free"](handle)


def _rules(
    call: dict[str, Any], handle: int, chain: bytes, family: Family
) -> Iterator[tuple[bytes, tuple[int, int]]]:
    """The target's name and the counters of each rule of a chain."""
    entry = call["first_rule"](chain, handle)
    while entry:
        counters = _Counters.from_address(entry + _COUNTERS_OFFSET[family])
        yield call["get_target"](entry, handle), (counters.packets, counters.bytes)
        entry = call["next_rule"](entry, handle)


def _walk(first: bytes | None, following: Callable[[], bytes | None]) -> Iterator[bytes]:
    name = first
    while name:
        yield name
        name = following()


@functools.cache
def _functions(family: Family) -> dict[str, Any]:
    """The functions of libiptc/libiptc.h, under the names that both families share."""
    library_name, prefix = _LIBRARIES[family]
    try:
        library = ctypes.CDLL(library_name, use_errno=True)
    except OSError as error:
        hint = "apt-get install iptables"
        raise RulesUnreadable("iptables", f"{library_name} is missing", hint=hint) from error
    handle, text = ctypes.c_void_p, ctypes.c_char_p
    prototypes: dict[str, tuple[Any, list[Any]]] = {
        "init": (handle, [text]),
        "free": (None, [handle]),
        "first_chain": (text, [handle]),
        "next_chain": (text, [handle]),
        "first_rule": (handle, [text, handle]),
        "next_rule": (handle, [handle, handle]),
        "get_target": (text, [handle, handle]),
        "strerror": (text, [ctypes.c_int]),
    }
    functions = {}
    for name, (result, arguments) in prototypes.items():
        function = getattr(library, f"{prefix}_{name}")
        function.restype, function.argtypes = result, arguments
        functions[name] = function
    return functions
