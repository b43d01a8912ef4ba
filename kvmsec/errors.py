"""What the application itself refuses; each error keeps the evidence that a caller may act on."""

from collections.abc import Mapping, Sequence
from pathlib import Path

from hypervisor.foreign_text import escaped
from kvmsec.linux.errors import Fault


class KvmsecError(Fault):
    """The root of what `kvmsec` raises, except for what its four packages raise themselves."""


def _listed(problems: Sequence[str]) -> str:
    """What follows a colon: one problem stays on the line, several get a line each."""
    if len(problems) == 1:
        return f" {problems[0]}"
    return "".join(f"\n  - {problem}" for problem in problems)


# What people write ---------------------------------------------------------------------------


class BadName(KvmsecError):
    """A name that no instance, cluster or node may have."""

    def __init__(self, what: str, name: str, rule: str) -> None:
        shown = name if len(name) <= 80 else name[:77] + "..."
        super().__init__(f"{shown!a} is not a name for {what}", hint=rule)
        self.name = name


class BadConfig(KvmsecError):
    """kvmsec.toml can't be used; `problems` holds every fault that was found in it."""

    def __init__(self, path: Path, problems: Sequence[str], *, hint: str | None = None) -> None:
        super().__init__(
            f"{path}:{_listed(problems)}",
            hint=hint or "mend the file, then run `kvmsec config check`",
        )
        self.path = path
        self.problems = tuple(problems)


class BadDefinition(KvmsecError):
    """An instance's definition can't be used; `problems` holds every fault that was found."""

    def __init__(self, source: str, problems: Sequence[str], *, hint: str | None = None) -> None:
        super().__init__(f"{source}:{_listed(problems)}", hint=hint)
        self.source = source
        self.problems = tuple(problems)


class SecurityRefused(KvmsecError):
    """A security model that this cluster, this node or this instance may not have."""


# The cluster's state -------------------------------------------------------------------------


class StoreError(KvmsecError):
    """The root of what a store raises."""


class StoreUnreadable(StoreError):
    """What the store holds can't be read; it is left as it is."""

    def __init__(self, place: Path | str, reason: str) -> None:
        super().__init__(
            f"{place} can't be used: {reason}",
            hint="it was left untouched; restore it from a copy, or, where there is none, move it "
            "away and run `kvmsec cluster init` again",
        )
        self.place = place
        self.reason = reason


class StoreTooNew(StoreError):
    """A later kvmsec wrote the store."""

    def __init__(self, place: Path | str, found: int, known: int) -> None:
        super().__init__(
            f"{place} has format {found}, this kvmsec reads up to {known}",
            hint="it was left untouched; install the kvmsec release that wrote it, or a later one",
        )
        self.place = place
        self.found = found
        self.known = known


class StoreNotWritten(StoreError):
    """The store could not be changed; what it held before stands."""

    def __init__(self, place: Path | str, reason: str) -> None:
        super().__init__(
            f"{place} can't be written: {reason}",
            hint="the old state stands; make room or mend the file system, then run it again",
        )
        self.place = place
        self.reason = reason


class Conflict(StoreError):
    """Somebody else changed the cluster's state first; nothing was written."""

    def __init__(self, expected: int, found: int) -> None:
        super().__init__(
            f"the cluster's state changed meanwhile (revision {found}, not {expected})",
            hint="run the command again",
        )
        self.expected = expected
        self.found = found


class NotMaster(StoreError):
    """The state is changed on the master alone; `master` is its name."""

    def __init__(self, master: str) -> None:
        super().__init__(
            f"this node is not the cluster's master: {master} is",
            hint=f"run the command on {master}; if it is gone for good, run `kvmsec cluster "
            "master-failover` on another candidate",
        )
        self.master = master


class CopyRefused(StoreError):
    """A copy of the cluster's state that a node does not take; its own stands."""

    def __init__(self, reason: str, *, hint: str | None = None) -> None:
        super().__init__(f"this copy of the cluster's state is refused: {reason}", hint=hint)
        self.reason = reason


class StaleCopy(KvmsecError):
    """A node's copy of the state is too old to act on; `found` is its revision."""

    def __init__(self, problem: str, *, found: int, wanted: int) -> None:
        super().__init__(problem, hint="run `kvmsec cluster sync` on the master")
        self.found = found
        self.wanted = wanted


class NoCluster(KvmsecError):
    """There is no cluster yet."""

    def __init__(self) -> None:
        super().__init__(
            "this node belongs to no cluster",
            hint="make one by `kvmsec cluster init --name NAME`, or join one: `kvmsec node join`",
        )


