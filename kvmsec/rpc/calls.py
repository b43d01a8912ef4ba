"""Every call that a node answers: its messages, who may make it, and how long it may take."""

from collections.abc import Mapping
from enum import StrEnum
from typing import Final

from attrs import evolve, frozen

from kvmsec.rpc import messages as m

PROTOCOL: Final = 1
OLDEST_PROTOCOL: Final = 1


_ANSWER_BYTES: Final = 1 << 20
"""A cluster's state is some 100 KiB."""
_LISTING_BYTES: Final = 4 << 20
"""Ten thousand free uids are 1.5 MiB."""
LOG_BYTES: Final = 16 << 20
"""768 KiB of which JSON may make six bytes each, `\\u0000`."""


class Right(StrEnum):
    """Who may make a call."""

    CANDIDATE = "candidate"
    """A master candidate, over the network; and root of this host."""
    LOCAL = "local"
    """Root of this host alone."""
    JOINER = "joiner"
    """Whoever knows the join token, while this node belongs to no cluster."""


@frozen(kw_only=True)
class Call:
    """One call. `is_order` says that it changes something; it is logged then."""

    name: str
    request: type[m.Message]
    response: type[m.Message]
    timeout_s: float
    is_order: bool = False
    right: Right = Right.CANDIDATE
    since: int = 1
    answer_limit_bytes: int = _ANSWER_BYTES
    """What is larger is not even decoded: in memory it may become twenty times as large."""

    def deadline_s(self, request: m.Message) -> float:
        """Seconds until an answer must be there: a request may itself ask to wait for something."""
        match request:
            case m.StopRequest() | m.EventsRequest():
                return self.timeout_s + request.timeout_s
            case _:
                return self.timeout_s


_QUICK_S: Final = 10.0
_SLOW_S: Final = 120.0
_ALL_CHECKS_S: Final = 180.0


def _calls() -> tuple[Call, ...]:
    def look(name: str, request: type[m.Message], response: type[m.Message]) -> Call:
        return Call(name=name, request=request, response=response, timeout_s=_QUICK_S)

    def listing(name: str, request: type[m.Message], response: type[m.Message]) -> Call:
        return evolve(look(name, request, response), answer_limit_bytes=_LISTING_BYTES)

    def order(name: str, request: type[m.Message], response: type[m.Message]) -> Call:
        return Call(name=name, request=request, response=response, timeout_s=_SLOW_S, is_order=True)

    return (
        look("node.info", m.Nothing, m.NodeInfo),
        # Its checks have deadlines of their own, after which it tells what the others found.
        evolve(look("node.doctor", m.Nothing, m.Findings), timeout_s=_ALL_CHECKS_S),
        listing("node.examine", m.PoolRequest, m.Examination),
        order("node.reconcile", m.Nothing, m.Lines),
        order("node.leave", m.Nothing, m.Nothing),
        look("users.check", m.PoolRequest, m.Problems),
        order("users.provision", m.PoolRequest, m.Provisioned),
        listing("uids.held", m.Nothing, m.Held),
        listing("uids.states", m.UidStatesRequest, m.UidStates),
        order("uids.release", m.UidRequest, m.UidState),
        order("uids.forget_resting", m.Nothing, m.Nothing),
        listing("rules.show", m.Nothing, m.Shown),
        look("rules.verify", m.Nothing, m.Findings),
        order("rules.apply", m.Nothing, m.Nothing),
        order("rules.sync", m.Nothing, m.Nothing),
        # No cluster needs it, and guests that run could send from then on.
        evolve(order("rules.remove", m.Forced, m.Nothing), right=Right.LOCAL),
        listing("instance.list", m.Nothing, m.Instances),
        look("instance.info", m.InstanceRequest, m.Instance),
        evolve(
            look("instance.log", m.InstanceRequest, m.Log),
            answer_limit_bytes=LOG_BYTES,
        ),
        look("instance.events", m.EventsRequest, m.Events),
        order("instance.start", m.StartRequest, m.Instance),
        order("instance.stop", m.StopRequest, m.Instance),
        order("instance.reboot", m.InstanceRequest, m.Nothing),
        look("state.get", m.Nothing, m.State),
        order("state.put", m.State, m.Revision),
        order("certificates.prepare", m.PrepareRequest, m.Prepared),
        order("certificates.commit", m.CommitRequest, m.Nothing),
        order("certificates.rollback", m.Nothing, m.Nothing),
        order("certificates.finish", m.FinishRequest, m.Nothing),
        order("files.put", m.FileRequest, m.Nothing),
        Call(
            name="join.hello",
            request=m.JoinRequest,
            response=m.JoinAnswer,
            timeout_s=_QUICK_S,
            right=Right.JOINER,
        ),
        Call(
            name="join.admit",
            request=m.AdmitRequest,
            response=m.NodeInfo,
            timeout_s=_QUICK_S,
            is_order=True,
            right=Right.JOINER,
        ),
    )


CALLS: Final[Mapping[str, Call]] = {call.name: call for call in _calls()}
