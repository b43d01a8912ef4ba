"""The join tokens that are not spent yet: `invitations.json`, on the master."""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Final

import attrs

from kvmsec.linux.locks import FileLock
from kvmsec.pki.errors import KeyFileRefused, NoInvitation
from kvmsec.pki.joining import Invitation
from kvmsec.pki.private_files import read_private, write_private

_FORMAT: Final = 1
_HINT: Final = "remove it, and invite the nodes again with `kvmsec node invite NAME`"
_LOCK_TIMEOUT_S: Final = 10.0


class Invitations:
    """The store in the file `path` (`Paths.invitations`); each change is made under a lock.

    Raises KeyFileRefused for a file that can't be used, and LockBusy.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._lock = path.with_suffix(".lock")

    def add(self, invitation: Invitation, now: datetime) -> None:
        """Keep an invitation, in place of an earlier one for the same node."""
        with self._changing(now) as kept:
            kept[invitation.node_name] = invitation

    def find(self, node_name: str, now: datetime) -> Invitation:
        """The invitation of a node. Raises NoInvitation: it never was, is spent, or is over."""
        return _of(self._load(), node_name, now)

    def spend(self, invitation: Invitation, now: datetime) -> None:
        """Use an invitation up. Of two rivals one gets it; the other gets NoInvitation."""
        with self._changing(now) as kept:
            if _of(kept, invitation.node_name, now) != invitation:
                raise NoInvitation(invitation.node_name, "a newer one has taken its place")
            del kept[invitation.node_name]

    def current(self, now: datetime) -> tuple[Invitation, ...]:
        """Those that can be used, by name."""
        kept = self._load()
        return tuple(kept[name] for name in sorted(kept) if not kept[name].is_over(now))

    @contextmanager
    def _changing(self, now: datetime) -> Iterator[dict[str, Invitation]]:
        """What is kept and not over, to be changed; written back unless the change raises."""
        lock = FileLock(self._lock)
        lock.acquire(_LOCK_TIMEOUT_S)
        with lock:
            kept = {name: one for name, one in self._load().items() if not one.is_over(now)}
            yield kept
            documents = [_document(kept[name]) for name in sorted(kept)]
            envelope = {"format": _FORMAT, "invitations": documents}
            write_private(self._path, json.dumps(envelope, indent=2) + "\n")

    def _load(self) -> dict[str, Invitation]:
        text = read_private(self._path, hint=_HINT)
        if text is None:
            return {}
        try:
            envelope = json.loads(text)
            if envelope["format"] != _FORMAT:
                raise KeyFileRefused(
                    self._path, "is of another kvmsec", hint="use the release that wrote it"
                )
            found = [_invitation(one) for one in envelope["invitations"]]
        except (ValueError, KeyError, TypeError, OverflowError, RecursionError):
            raise KeyFileRefused(self._path, "is not whole", hint=_HINT) from None
        return {one.node_name: one for one in found}


def _of(kept: dict[str, Invitation], node_name: str, now: datetime) -> Invitation:
    invitation = kept.get(node_name)
    if invitation is None:
        raise NoInvitation(node_name)
    if invitation.is_over(now):
        raise NoInvitation(node_name, f"it was over at {invitation.expires_at.isoformat()}")
    return invitation


def _document(invitation: Invitation) -> dict[str, Any]:
    return attrs.asdict(invitation) | {
        "secret": invitation.secret.hex(),
        "expires_at": invitation.expires_at.isoformat(),
    }


def _invitation(document: dict[str, Any]) -> Invitation:
    expires_at = datetime.fromisoformat(document["expires_at"])
    return Invitation(
        secret=bytes.fromhex(document["secret"]),
        anchor_fingerprint=str(document["anchor_fingerprint"]),
        node_name=str(document["node_name"]),
        expires_at=expires_at.astimezone(UTC),
    )
