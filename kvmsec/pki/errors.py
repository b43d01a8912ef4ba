"""What `kvmsec.pki` refuses; no error's text holds a key or a secret."""

from collections.abc import Sequence
from enum import StrEnum
from pathlib import Path
from typing import Final

from hypervisor.foreign_text import escaped
from kvmsec.errors import KvmsecError

CANDIDATES_FILE: Final = "ssconf_master_candidates_certs"
CANDIDATES_ALSO: Final = "ssconf_master_candidate_certs"
"""What the documents that the name is from call the file as well."""

LIST_MENDED: Final = (
    f"put another node's {CANDIDATES_FILE} in its place (0600, root's), which its daemon takes up "
    "by itself, or restart its daemon, which writes it anew from its copy of the state"
)
"""How a list that can't be used is mended: not by the master, whom that node does not let in."""

_SHOWN_CHARS: Final = 200
_SHOWN_PROBLEMS: Final = 20


class PkiError(KvmsecError):
    """The root of what `kvmsec.pki` raises."""


class BadPem(PkiError):
    """A text that is not the key, certificate or request that it should be."""

    def __init__(self, what: str, reason: str, *, hint: str | None = None) -> None:
        super().__init__(f"{what} can't be used: {escaped(reason, limit_chars=_SHOWN_CHARS)}")
        self.hint = hint or "make it anew with `kvmsec cluster renew-crypto`"
        self.what = what
        self.reason = reason


class RequestRefused(PkiError):
    """A request for a certificate that the cluster does not sign."""

    def __init__(self, reason: str) -> None:
        super().__init__(
            f"the request for a certificate is refused: {reason}",
            hint="let the node make a new key: `kvmsec cluster renew-crypto --node NAME`",
        )
        self.reason = reason


class KeyFileRefused(PkiError):
    """A key file that is missing, is not whole, or that somebody else could read or change."""

    def __init__(self, path: Path, reason: str, *, hint: str) -> None:
        super().__init__(f"{path} {reason}", hint=hint)
        self.path = path
        self.reason = reason


class BadCandidates(PkiError):
    """The list of master candidates can't be used, so nobody may order; `problems` has each fault.

    The message names the file and what the documents call it as well.
    """

    def __init__(self, source: str, problems: Sequence[str]) -> None:
        shown = [escaped(problem, limit_chars=_SHOWN_CHARS) for problem in problems]
        if len(shown) > _SHOWN_PROBLEMS:
            shown[_SHOWN_PROBLEMS:] = [f"and {len(shown) - _SHOWN_PROBLEMS} more"]
        listed = f" {shown[0]}" if len(shown) == 1 else "".join(f"\n  - {one}" for one in shown)
        super().__init__(
            f"{source} (also called {CANDIDATES_ALSO}) lets nobody in:{listed}",
            hint=f"on that node {LIST_MENDED}",
        )
        self.problems = tuple(problems)


class Step(StrEnum):
    """What a peer is judged by, in the order in which it is looked at."""

    NAME = "name"
    CHAIN = "chain"
    VALIDITY = "validity"
    FINGERPRINT = "fingerprint"
    ROLE = "role"


_HINTS: Final = {
    Step.NAME: "`kvmsec node list` shows the cluster's members; `kvmsec node readd NAME` gives one "
    "its certificate again",
    Step.CHAIN: "compare server.pem on both nodes with `kvmsec cluster verify`; `kvmsec node readd "
    "NAME` mends one node",
    Step.VALIDITY: "compare both nodes' clocks; where they agree, run `kvmsec cluster "
    "renew-crypto`",
    Step.FINGERPRINT: f"compare {CANDIDATES_FILE} on both nodes with `kvmsec cluster verify`; "
    "`kvmsec cluster renew-crypto --node NAME` mends one node",
    Step.ROLE: "give the order on a master candidate, or make this node one with "
    "`kvmsec node promote NAME`",
}


class PeerRefused(PkiError):
    """A peer that is not who it should be, or may not do what it asks for; `step` says by what."""

    def __init__(self, step: Step, reason: str) -> None:
        shown = escaped(reason, limit_chars=2 * _SHOWN_CHARS)
        super().__init__(f"the peer is refused by its {step}: {shown}", hint=_HINTS[step])
        self.step = step
        self.reason = reason


class NobodyListed(PeerRefused):
    """Whoever judges has no list of candidates that it can use, so it lets nobody in."""

    def __init__(self) -> None:
        super().__init__(Step.FINGERPRINT, "the list of master candidates is empty or unreadable")
        self.hint = f"on the node that refuses {LIST_MENDED}"


class BadLifetime(PkiError):
    """A certificate or invitation that should last longer, or shorter, than one may."""

    def __init__(self, what: str, rule: str) -> None:
        super().__init__(f"{what} can't last that long or that short", hint=f"it lasts {rule}")


class BadToken(PkiError):
    """A join token that can't be read, is mistyped or is over."""

    def __init__(self, reason: str, *, hint: str | None = None) -> None:
        super().__init__(
            f"the join token {reason}",
            hint=hint or "copy the whole line that `kvmsec node invite` has printed on the master",
        )
        self.reason = reason


class NoInvitation(PkiError):
    """No invitation for this node: it never was, is spent, or is over."""

    def __init__(self, node_name: str, reason: str = "there is none") -> None:
        super().__init__(
            f"no invitation for the node {node_name} can be used: {reason}",
            hint=f"run `kvmsec node invite {node_name}` on the master and carry the token over",
        )
        self.node_name = node_name


class PassphraseTooShort(PkiError):
    """A passphrase that could be guessed."""

    def __init__(self, least: int) -> None:
        super().__init__(
            f"the passphrase has less than {least} characters",
            hint="let kvmsec choose one, or take a longer one",
        )


class SealBroken(PkiError):
    """A sealed document that is damaged, or none."""

    def __init__(self, reason: str, *, hint: str | None = None) -> None:
        super().__init__(
            f"the sealed file can't be opened: {reason}",
            hint=hint or "carry the file over again, as it is, or write a new one",
        )
        self.reason = reason


class WrongPassphrase(PkiError):
    """The passphrase does not open what was sealed."""

    def __init__(self) -> None:
        super().__init__(
            "the passphrase is not the one that the file was sealed with",
            hint="type it as it was shown; without it, write a new file",
        )
