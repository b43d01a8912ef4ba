"""What goes wrong with packet rules: one root, and a child for each thing to act on."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

from kvmsec.linux.errors import Fault

if TYPE_CHECKING:
    from firewall.canary import Report


class FirewallError(Fault):
    """The root of everything that this package raises on purpose."""


class PolicyError(FirewallError):
    """A policy or a log setting that no rule set can be made of; `problems` has all of them."""

    def __init__(self, problems: Sequence[str], *, hint: str | None = None) -> None:
        super().__init__("; ".join(problems), hint=hint)
        self.problems = tuple(problems)


class BackendUnavailable(FirewallError):
    """This host can't serve a backend; `reason` is why."""

    def __init__(self, backend: str, reason: str, *, hint: str) -> None:
        super().__init__(f"the {backend} backend is not available: {reason}", hint=hint)
        self.backend = backend
        self.reason = reason


class RulesRefused(FirewallError):
    """The kernel or its tool refused a change of the rules; what was there before still is.

    `detail` holds the tool's own words.
    """

    def __init__(self, backend: str, action: str, detail: str, *, hint: str) -> None:
        super().__init__(f"{backend} could not {action}: {detail}", hint=hint)
        self.backend = backend
        self.detail = detail


class RulesUnreadable(FirewallError):
    """What the kernel holds could not be read back or understood."""

    def __init__(self, backend: str, detail: str, *, hint: str) -> None:
        super().__init__(f"the rules of {backend} could not be read: {detail}", hint=hint)
        self.backend = backend
        self.detail = detail


class NotProved(FirewallError):
    """Nothing shows that a uid can't send: no instance may start under it.

    `report` is the last canary's, or None where it could not run.
    """

    def __init__(self, uid: int, reason: str, *, report: "Report | None", hint: str) -> None:
        super().__init__(f"uid {uid} is not proved to be cut off the network: {reason}", hint=hint)
        self.uid = uid
        self.report = report
