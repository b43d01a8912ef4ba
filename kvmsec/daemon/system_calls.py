"""Which system calls the front and the courier may not make, beside what no jail lets through.

The table of the jails (`hypervisor.seccomp.rules`) with more in it: both are Python programs that
have imported all that they need, so neither starts a process, a thread or a program. The front
gets its connections from sockets that were bound for it and opens none; the courier opens TCP
connections and nothing else.

All of it answers with an error, none of it kills: a library that only asks must not end a node's
daemon, and nobody can fill the node's log.
"""

import socket
from typing import Final

from hypervisor.seccomp.rules import RULES, Answer, Comparison, Rule

_MSG_FASTOPEN: Final = 0x20000000  # linux/socket.h
_TYPE_BITS: Final = 0xF  # include/linux/net.h, SOCK_TYPE_MASK
_INT: Final = 0xFFFFFFFF

_NO_PROCESS: Final = Rule(
    ("clone", "fork", "vfork"),
    Answer.NOT_PERMITTED,
    "neither a process nor a thread is ever needed",
    "clone(2), fork(2), vfork(2)",
)
_SET_ALONE: Final = Rule(
    ("setsockopt",),
    Answer.NOT_PERMITTED,
    "TCP_NODELAY, SO_KEEPALIVE and SO_RCVLOWAT are set here, nothing else: a connection that is "
    "passed to the root part could hold it up when the kernel closes it there (SO_LINGER), and a "
    "filter of a listening socket would outlast the process (SO_ATTACH_FILTER)",
    "socket(7), tcp(7)",
    (
        *(Comparison(1, "equal", level) for level in (0, 2, 3, 4, 5)),
        Comparison(1, "greater", socket.IPPROTO_TCP),
        *(Comparison(2, "equal", option) for option in (0, *range(2, 9), *range(10, 18))),
        Comparison(2, "greater", socket.SO_RCVLOWAT),
    ),
)
_NO_SPOILING: Final = Rule(
    ("listen", "shutdown"),
    Answer.NOT_PERMITTED,
    "the sockets that listen are the root part's too, and those of the process that comes next",
    "listen(2), shutdown(2)",
)
_NO_FAST_OPEN: Final = (
    Rule(
        ("sendto", "sendmmsg"),
        Answer.NOT_PERMITTED,
        "connects without connect(2)",
        "tcp(7), MSG_FASTOPEN",
        (Comparison(3, "masked", _MSG_FASTOPEN, _MSG_FASTOPEN),),
    ),
    Rule(
        ("sendmsg",),
        Answer.NOT_PERMITTED,
        "connects without connect(2)",
        "tcp(7), MSG_FASTOPEN",
        (Comparison(2, "masked", _MSG_FASTOPEN, _MSG_FASTOPEN),),
    ),
)
_NO_SOCKETS: Final = Rule(
    ("socket", "connect", "bind"),
    Answer.NOT_PERMITTED,
    "what it serves was opened for it; nobody's port is probed from here, nor a service asked that "
    "trusts the node's own addresses, nor an abstract socket of the node's",
    "socket(2), connect(2), bind(2), unix(7)",
)
_OTHER_FAMILIES: Final = (  # all but AF_INET (2) and AF_INET6 (10)
    *(Comparison(0, "equal", family) for family in (0, 1, 3, 8, 9)),
    Comparison(0, "masked", 4, 4),  # 4 to 7
    Comparison(0, "greater", 10),
)
_OTHER_TYPES: Final = (  # all but SOCK_STREAM (1)
    *(Comparison(1, "masked", kind, _TYPE_BITS) for kind in (0, 2, 3)),
    Comparison(1, "masked", 4, 4),  # 4 to 7
    Comparison(1, "masked", 8, 8),  # 8 to 15
)
_OTHER_PROTOCOLS: Final = (  # all but the family's own (0) and TCP (6)
    *(Comparison(2, "equal", protocol) for protocol in (1, 2, 3, 4, 5, 7)),
    Comparison(2, "greater", socket.IPPROTO_TCP + 1),
)
_TCP_ONLY: Final = Rule(
    ("socket",),
    Answer.NO_SUCH_FAMILY,
    "it calls nodes, which is TCP; no abstract socket of the node's, no datagram",
    "socket(2), address_families(7)",
    (*_OTHER_FAMILIES, *_OTHER_TYPES, *_OTHER_PROTOCOLS),
)
_NO_LISTENING: Final = Rule(
    ("bind", "listen", "accept", "accept4"),
    Answer.NOT_PERMITTED,
    "it calls and is never called",
    "bind(2), listen(2), accept(2)",
)


def front_rules() -> tuple[Rule, ...]:
    """The table of the front."""
    return _with(_NO_PROCESS, _SET_ALONE, _NO_SPOILING, *_NO_FAST_OPEN, _NO_SOCKETS)


def courier_rules() -> tuple[Rule, ...]:
    """The table of the courier."""
    return _with(_NO_PROCESS, _SET_ALONE, *_NO_FAST_OPEN, _TCP_ONLY, _NO_LISTENING)


def _with(*own: Rule) -> tuple[Rule, ...]:
    """The jails' table; a call that has a rule here has no other (libseccomp takes one answer)."""
    taken = {call for rule in own for call in rule.calls}
    kept = [rule for rule in RULES if taken.isdisjoint(rule.calls)]
    cut = [call for rule in RULES if not taken.isdisjoint(rule.calls) for call in rule.calls]
    if lost := set(cut) - taken:
        raise ValueError(f"the jails' rules for {sorted(lost)} would be lost")
    return (*kept, *own)
