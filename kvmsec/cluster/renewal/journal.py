"""What is known of a renewal that has begun: one file on the master, 0600, for it holds keys."""

import os
from datetime import datetime
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Final
from uuid import UUID

import msgspec

from kvmsec.cluster.renewal.errors import BadJournal
from kvmsec.linux.files import remove_file
from kvmsec.pki.keys import KeyKind
from kvmsec.pki.pems import Pair, split_pems
from kvmsec.pki.private_files import read_private, write_private

FORMAT: Final = 1
LIMIT_BYTES: Final = 16 << 20
_HINT: Final = "end the renewal with `kvmsec cluster renew-crypto` once the file is root's alone"

Time = Annotated[datetime, msgspec.Meta(tz=True)]


class Direction(StrEnum):
    """Where a renewal goes. It turns from `forward` once, to one of the others."""

    FORWARD = "forward"
    """Old and new are trusted; there is a way back."""
    DROPPING = "dropping"
    """Nodes may have forgotten the old: only forward."""
    BACK = "back"


class Step(StrEnum):
    """What a node is known to have done last; it may have done the next one as well."""

    UNTOUCHED = "untouched"
    PREPARED = "prepared"
    """It trusts old and new, and its new certificate is signed."""
    LISTED = "listed"
    """Its list of candidates has old and new."""
    COMMITTED = "committed"
    """It serves and calls with the new."""
    PROVED = "proved"
    """It answered on the new, to somebody who trusts the new alone."""
    FINISHED = "finished"
    """It trusts the new alone, and so does its list."""
    RETURNED = "returned"
    """It is as it was before the renewal."""

    @property
    def number(self) -> int:
        return _ORDER.index(self)


_ORDER: Final = tuple(Step)


class Progress(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """How far one member is.

    `renews` is false for one that keeps its certificate and only needs the new list. `old` and
    `new` are fingerprints, `certificate` is the new one (PEM) once it was signed; `problem` says
    why the last attempt did not reach the node.
    """

    uuid: UUID
    name: str
    renews: bool
    step: Step = Step.UNTOUCHED
    old: str | None = None
    new: str | None = None
    certificate: str | None = None
    problem: str | None = None


class Renewal(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A renewal that has begun.

    `signing_*` is the cluster's pair that signs, which is trusted alone in the end; `old_anchors`
    is what was trusted before, `old_client_*` what the master called with. All are PEM. What ends
    another's renewal has no way back (`can_return`): what its nodes would go back to is that one.
    """

    format: int = FORMAT
    cluster: UUID
    master: UUID
    started_at: Time
    direction: Direction = Direction.FORWARD
    can_return: bool = True
    key_kind: KeyKind
    signing_certificate: str
    signing_key: str
    old_anchors: str
    old_client_certificate: str
    old_client_key: str
    members: tuple[Progress, ...]

    def __repr__(self) -> str:
        """Without a key."""
        return f"<Renewal {self.direction} of {len(self.members)} members>"

    @property
    def signing_pair(self) -> Pair:
        return Pair(self.signing_certificate, self.signing_key)

    @property
    def old_client(self) -> Pair:
        return Pair(self.old_client_certificate, self.old_client_key)

    @property
    def both_anchors(self) -> str:
        """The anchors that are trusted while old and new are, the old first."""
        return joined(self.old_anchors, self.signing_certificate)

    @property
    def has_new_anchor(self) -> bool:
        return self.both_anchors != joined(self.signing_certificate)

    def member(self, uuid: UUID) -> Progress | None:
        return next((one for one in self.members if one.uuid == uuid), None)

    def having(self, *changed: Progress) -> "Renewal":
        """With these in place of the members of the same uuid."""
        by_uuid = {one.uuid: one for one in changed}
        members = tuple(by_uuid.get(one.uuid, one) for one in self.members)
        return msgspec.structs.replace(self, members=members)


def joined(*texts: str) -> str:
    """The PEM blocks of several texts, each once, in order. Raises BadPem."""
    return "".join(dict.fromkeys(block for text in texts for block in split_pems(text)))


class Journal:
    """The file of a renewal. Writing it is what makes a step known."""

    def __init__(self, path: Path) -> None:
        self.path = path

    @property
    def lock_path(self) -> Path:
        """Whoever renews holds a lock on this."""
        return self.path.with_suffix(".lock")

    def is_there(self) -> bool:
        """Whether there is one; costs one system call."""
        return os.path.lexists(self.path)

    def load(self) -> Renewal | None:
        """The renewal that has begun, if any. Raises BadJournal, KeyFileRefused, NotRoot."""
        text = read_private(self.path, hint=_HINT, limit_bytes=LIMIT_BYTES)
        if text is None:
            return None
        try:
            found = msgspec.json.decode(text, type=Renewal)
        except ValueError:
            # What stands in it may be a key: its reader's words are not shown.
            raise BadJournal(self.path, "it is not a whole journal") from None
        if found.format != FORMAT:
            raise BadJournal(self.path, f"it has format {found.format}, not {FORMAT}")
        return found

    def save(self, renewal: Renewal) -> None:
        """Raises KeyFileRefused and NotRoot; the journal before it stands then."""
        write_private(self.path, msgspec.json.encode(renewal).decode() + "\n")

    def remove(self) -> None:
        remove_file(self.path)
