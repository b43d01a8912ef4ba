"""All that anyone may ask of a node, and the values in which it answers.

The command line, a daemon and a cluster see nodes through `Agent` alone; `kvmsec.node.local` is
the one of this host.
"""

from collections.abc import AsyncIterator, Mapping
from datetime import datetime
from enum import StrEnum
from typing import Any, Literal, Protocol

from attrs import field, frozen

from kvmsec.model.instance import InstanceDefinition


class InstanceState(StrEnum):
    """Where an instance is in its life; `unknown` is one whose record can't be read."""

    STARTING = "starting"
    RUNNING = "running"
    STOPPING = "stopping"
    STOPPED = "stopped"
    CRASHED = "crashed"
    UNKNOWN = "unknown"


@frozen(kw_only=True)
class InstanceInfo:
    """What is known of an instance; sizes in MiB or bytes, times in seconds or aware datetimes.

    `pid`, `started_at`, `resident_bytes` and `cpu_s` are None while no process lives. `uid`, `user`
    and what else its start decided stay known until everything is taken back, so for a crashed one
    that nobody has cleaned up, too; None after that. `details` holds what `info` says more than
    `list`.
    """

    name: str
    state: InstanceState
    reason: str | None = None
    pid: int | None = None
    uid: int | None = None
    user: str | None = None
    security_model: str | None = None
    accelerator: str | None = None
    memory_mib: int | None = None
    vcpus: int | None = None
    started_at: datetime | None = None
    resident_bytes: int | None = None
    cpu_s: float | None = None
    autostart: bool = False
    details: Mapping[str, Any] = field(factory=dict)


@frozen
class Event:
    """Something that happened to an instance of this node: its new state, and why."""

    at: datetime
    instance: str
    state: InstanceState
    reason: str | None = None


@frozen
class InstanceLog:
    """What was said: `kvmsec`'s own lines, and `qemu`'s words and the `serial` line.

    The instance could have rewritten the last two.
    """

    kvmsec: str
    qemu: str
    serial: str


@frozen
class UidState:
    """One uid of this node; `instance` is its holder, `reason` why it is kept back.

    `root` is the root of files that the instance was started from: uids are the host's, so it may
    be another than this node's. None where no instance held it.
    """

    uid: int
    user: str | None
    state: Literal["free", "leased", "resting", "draining", "quarantined"]
    instance: str | None = None
    reason: str | None = None
    root: str | None = None


@frozen
class Finding:
    """The answer to one check, with its fix where it found something."""

    code: str
    severity: Literal["ok", "warning", "error"]
    item: str
    message: str
    hint: str | None = None
    node: str | None = None


class Agent(Protocol):
    """A node. Every call raises a `kvmsec.linux.errors.Fault` that says what to do."""

    async def start(self, definition: InstanceDefinition) -> InstanceInfo:
        """Start an instance; returns once its guest runs, or everything is taken back."""
        ...

    async def stop(
        self, name: str, *, timeout_s: float = 60.0, force: bool = False
    ) -> InstanceInfo:
        """End an instance: ACPI powerdown, SIGKILL after `timeout_s`.

        Its uid is clean and released then, or quarantined, which `uid_states` tells.
        """
        ...

    async def reboot(self, name: str) -> None:
        """Reset the guest; process and uid stay the same."""
        ...

    async def list(self) -> tuple[InstanceInfo, ...]:
        """Every instance that runs, ended unasked, or has a definition; changes nothing."""
        ...

    async def info(self, name: str) -> InstanceInfo:
        """One instance, with `details`. Raises UnknownInstance."""
        ...

    def events(self) -> AsyncIterator[Event]:
        """What happens from now on to the instances of this node."""
        ...

    async def log(self, name: str) -> InstanceLog:
        """What kvmsec and the instance itself have said; changes nothing."""
        ...

    async def uid_states(self, *, with_free: bool = False) -> tuple[UidState, ...]:
        """The uids of the pool and those that instances of this root hold; changes nothing."""
        ...

    async def release_uid(self, uid: int) -> UidState:
        """Clean a quarantined uid and give it back; returns its state, which is `free`.

        Raises UidNotClean, which says what still holds it, and UidHeld while an instance has it.
        """
        ...

    async def apply_rules(self) -> None:
        """Put this root's packet rules in place, whatever is there now."""
        ...

    async def verify_rules(self) -> tuple[Finding, ...]:
        """Hold the packet rules against what they must be, and send a canary."""
        ...

    async def show_rules(self) -> Mapping[str, Any]:
        """The packet rules, their counters and the last refused packets, as JSON has it."""
        ...

    async def remove_rules(self, *, force: bool = False) -> None:
        """Take this root's packet rules away; refused while an instance runs under them."""
        ...

    async def doctor(self) -> tuple[Finding, ...]:
        """Whether this host is ready, check by check."""
        ...

    async def reconcile(self) -> tuple[str, ...]:
        """Put right what killed processes left; says what was done."""
        ...
