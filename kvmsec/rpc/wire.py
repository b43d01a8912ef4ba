"""From messages to bytes and back, for a version of the protocol; pure.

A request is its message as JSON. An answer is an envelope with the response's message (`ok`) or
with what went wrong (`fault`). A field says with `Meta(extra={"since": 2})` in which version it
came; for a peer that speaks an earlier one it is left out as long as it holds its default.
"""

import functools
from collections.abc import Iterator, Mapping
from typing import Any, Final, TypeVar, get_args, get_type_hints
from uuid import UUID

import msgspec
from msgspec import field

from kvmsec.linux.errors import Fault
from kvmsec.rpc.calls import CALLS, LOG_BYTES, OLDEST_PROTOCOL, PROTOCOL, Call
from kvmsec.rpc.errors import KINDS, BadMessage, RemoteFault, WrongProtocol
from kvmsec.rpc.messages import Fingerprint, Message, Name

REQUEST_LIMIT_BYTES: Final = 1 << 20
"""The largest request is a cluster's state: 500 nodes and a fragmented pool are some 100 KiB."""
RESPONSE_LIMIT_BYTES: Final = LOG_BYTES
"""The largest response is a log; each call has its own limit (`Call.answer_limit_bytes`)."""
EVIDENCE_LIMIT_BYTES: Final = 64 << 10

_T = TypeVar("_T")

_EVIDENCE: Final[Mapping[str, tuple[str, ...]]] = {
    "AlreadyRunning": ("name",),
    "BadDefinition": ("problems",),
    "Conflict": ("expected", "found"),
    "InstancesRun": ("names",),
    "NotRunning": ("name", "state"),
    "PoolRefused": ("problems",),
    "StaleCopy": ("found", "wanted"),
    "UidsInUse": ("holders",),
    "UnknownInstance": ("name",),
}
"""What of an error's evidence a caller acts on; all of it is in the error's message anyway."""


