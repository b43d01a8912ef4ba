"""Who may make which call; pure. Decided for each request, never for a connection."""

from collections.abc import Callable, Hashable
from datetime import datetime, timedelta
from typing import Final

from attrs import frozen

from kvmsec.pki.errors import NobodyListed, PeerRefused
from kvmsec.pki.standing import Peer, Trust, judge_standing, require_orderer
from kvmsec.rpc.calls import Call, Right
from kvmsec.rpc.errors import LIST_UNUSABLE, OWN_LIST_UNUSABLE, Refused
from kvmsec.rpc.wire import Caller

_REMEMBERED_FOR: Final = timedelta(seconds=15)
"""Of what a judgement asks, only the clock moves while the trust is the same object: a certificate
that ends meanwhile is taken for so much longer, a tenth of what clocks may differ by."""
_COMMON_FOR: Final = timedelta(seconds=1)
"""The same for the common certificate of the last resort, which ends without an allowance."""
_MOST_REMEMBERED: Final = 256


@frozen
class _Judgement:
    trust: Trust
    at: datetime
    peer: Peer


class Judgements:
    """Good judgements of the last seconds, by what was judged: one costs 0.25 ms.

    Another `Trust` object makes all of them void at once, so whoever changes whom this node trusts
    hands out a new one, and the same one as long as nothing has changed.
    """

    def __init__(self) -> None:
        self._known: dict[Hashable, _Judgement] = {}

    def of(self, what: Hashable, trust: Trust, now: datetime, judge: Callable[[], Peer]) -> Peer:
        """What `judge` says of this; raises what it raises, which is never remembered."""
        known = self._known.get(what)
        if known is not None and known.trust is trust and _is_recent(known, now):
            return known.peer
        self._known.pop(what, None)
        peer = judge()
        self._known[what] = _Judgement(trust, now, peer)
        if len(self._known) > _MOST_REMEMBERED:
            del self._known[next(iter(self._known))]
        return peer


def _is_recent(known: _Judgement, now: datetime) -> bool:
    limit = _COMMON_FOR if known.peer.uuid is None else _REMEMBERED_FOR
    return timedelta(0) <= now - known.at < limit


def authorize(
    call: Call, der: bytes, trust: Trust | None, now: datetime, known: Judgements
) -> Caller:
    """The caller, from the certificate (DER) that it has shown over the network, if it may call.

    `trust` is None while this node belongs to no cluster. Raises Refused.
    """
    # The library that reads certificates: who is told a fingerprint does not pay for it.
    from kvmsec.pki.certificates import fingerprint_of
    from kvmsec.pki.judgement import judge_orderer

    _require_network_right(call, trust)
    if trust is None:
        return Caller(fingerprint=fingerprint_of(der))
    try:
        peer = known.of(der, trust, now, lambda: judge_orderer(der, trust, now))
    except PeerRefused as error:
        raise refusal(error) from error
    return Caller(fingerprint=peer.fingerprint, name=peer.name, uuid=peer.uuid)


def authorize_again(call: Call, caller: Caller | None, trust: Trust | None) -> Peer | None:
    """The same, where the front says whose certificate it saw; None is root of this host.

    Returns None for root and for a joiner. Raises Refused.
    """
    if caller is None:
        return None
    _require_network_right(call, trust)
    if trust is None:
        return None
    if caller.name is None:
        raise Refused(None, "the caller has no name", evidence={"step": "name"})
    try:
        return require_orderer(judge_standing(caller.name, caller.uuid, caller.fingerprint, trust))
    except PeerRefused as error:
        raise refusal(error) from error


def refusal(error: PeerRefused, node: str | None = None) -> Refused:
    """A judgement's words as an error that travels, with the step that it failed at.

    `node` is the peer that was judged; None: the peer is told this. Whoever reads it learns from
    the evidence whose list of candidates can't be used.
    """
    evidence = {"step": str(error.step)}
    if isinstance(error, NobodyListed):
        evidence["list"] = LIST_UNUSABLE if node is None else OWN_LIST_UNUSABLE
    return Refused(node, error.message, hint=error.hint, evidence=evidence)


def _require_network_right(call: Call, trust: Trust | None) -> None:
    match call.right, trust:
        case (Right.LOCAL, _):
            raise _no_right(f"{call.name} is for root of the node itself")
        case (Right.JOINER, Trust()):
            raise _no_right("this node belongs to a cluster already")
        case (Right.CANDIDATE, None):
            raise _no_right("this node belongs to no cluster")


def _no_right(why: str) -> Refused:
    return Refused(None, why, evidence={"step": "role"})