class ClusterExists(KvmsecError):
    """`init` where there is a cluster already."""

    def __init__(self, name: str) -> None:
        super().__init__(
            f"this node already belongs to the cluster {name}",
            hint="change it with `kvmsec cluster modify`, or end it with `kvmsec cluster destroy`",
        )
        self.name = name


class PoolRefused(KvmsecError):
    """A uid pool that can't be the cluster's; `problems` names every uid range and its fault.

    `by_node` has the problems of each node that has some, in a cluster of several.
    """

    def __init__(
        self,
        problems: Sequence[str],
        *,
        hint: str | None = None,
        by_node: Mapping[str, Sequence[str]] | None = None,
    ) -> None:
        super().__init__(f"the uid pool is refused:{_listed(problems)}", hint=hint)
        self.problems = tuple(problems)
        self.by_node = dict(by_node or {})


class UidsInUse(KvmsecError):
    """Uids that still have a holder can't be let go; `holders` maps each to who holds it."""

    def __init__(self, what: str, holders: Mapping[int, str], *, hint: str) -> None:
        listed = _listed([f"uid {uid}: {holder}" for uid, holder in sorted(holders.items())])
        super().__init__(f"{what}:{listed}", hint=hint)
        self.holders = dict(holders)


class InstancesRun(KvmsecError):
    """Something that only a node without running instances may do."""

    def __init__(self, names: Sequence[str]) -> None:
        super().__init__(
            f"instances are running: {', '.join(names)}",
            hint="stop them first with `kvmsec instance stop NAME`",
        )
        self.names = tuple(names)


class UnknownMember(KvmsecError):
    """A name that no member of the cluster has."""

    def __init__(self, name: str) -> None:
        super().__init__(
            f"the cluster has no node {name}", hint="`kvmsec node list` shows those there are"
        )
        self.name = name


class MemberRefused(KvmsecError):
    """Something that may not be done with this member, or not now."""


class NodeSilent(KvmsecError):
    """A node that has to answer did not; `reason` says what came instead."""

    def __init__(self, name: str, reason: str, *, hint: str) -> None:
        super().__init__(f"{name} does not answer: {reason}", hint=hint)
        self.name = name
        self.reason = reason


class MembersLeft(KvmsecError):
    """A cluster can't end while it has other members than its master; `names` are theirs."""

    def __init__(self, names: Sequence[str]) -> None:
        super().__init__(
            f"the cluster has other members: {', '.join(names)}",
            hint="let them leave first with `kvmsec node remove NAME`",
        )
        self.names = tuple(names)


class ChangeRefused(KvmsecError):
    """A change of the cluster that contradicts itself or would leave it without a safe default."""


# Instances -----------------------------------------------------------------------------------


class NotRoot(KvmsecError):
    """What was asked for needs root."""

    def __init__(self, what: str) -> None:
        super().__init__(f"{what} needs root", hint="run it as root, or with sudo")


class UnknownInstance(KvmsecError):
    """No instance has this name: it neither runs nor has a definition."""

    def __init__(self, name: str) -> None:
        super().__init__(
            f"there is no instance {name}", hint="`kvmsec instance list` shows those there are"
        )
        self.name = name


class NotRunning(KvmsecError):
    """Something that only a running instance can be asked for."""

    def __init__(self, name: str, state: str) -> None:
        super().__init__(
            f"the instance {name} does not run: it is {state}",
            hint=f"start it first with `kvmsec instance start {name}`",
        )
        self.name = name
        self.state = state


class AlreadyRunning(KvmsecError):
    """A start of an instance that runs already."""

    def __init__(self, name: str) -> None:
        super().__init__(
            f"the instance {name} runs already",
            hint="stop it first to start it with other settings",
        )
        self.name = name


class NotReady(KvmsecError):
    """QEMU was not ready in time."""

    def __init__(self, what: str, timeout_s: float) -> None:
        super().__init__(
            f"{what} within {timeout_s:g} s",
            hint="give it longer with qemu.ready_timeout_s in kvmsec.toml, if the host is slow",
        )


class StartFailed(KvmsecError):
    """An instance did not start; everything that had been set up for it was taken back.

    `output` is what QEMU said, as it said it; the message has it escaped.
    """

    def __init__(
        self, name: str, reason: str, *, output: str = "", hint: str | None = None
    ) -> None:
        lines = [escaped(line, limit_chars=1000) for line in output.strip().splitlines()]
        said = "\n".join(["; QEMU said:", *lines]) if lines else ""
        super().__init__(f"the instance {name} did not start: {reason}{said}", hint=hint)
        self.name = name
        self.reason = reason
        self.output = output
