"""One packet filter among those that a host may have, and which of them serves this one."""

from typing import Final, Literal, Protocol

from attrs import frozen

from firewall.errors import BackendUnavailable
from firewall.policy import FAMILIES, Family, Policy, UidPairs

BackendName = Literal["nftables", "iptables"]
Setting = Literal["auto", "nftables", "iptables"]
BACKENDS: Final[tuple[BackendName, ...]] = ("nftables", "iptables")


@frozen
class Finding:
    """One way in which what the kernel holds differs from the policy.

    `code` is stable and lower case with dashes; `families` are those that it leaves open.
    """

    code: str
    message: str
    hint: str
    families: tuple[Family, ...] = FAMILIES


@frozen
class Dropped:
    """Packets that the rules of one tag have dropped since they were first applied."""

    ipv4: int = 0
    ipv6: int = 0

    def of(self, family: Family) -> int:
        return self.ipv4 if family == "ipv4" else self.ipv6

    @property
    def total(self) -> int:
        return self.ipv4 + self.ipv6

    def __add__(self, other: "Dropped") -> "Dropped":
        return Dropped(self.ipv4 + other.ipv4, self.ipv6 + other.ipv6)


@frozen
class Installed:
    """What the kernel holds under a tag: the uids that it refuses, its counters, its rules.

    `families` are those in which the rules are in force; `rules` are in the tool's own words.
    """

    families: tuple[Family, ...]
    uids: UidPairs
    dropped: Dropped
    rules: tuple[str, ...]


class Backend(Protocol):
    """A packet filter that holds one rule set, under its own tag, in the caller's namespace.

    Everything is synchronous and looks at the network namespace of the calling thread. Reading
    and changing raise RulesUnreadable and RulesRefused.
    """

    @property
    def name(self) -> BackendName: ...

    @property
    def tag(self) -> str: ...

    def require_available(self) -> None:
        """Return if this host can serve the backend; BackendUnavailable says why not."""

    def apply(self, policy: Policy) -> bool:
        """Make the rules hold the policy; False when they already did and nothing was done."""

    def remove(self) -> bool:
        """Delete what belongs to the tag; False when there was nothing."""

    def read(self) -> Installed | None:
        """What the kernel holds under the tag, None when nothing."""

    def compare(self, policy: Policy) -> tuple[Finding, ...]:
        """Every difference between the kernel's rules and the policy; empty when they are right."""

    def dropped(self, *, of_all_tags: bool = False) -> Dropped:
        """The drop counters of this tag, or of every rule set of kvmsec in this namespace."""


def make_backend(name: BackendName, tag: str) -> Backend:
    """The backend of that name; loads neither libnftables nor python-iptables yet."""
    if name == "nftables":
        from firewall.nftables.tables import NftablesBackend

        return NftablesBackend(tag)
    from firewall.iptables.chains import IptablesBackend

    return IptablesBackend(tag)


def open_backend(setting: Setting, tag: str) -> Backend:
    """The backend that the setting asks for, known to work here; raises BackendUnavailable.

    `auto` takes nftables when the kernel accepts a trial transaction, else iptables.
    """
    if setting != "auto":
        backend = make_backend(setting, tag)
        backend.require_available()
        return backend
    refusals = []
    for name in BACKENDS:
        backend = make_backend(name, tag)
        try:
            backend.require_available()
        except BackendUnavailable as error:
            refusals.append(error)
            continue
        return backend
    reasons = "; ".join(f"{refusal.backend}: {refusal.reason}" for refusal in refusals)
    raise BackendUnavailable("packet filter", reasons, hint=refusals[0].hint or "")
