"""Whom this node trusts, from its own files, each time that it is asked.

The list of candidates says who may order, and the cluster's state who is a member and whose list
entry still counts: a node that the state has demoted is out, whichever of the two files was
written first. An unreadable file lets nobody in.

Nothing here parses a certificate, but where the last resort is in use: the root part leaves that to
the front.
"""

import os
from collections.abc import Callable, Mapping
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Final
from uuid import UUID

from kvmsec.daemon.front_messages import TrustMessage
from kvmsec.errors import StoreError
from kvmsec.paths import Paths
from kvmsec.pki.candidates import parse_candidates
from kvmsec.pki.errors import CANDIDATES_FILE, BadCandidates, KeyFileRefused
from kvmsec.pki.private_files import read_private
from kvmsec.pki.standing import Trust
from kvmsec.store import Store

if TYPE_CHECKING:
    from kvmsec.pki.pems import Pair

_HINT: Final = "run `kvmsec node readd NAME` on the master, which hands it out again"
_FILES: Final = ("client.pem", "server.pem", CANDIDATES_FILE, "certless.pem")

Signature = tuple[tuple[int, int, int] | None, ...]


class TrustSource:
    """Reads who may order from the files below `paths.var`, and the state from `store`."""

    def __init__(
        self,
        paths: Paths,
        store: Store,
        now: Callable[[], datetime] = lambda: datetime.now(UTC),
        *,
        joining: Callable[[], TrustMessage | None] = lambda: None,
    ) -> None:
        """`joining` gives what is served with before this node is a member."""
        self._paths = paths
        self._store = store
        self._now = now
        self._joining = joining

    def is_member(self) -> bool:
        """Whether this node has a certificate of its own, or the common one."""
        return any((self._paths.key_files / name).exists() for name in ("client.pem", _FILES[3]))

    def signature(self) -> Signature:
        """What changes with any file that trust comes from; and, while it is there, in time."""
        directory = self._paths.key_files
        paths = [*(directory / name for name in _FILES), self._paths.cluster]
        seen = tuple(map(_signature_of, map(str, (*paths, self._paths.invitations))))
        if seen[3] is None and seen[5] is None:
            return seen
        # The last resort and a token end by themselves: looked at anew each minute.
        return (*seen, (int(self._now().timestamp()) // 60, 0, 0))

    def standing(self) -> Trust | None:
        """What names and fingerprints are held against; None before this node is a member.

        Without anchors: those are for whoever sees certificates. Raises BadCandidates,
        KeyFileRefused, StoreUnreadable and whatever else keeps a file from being read.
        """
        if not self.is_member():
            return None
        common = self._common()
        if common is None:
            return Trust(anchors=(), members=self._members(), candidates=self._candidates())
        from kvmsec.pki.certificates import fingerprint_of

        # The last resort must work where the list or the state is what is broken.
        return Trust(
            anchors=(),
            members=self._members_or_nobody(),
            candidates=self._candidates_or_nobody(),
            certless=fingerprint_of(common.certificate_pem),
        )

    def message(self) -> TrustMessage | None:
        """All that the front needs; None before this node may join. Raises what `standing` does.

        Without a readable list it says that nobody may order: the front then refuses by name.
        """
        if not self.is_member():
            return self._joining()
        common = self._common()
        if common is not None:
            return self._message_beside(common)
        return TrustMessage(
            pair=self._required(_FILES[0]),
            anchors=self._required(_FILES[1]),
            members=dict(self._members()),
            candidates=_sorted(self._candidates_or_nobody()),
            certificates=self._certificates(),
        )

    def _message_beside(self, common: "Pair") -> TrustMessage:
        """Own pair first, as far as there is one: see `kvmsec.cluster.certless.pair_to_serve`."""
        from kvmsec.pki.certificates import fingerprint_of
        from kvmsec.pki.files import KeyFiles

        own, anchors = KeyFiles(self._paths.key_files).beside_certless()
        return TrustMessage(
            pair=(own or common).pem,
            anchors=anchors + common.certificate_pem,
            members=dict(self._members_or_nobody()),
            candidates=_sorted(self._candidates_or_nobody()),
            certificates=self._certificates_or_none(),
            certless=fingerprint_of(common.certificate_pem),
            common=common.pem,
        )

    def _members(self) -> Mapping[UUID, str]:
        cluster, _ = self._store.load()
        return {} if cluster is None else {node.uuid: node.name for node in cluster.nodes}

    def _members_or_nobody(self) -> Mapping[UUID, str]:
        try:
            return self._members()
        except StoreError:
            return {}

    def _certificates(self) -> dict[UUID, tuple[str, ...]]:
        """As the state has them: a copy of the cluster's key makes nobody another member."""
        cluster, _ = self._store.load()
        known = () if cluster is None else cluster.nodes
        return {node.uuid: node.certificates for node in known}

    def _certificates_or_none(self) -> dict[UUID, tuple[str, ...]]:
        try:
            return self._certificates()
        except StoreError:
            return {}

    def _candidates(self) -> Mapping[UUID, frozenset[str]]:
        path = self._paths.key_files / CANDIDATES_FILE
        try:
            text = read_private(path, hint=_HINT)
        except KeyFileRefused as error:
            raise BadCandidates(str(path), [error.reason]) from error
        if text is None:
            raise BadCandidates(str(path), ["it is missing"])
        listed = parse_candidates(text, str(path))
        cluster, _ = self._store.load()
        known = {} if cluster is None else cluster.orderers
        return {uuid: ours for uuid, ours in listed.items() if uuid in known}

    def _candidates_or_nobody(self) -> Mapping[UUID, frozenset[str]]:
        try:
            return self._candidates()
        except (BadCandidates, StoreError):
            return {}

    def _common(self) -> "Pair | None":
        """The common pair while it is valid. One that can't be used counts as none."""
        if not (self._paths.key_files / _FILES[3]).exists():
            return None
        from kvmsec.pki.files import KeyFiles  # cryptography, of which the root part has no need

        return KeyFiles(self._paths.key_files).usable_certless(self._now())

    def _required(self, name: str) -> str:
        path = self._paths.key_files / name
        text = read_private(path, hint=_HINT)
        if text is None:
            raise KeyFileRefused(path, "is missing", hint=_HINT)
        return text


def _sorted(candidates: Mapping[UUID, frozenset[str]]) -> dict[UUID, tuple[str, ...]]:
    return {uuid: tuple(sorted(known)) for uuid, known in candidates.items()}


def _signature_of(path: str) -> tuple[int, int, int] | None:
    try:
        found = os.lstat(path)
    except OSError:
        return None
    return found.st_ino, found.st_mtime_ns, found.st_ctime_ns
