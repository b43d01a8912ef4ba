"""What can go wrong on a monitor; what the other side said is kept as evidence, cut and escaped."""

from typing import Final

from attrs import frozen

from hypervisor.errors import HypervisorError
from hypervisor.foreign_text import escaped

EVIDENCE_LIMIT_CHARS: Final = 500


@frozen
class Evidence:
    """The last that was said on both sides, fit to be shown.

    `sent` holds a command's name and its arguments' names: their values can be secrets.
    """

    sent: str = ""
    received: str = ""


class MonitorError(HypervisorError):
    """The root of what `hypervisor.monitor` raises, with the `evidence` of the exchange."""

    def __init__(self, message: str, evidence: Evidence, *, hint: str | None = None) -> None:
        super().__init__(message, hint=hint)
        self.evidence = evidence


class MonitorUnreachable(MonitorError):
    """There is nothing to connect to at the monitor's path."""


class MonitorTimedOut(MonitorError):
    """QEMU did not do `what` in time; whether it still will is unknown."""

    def __init__(
        self, what: str, timeout_s: float, evidence: Evidence, *, hint: str | None = None
    ) -> None:
        super().__init__(
            f"QEMU's monitor did not {what} within {timeout_s:g} s", evidence, hint=hint
        )
        self.what = what
        self.timeout_s = timeout_s


class MonitorClosed(MonitorError):
    """The connection ended: QEMU is gone, hung up, or this side closed it."""


class MonitorGarbled(MonitorError):
    """The other side does not speak QMP; the connection was ended."""

    def __init__(self, finding: str, evidence: Evidence) -> None:
        super().__init__(f"QEMU's monitor {finding}", evidence)
        self.finding = finding


class CommandRefused(MonitorError):
    """QEMU answered a command with an error; `error_class` and `description` are its own words."""

    def __init__(
        self, command: str, error_class: str, description: str, evidence: Evidence
    ) -> None:
        words = escaped(description, limit_chars=EVIDENCE_LIMIT_CHARS)
        super().__init__(f"QEMU refused {command}: {words}", evidence)
        self.command = command
        self.error_class = error_class
        self.description = description


class CommandForbidden(MonitorError):
    """A command that is never sent, since it would make QEMU start a program."""

    def __init__(self, command: str, reason: str) -> None:
        super().__init__(
            f"{command} is never sent: {reason}",
            Evidence(),
            hint="migrate over a socket (unix:PATH)",
        )
        self.command = command
