"""What goes wrong between two nodes; each error names the node and tells its class apart."""

from collections.abc import Mapping
from typing import Any, Final

from hypervisor.foreign_text import escaped
from kvmsec.errors import KvmsecError

LIMIT_LINES: Final = 100
LIMIT_LINE_CHARS: Final = 1000
"""More than any fault of ours says; a peer that lies can fill no screen and no log with it."""


class RemoteFault(KvmsecError):
    """A call failed on the other side, or on the way there.

    `node` is whom it was made to (None: the daemon of this host), `kind` the name of the error's
    class there, `evidence` what of it travelled, as plain values. What a peer said is escaped.
    """

    def __init__(
        self,
        node: str | None,
        message: str,
        *,
        hint: str | None = None,
        kind: str | None = None,
        evidence: Mapping[str, Any] | None = None,
    ) -> None:
        words = bounded(message)
        super().__init__(
            f"{node}: {words}" if node else words, hint=bounded(hint) if hint else None
        )
        self.node = node
        self.words = words
        """The message without the node's name."""
        self.kind = kind or type(self).__name__
        self.evidence = dict(evidence or {})


class Unreachable(RemoteFault):
    """No connection to the node came about, or it broke before the answer was there."""


class CallTimedOut(RemoteFault):
    """No answer within the call's deadline: whether an order was carried out is not known."""


class Refused(RemoteFault):
    """One side does not trust the other, or the caller may not make this call.

    `evidence["step"]` names what the judgement failed at; `evidence["list"]` is there where it
    failed since there is no list of candidates to judge by.
    """


class StaleCopy(RemoteFault):
    """The node's copy of the cluster's state is older than what an order was made from.

    `evidence` holds both revisions, `found` and `wanted`.
    """


class WrongProtocol(RemoteFault):
    """The two sides share no version of the protocol that has what was asked for.

    `evidence["protocols"]` holds the oldest and the newest version that the node speaks, if known.
    """


class BadMessage(RemoteFault):
    """What arrived, or was about to be sent, is no message of this call."""


class Overloaded(RemoteFault):
    """The node, or the process on the way to it, has as much to do as it takes on at once."""


KINDS: Final[Mapping[str, type[RemoteFault]]] = {
    "Unreachable": Unreachable,
    "CallTimedOut": CallTimedOut,
    "Refused": Refused,
    "StaleCopy": StaleCopy,
    "WrongProtocol": WrongProtocol,
    "BadMessage": BadMessage,
    "Overloaded": Overloaded,
}
"""The classes that a fault comes back as, by its kind; every other kind is a `RemoteFault`."""


LIST_UNUSABLE: Final = "unusable"
OWN_LIST_UNUSABLE: Final = "unusable here"
"""What `evidence["list"]` of a `Refused` says of the node's list of candidates, or of one's own."""


def bounded(text: str) -> str:
    """What somebody else wrote, as it may stand in a message: its lines kept, the rest escaped."""
    lines = text.splitlines()
    shown = [escaped(line, limit_chars=LIMIT_LINE_CHARS) for line in lines[:LIMIT_LINES]]
    if len(lines) > LIMIT_LINES:
        shown.append(f"… (and {len(lines) - LIMIT_LINES} more lines)")
    return "\n".join(shown)
