"""A node's answers (`kvmsec.agent`) as messages, and back.

What a peer said has the types of its message by then; nothing here is judged again.
"""

from collections.abc import Iterable, Mapping
from typing import Any, Final

import msgspec

from kvmsec.agent import Event, Finding, InstanceInfo, InstanceLog, InstanceState, UidState
from kvmsec.rpc import messages as m

LOG_LIMIT_CHARS: Final = 256 << 10
WORDS_LIMIT_CHARS: Final = 1 << 16
"""As `kvmsec.rpc.messages.Words` has it."""


def plain(values: Mapping[str, Any]) -> dict[str, Any]:
    """Values as JSON has them: paths and whatever else becomes text."""
    made: dict[str, Any] = msgspec.to_builtins(dict(values), enc_hook=str, str_keys=True)
    return made


def words(text: str) -> str:
    """Text that a message takes: the rest of a very long one is left out."""
    return text if len(text) <= WORDS_LIMIT_CHARS else text[: WORDS_LIMIT_CHARS - 1] + "…"


def maybe_words(text: str | None) -> str | None:
    return None if text is None else words(text)


def instance_message(info: InstanceInfo) -> m.Instance:
    return m.Instance(
        name=info.name,
        state=info.state.value,
        reason=maybe_words(info.reason),
        pid=info.pid,
        uid=info.uid,
        user=info.user,
        security_model=info.security_model,
        accelerator=info.accelerator,
        memory_mib=info.memory_mib,
        vcpus=info.vcpus,
        started_at=info.started_at,
        resident_bytes=info.resident_bytes,
        cpu_s=info.cpu_s,
        autostart=info.autostart,
        details=plain(info.details),
    )


def instance_info(message: m.Instance) -> InstanceInfo:
    known = msgspec.structs.asdict(message)
    return InstanceInfo(**{**known, "state": InstanceState(message.state)})


def event_message(event: Event) -> m.Event:
    return m.Event(
        at=event.at,
        instance=event.instance,
        state=event.state.value,
        reason=maybe_words(event.reason),
    )


def event(message: m.Event) -> Event:
    return Event(message.at, message.instance, InstanceState(message.state), message.reason)


def log_message(log: InstanceLog) -> m.Log:
    """The last part of each text; JSON has no lone surrogates, so they are shown as escapes."""

    def tail(text: str) -> str:
        return text[-LOG_LIMIT_CHARS:].encode(errors="backslashreplace").decode()

    return m.Log(kvmsec=tail(log.kvmsec), qemu=tail(log.qemu), serial=tail(log.serial))


def log(message: m.Log) -> InstanceLog:
    return InstanceLog(message.kvmsec, message.qemu, message.serial)


def uid_state_message(state: UidState) -> m.UidState:
    return m.UidState(
        uid=state.uid,
        user=state.user,
        state=state.state,
        instance=state.instance,
        reason=maybe_words(state.reason),
        root=state.root,
    )


def uid_state(message: m.UidState) -> UidState:
    return UidState(**msgspec.structs.asdict(message))


def findings_message(findings: Iterable[Finding]) -> m.Findings:
    return m.Findings(
        findings=tuple(
            m.Finding(
                code=one.code,
                severity=one.severity,
                item=words(one.item),
                message=words(one.message),
                hint=maybe_words(one.hint),
                node=one.node,
            )
            for one in findings
        )
    )


def findings(message: m.Findings) -> tuple[Finding, ...]:
    return tuple(Finding(**msgspec.structs.asdict(one)) for one in message.findings)
