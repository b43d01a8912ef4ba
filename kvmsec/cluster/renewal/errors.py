"""What a renewal refuses, and what it stops at."""

from collections.abc import Sequence
from pathlib import Path

from kvmsec.errors import KvmsecError


class BadJournal(KvmsecError):
    """The journal can't be read; it is left as it is."""

    def __init__(self, path: Path, reason: str) -> None:
        super().__init__(
            f"{path} can't be used: {reason}",
            hint="restore it from a copy; without one, move it away, and end the renewal with "
            "`kvmsec cluster renew-crypto`: nodes that it does not reach need `kvmsec node readd`",
        )
        self.path = path


class RenewalPending(KvmsecError):
    """Another renewal has begun and is not at its end."""

    def __init__(self, behind: Sequence[str]) -> None:
        waits = f"; it waits for {', '.join(behind)}" if behind else ""
        super().__init__(
            f"a renewal is under way{waits}",
            hint="go on with it by `kvmsec cluster renew-crypto`, end it without the nodes that "
            "don't answer with --forget-offline, or take it back with --abort",
        )
        self.behind = tuple(behind)


class NothingToAbort(KvmsecError):
    """There is no renewal to be taken back."""

    def __init__(self) -> None:
        super().__init__("no renewal is under way", hint="there is nothing to take back or forget")


class NoWayBack(KvmsecError):
    """Nodes may have forgotten the old certificates already."""

    def __init__(self) -> None:
        super().__init__(
            "the renewal can't be taken back: nodes have dropped the old certificates already",
            hint="go on with it by `kvmsec cluster renew-crypto`",
        )


class RenewalStopped(KvmsecError):
    """A node refused a step. Old and new are both trusted, and nothing is cut off."""

    def __init__(self, problems: Sequence[str]) -> None:
        listed = "".join(f"\n  - {problem}" for problem in problems)
        super().__init__(
            f"the renewal stopped; the old certificates are still trusted:{listed}",
            hint="mend the node and run `kvmsec cluster renew-crypto` again, or take the renewal "
            "back with --abort",
        )
        self.problems = tuple(problems)


class TooFewAnswer(KvmsecError):
    """So many nodes are away that the old certificates are kept until more of them are back."""

    def __init__(self, behind: Sequence[str]) -> None:
        super().__init__(
            "the old certificates are kept, since too few nodes answered; these did not: "
            + ", ".join(behind),
            hint="bring them back and run `kvmsec cluster renew-crypto` again; --forget-offline "
            "ends the renewal without them, --abort takes it back",
        )
        self.behind = tuple(behind)


class UnknownMember(KvmsecError):
    """A name that no member has."""

    def __init__(self, name: str) -> None:
        super().__init__(
            f"the cluster has no node {name}", hint="`kvmsec node list` shows those there are"
        )
        self.name = name


class ShowsAnother(KvmsecError):
    """A node that was given a new certificate, and does not serve with it."""

    def __init__(self, node: str, wanted: str) -> None:
        super().__init__(
            f"{node} does not show its new certificate ({wanted})",
            hint=f"restart the daemon of {node}, and run `kvmsec cluster renew-crypto` again",
        )
        self.node = node