class Caller(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Who makes a call over the network: the certificate that it showed, and whose that is.

    `uuid` is None where that is the common certificate of the last resort. `name` is None, too,
    for a joiner (`kvmsec.rpc.calls.Right.JOINER`), whom a node without a cluster can't judge.
    """

    fingerprint: Fingerprint
    name: Name | None = None
    uuid: UUID | None = None


class _Fault(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    kind: str
    message: str
    hint: str | None = None
    evidence: dict[str, Any] = {}
    node: Name | None = None
    """Whose fault it is, where the sender has only passed it on."""


class _Answer(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    ok: msgspec.Raw = field(default_factory=msgspec.Raw)
    """Decoded once it is known that it is there; empty where it isn't."""
    fault: _Fault | None = None


# Which call, which version ---------------------------------------------------------------------


def find_call(name: str, protocol: int) -> Call:
    """The call of this name in this version. Raises BadMessage, and WrongProtocol."""
    require_spoken(protocol)
    call = CALLS.get(name)
    if call is None:
        raise BadMessage(None, f"there is no call {name[:80]!a}")
    require_call(call, protocol)
    return call


def require_spoken(protocol: int) -> None:
    """Raises WrongProtocol, with the versions that we speak, for one that we don't."""
    if not OLDEST_PROTOCOL <= protocol <= PROTOCOL:
        raise WrongProtocol(
            None,
            f"version {protocol} of the protocol is not spoken here, only "
            f"{OLDEST_PROTOCOL} to {PROTOCOL}",
            hint="install kvmsec releases that are closer to each other on both nodes",
            evidence={"protocols": [OLDEST_PROTOCOL, PROTOCOL]},
        )


def require_call(call: Call, protocol: int, node: str | None = None) -> None:
    """Raises WrongProtocol for a call that is younger than the version."""
    if call.since > protocol:
        raise WrongProtocol(
            node,
            f"the call {call.name} came with version {call.since} of the protocol, and this "
            f"node speaks {protocol}",
            hint="install a later kvmsec on it",
        )


def newest_common(theirs: tuple[int, int], node: str | None = None) -> int:
    """The newest version that both sides speak. Raises WrongProtocol where there is none."""
    oldest, newest = theirs
    common = min(PROTOCOL, newest)
    if oldest > newest or common < max(OLDEST_PROTOCOL, oldest):
        raise WrongProtocol(
            node,
            f"it speaks the versions {oldest} to {newest} of the protocol, this node "
            f"{OLDEST_PROTOCOL} to {PROTOCOL}",
            hint="install kvmsec releases that are closer to each other on both nodes",
            evidence={"protocols": [oldest, newest]},
        )
    return common


# Messages --------------------------------------------------------------------------------------


def encode_request(request: Message, protocol: int, *, node: str | None = None) -> bytes:
    """A request as bytes. Raises WrongProtocol for a value that this version can't say, BadMessage.

    `node` is whom it goes to, for the errors.
    """
    return _bounded(_encode(request, protocol, node), REQUEST_LIMIT_BYTES, "the request", node)


def decode_request(call: Call, body: bytes) -> Message:
    """The request that these bytes hold. Raises BadMessage."""
    _bounded(body, REQUEST_LIMIT_BYTES, "the request", None)
    return _decode(body, call.request, f"the request of {call.name}", None)


def encode_answer(
    response: Message, protocol: int, *, limit_bytes: int = RESPONSE_LIMIT_BYTES
) -> bytes:
    """A response in its envelope. Raises WrongProtocol, and BadMessage for one that is too large.

    Raises nothing that `encode_fault` could not send instead.
    """
    body = b'{"ok":' + _encode(response, protocol, None) + b"}"
    return _bounded(body, limit_bytes, "the response", None)


def encode_fault(error: Fault) -> bytes:
    """What went wrong, in its envelope: bounded words, and the evidence that may travel."""
    remote = error if isinstance(error, RemoteFault) else None
    kind = remote.kind if remote else type(error).__name__
    fault = _Fault(
        kind=kind,
        message=_sendable(remote.words if remote else error.message),
        hint=_sendable(error.hint) if error.hint else None,
        evidence=_evidence_of(error, kind),
        node=remote.node if remote else None,
    )
    return b'{"fault":' + msgspec.json.encode(fault) + b"}"


def decode_answer(call: Call, body: bytes, *, node: str | None = None) -> Message:
    """The response that an answer holds. Raises the fault that it holds (RemoteFault), BadMessage.

    `node` is whom it came from, for the errors.
    """
    _bounded(body, call.answer_limit_bytes, "the answer", node)
    what = f"the answer to {call.name}"
    answer = _decode(body, _Answer, what, node)
    response = bytes(answer.ok)
    if bool(response) == (answer.fault is not None):
        raise BadMessage(node, f"{what} holds neither a response nor a fault, or both")
    if answer.fault is not None:
        raise _fault_of(answer.fault, node)
    return _decode(response, call.response, what, node)


def require_no_fault(body: bytes, *, node: str | None = None) -> None:
    """Return for an envelope with any response. Raises the fault that it holds, and BadMessage."""
    answer = _decode(body, _Answer, "the answer", node)
    if answer.fault is not None:
        raise _fault_of(answer.fault, node)


def _encode(message: Message, protocol: int, node: str | None) -> bytes:
    try:
        if not _has_younger(type(message), protocol):
            return msgspec.json.encode(message)
        return msgspec.json.encode(_without_younger(message, protocol, node))
    except (TypeError, ValueError, RecursionError) as error:  # such as a lone surrogate
        raise BadMessage(node, f"{type(message).__name__} can't be sent: {error}") from error


def _decode(body: bytes, kind: type[_T], what: str, node: str | None) -> _T:
    try:
        return msgspec.json.decode(body, type=kind)
    except (msgspec.MsgspecError, ValueError, RecursionError) as error:
        raise BadMessage(
            node,
            f"{what} is not what it must be: {str(error)[:300]}",
            hint="are the kvmsec releases of both nodes what they seem?",
        ) from error


def _bounded(body: bytes, limit: int, what: str, node: str | None) -> bytes:
    if len(body) > limit:
        raise BadMessage(node, f"{what} has {len(body)} bytes, and at most {limit} are taken")
    return body


# Faults ----------------------------------------------------------------------------------------


def _fault_of(fault: _Fault, node: str | None) -> RemoteFault:
    kind = fault.kind if fault.kind.isidentifier() and len(fault.kind) <= 64 else "RemoteFault"
    # Over a socket of this host it is passed on; a node that names another speaks of that one.
    words = f"{fault.node}: {fault.message}" if node and fault.node else fault.message
    # Who reads a hint does what it says: it must not pass for this node's own.
    hint = f"{node} says: {fault.hint}" if node and fault.hint else fault.hint
    return KINDS.get(kind, RemoteFault)(
        node or fault.node, words, hint=hint, kind=kind, evidence=fault.evidence
    )


def _evidence_of(error: Fault, kind: str) -> dict[str, Any]:
    if isinstance(error, RemoteFault):
        found = error.evidence
    else:
        names = _EVIDENCE.get(kind, ())
        found = {name: getattr(error, name) for name in names if hasattr(error, name)}
    try:
        fits = len(msgspec.json.encode(found)) <= EVIDENCE_LIMIT_BYTES
    except (TypeError, ValueError, RecursionError):
        return {}
    return found if fits else {}


def _sendable(words: str) -> str:
    """Text without lone surrogates (JSON has none), cut to what the other side would show of it."""
    return words.encode(errors="backslashreplace").decode()[: 64 << 10]


# Fields that came later ------------------------------------------------------------------------


@functools.cache
def _since(kind: type[msgspec.Struct]) -> Mapping[str, int]:
    """In which version of the protocol each field came, for those that came after the first."""
    found: dict[str, int] = {}
    for name, hint in get_type_hints(kind, include_extras=True).items():
        for note in getattr(hint, "__metadata__", ()):
            if isinstance(note, msgspec.Meta) and note.extra and "since" in note.extra:
                found[name] = int(note.extra["since"])
    return found


@functools.cache
def _has_younger(kind: type[msgspec.Struct], protocol: int) -> bool:
    """Whether a message of this kind, or one in it, has a field that is younger than `protocol`."""
    return any(
        since > protocol for each in _structs_in(kind, set()) for since in _since(each).values()
    )


def _structs_in(hint: Any, seen: set[Any]) -> Iterator[type[msgspec.Struct]]:
    if isinstance(hint, type) and issubclass(hint, msgspec.Struct):
        if hint in seen:
            return
        seen.add(hint)
        yield hint
        for inner in get_type_hints(hint).values():
            yield from _structs_in(inner, seen)
    for inner in get_args(hint):
        yield from _structs_in(inner, seen)


def _without_younger(value: Any, protocol: int, node: str | None) -> Any:
    """A message as plain values that a peer of this version knows. Raises WrongProtocol."""
    if isinstance(value, msgspec.Struct):
        since = _since(type(value))
        kept: dict[str, Any] = {}
        for each in msgspec.structs.fields(value):
            held = getattr(value, each.name)
            if since.get(each.name, 1) <= protocol:
                kept[each.encode_name] = _without_younger(held, protocol, node)
            elif held != _default_of(each):
                raise WrongProtocol(
                    node,
                    f"{each.name} of {type(value).__name__} came with version "
                    f"{since[each.name]} of the protocol, and this node speaks {protocol}",
                    hint="install a later kvmsec on it, or leave out what asks for this",
                )
        return kept
    if isinstance(value, list | tuple):
        return [_without_younger(each, protocol, node) for each in value]
    if isinstance(value, Mapping):
        return {key: _without_younger(each, protocol, node) for key, each in value.items()}
    return value


def _default_of(field: msgspec.structs.FieldInfo) -> Any:
    if field.default_factory is not msgspec.NODEFAULT:
        return field.default_factory()
    return field.default
