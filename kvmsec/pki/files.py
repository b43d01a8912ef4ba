"""The files that a node's trust lies in, and their swap in a renewal that can be killed anywhere.

A renewal on a node is `prepare`, `commit`, then `finish` or `rollback`. Each is idempotent: killed
between any two steps, it is called again and goes on. `client.pem` is replaced whole, in one step,
by a pair that belongs together and that an anchor in `server.pem` has signed.
"""

import contextlib
from collections.abc import Mapping
from datetime import datetime
from pathlib import Path
from typing import Final, Literal
from uuid import UUID

from kvmsec.linux.files import remove_file
from kvmsec.pki.candidates import format_candidates, parse_candidates
from kvmsec.pki.certificates import (
    anchors_of,
    fingerprint_of,
    load_certificate,
    public_key_of,
    request_for,
    require_whole,
)
from kvmsec.pki.chain import anchor_of
from kvmsec.pki.errors import (
    CANDIDATES_FILE,
    BadCandidates,
    BadPem,
    KeyFileRefused,
    PeerRefused,
    PkiError,
)
from kvmsec.pki.keys import KeyKind, dump_key, kind_of, load_key, make_key, public_bytes
from kvmsec.pki.pems import Pair, split_pems
from kvmsec.pki.private_files import read_private, write_private

HandedOut = Literal["server.pem", "server.key", "certless.pem"]

_FROM_MASTER: Final = "run `kvmsec node readd NAME` on the master, which hands it out again"
_OWN: Final = "run `kvmsec cluster renew-crypto --node NAME` or `kvmsec node readd NAME` there"
_JOURNAL: Final = "renewal.json"  # `Paths.renewal`: it holds keys as well.
_NAMES: Final = (
    *("server.pem", "server.key", "client.pem", CANDIDATES_FILE, "certless.pem"),
    *("client.pem.next", "client.pem.previous", "server.pem.previous", _JOURNAL),
)


class KeyFiles:
    """The files in one directory, which is root's alone (`Paths.key_files`).

    Reading raises KeyFileRefused for a file that is missing or that others could reach, and BadPem
    for what is no key or certificate. Writing is for one process at a time.
    """

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self._anchors = directory / "server.pem"
        self._cluster_key = directory / "server.key"
        self._own = directory / "client.pem"
        self._candidates = directory / CANDIDATES_FILE
        self._certless = directory / "certless.pem"
        self._next_key = directory / "client.pem.next"
        self._previous_own = directory / "client.pem.previous"
        self._previous_anchors = directory / "server.pem.previous"
        self._journal = directory / _JOURNAL

    # What is in force --------------------------------------------------------------------------

    def anchors(self) -> str:
        """`server.pem`: the cluster's certificate; both of them during a renewal."""
        text = self._required(self._anchors, _FROM_MASTER)
        anchors_of(text)
        return text

    def anchors_der(self) -> tuple[bytes, ...]:
        return anchors_of(self.anchors())

    def own(self) -> Pair:
        """`client.pem`: this node's certificate and key."""
        return self._pair(self._own, self._required(self._own, _OWN))

    def cluster(self) -> Pair:
        """The cluster's key and the anchor that it belongs to; on candidates only."""
        hint = "run this on a master candidate; `kvmsec node list` shows them"
        key = load_key(self._required(self._cluster_key, hint), "server.key")
        wanted = public_bytes(key.public_key())
        for anchor in split_pems(self.anchors(), "server.pem"):
            if public_bytes(public_key_of(load_certificate(anchor))) == wanted:
                return Pair(anchor, dump_key(key))
        raise BadPem(
            "server.key",
            "it belongs to no certificate in server.pem",
            hint="copy server.key and server.pem from another master candidate, or renew both with "
            "`kvmsec cluster renew-crypto --new-cluster-certificate`",
        )

    def holds_cluster_key(self) -> bool:
        """Whether there is a key of the cluster, whatever its state."""
        return self._cluster_key.is_symlink() or self._cluster_key.exists()

    def candidates(self) -> Mapping[UUID, frozenset[str]]:
        """Who may order. Raises BadCandidates for a list that is missing or can't be used.

        A file that others could reach is such a list as well.
        """
        try:
            text = read_private(self._candidates, hint=_FROM_MASTER)
        except KeyFileRefused as error:
            raise BadCandidates(str(self._candidates), [error.reason]) from error
        if text is None:
            raise BadCandidates(str(self._candidates), ["it is missing"])
        return parse_candidates(text, str(self._candidates))

    def write_candidates(self, candidates: Mapping[UUID, frozenset[str]]) -> None:
        """Replace the list. Raises BadCandidates for one that would let nobody in."""
        write_private(self._candidates, format_candidates(candidates))

    # The last resort ---------------------------------------------------------------------------

    def certless(self, now: datetime) -> Pair | None:
        """The common pair while it is valid; None without one, and after its end."""
        text = read_private(self._certless, hint=_FROM_MASTER)
        if text is None:
            return None
        pair = self._pair(self._certless, text)
        certificate = load_certificate(pair.certificate_pem)
        is_valid = certificate.not_valid_before_utc <= now <= certificate.not_valid_after_utc
        return pair if is_valid else None

    def usable_certless(self, now: datetime) -> Pair | None:
        """The common pair while it is valid; one that can't be read or used counts as none."""
        with contextlib.suppress(PkiError):
            return self.certless(now)
        return None

    def beside_certless(self) -> tuple[Pair | None, str]:
        """This node's own pair and its anchors, as far as they can be used (None, empty).

        The last resort must work where `client.pem` or `server.pem` is what is broken.
        """
        own, anchors = None, ""
        with contextlib.suppress(PkiError):
            own = self.own()
        with contextlib.suppress(PkiError):
            anchors = self.anchors()
        return own, anchors

    # Files that a candidate hands out ------------------------------------------------------------

    def put(self, name: HandedOut, content: str | None) -> None:
        """Put a file in place, or remove it (None). Raises BadPem for what could not be used."""
        match name:
            case "server.pem" if content is not None:
                anchors_of(content)
                write_private(self._anchors, content)
            case "server.key" if content is not None:
                write_private(self._cluster_key, dump_key(load_key(content, "server.key")))
            case "certless.pem" if content is not None:
                self._pair(self._certless, content)
                write_private(self._certless, content)
            case "server.pem" | "server.key" | "certless.pem":
                remove_file(self.directory / name)
            case _:
                raise ValueError(f"{name!a} is no file that is handed out")

    def install(self, anchors: str, own: Pair) -> None:
        """Make a member of this node: what `join.admit` brought, or `init` made.

        The pair last: a node without one belongs to no cluster. Raises BadPem.
        """
        self._remove_unfinished()
        _require_signed(own.certificate_pem, anchors_of(anchors))
        require_whole(own, "client.pem")
        self.forget_renewal()
        write_private(self._anchors, anchors)
        write_private(self._own, own.pem)

    def is_member(self) -> bool:
        """Whether there is a pair of this node's own, whatever its state."""
        return self._own.is_symlink() or self._own.exists()

    def remove_all(self) -> None:
        """Forget the cluster; a missing file is fine. The pair first, so that nobody uses it."""
        for path in (self._own, self._cluster_key, self._certless, self._candidates):
            remove_file(path)
        self._remove_unfinished()
        self.forget_renewal()
        remove_file(self._journal)
        remove_file(self._anchors)

    # A renewal on this node --------------------------------------------------------------------

    def prepare(
        self,
        anchors: str,
        wants_key: bool = True,
        *,
        node_name: str,
        node_uuid: UUID,
        kind: KeyKind = KeyKind.ED25519,
    ) -> str | None:
        """Trust these anchors from now on; with `wants_key` returns a request for a new key.

        Called again, it returns a request for the key that it made before. A pair that is missing
        or was not trusted before is no hindrance: this is how it is mended. Raises BadPem when one
        that was would not be any more, or for what is no anchor.
        """
        self._remove_unfinished()
        before = self._usable_anchors()
        own = self._usable_own()
        wanted = anchors_of(anchors)
        if own is not None and before is not None and _is_signed(own, anchors_of(before)):
            _require_signed(own.certificate_pem, wanted)
        if before is not None and anchors_of(before) != wanted:
            # What an earlier renewal kept, and never finished, belongs to anchors that are gone.
            if read_private(self._previous_anchors, hint=_FROM_MASTER) not in (None, before):
                remove_file(self._previous_own)
            write_private(self._previous_anchors, before)
        write_private(self._anchors, anchors)
        if not wants_key:
            return None
        return request_for(self._next_key_pem(kind), node_name, node_uuid)

    def _next_key_pem(self, kind: KeyKind) -> str:
        kept = read_private(self._next_key, hint=_OWN)
        if kept is not None:
            with contextlib.suppress(BadPem):
                key = load_key(kept, "client.pem.next")
                if kind_of(key.public_key()) is kind:
                    return dump_key(key)
        made = dump_key(make_key(kind))
        write_private(self._next_key, made)
        return made

    def _usable_own(self) -> Pair | None:
        """None for what is missing or no pair; what others could reach is still an error."""
        text = read_private(self._own, hint=_OWN)
        with contextlib.suppress(BadPem):
            return None if text is None else self._pair(self._own, text)
        return None

    def _usable_anchors(self) -> str | None:
        text = read_private(self._anchors, hint=_FROM_MASTER)
        with contextlib.suppress(BadPem):
            if text is not None:
                anchors_of(text)
                return text
        return None

    def commit(self, certificate: str) -> None:
        """Serve and call with this certificate of the key that was prepared.

        Raises BadPem for one of another key, or that no anchor has signed; nothing changes then.
        """
        self._remove_unfinished()
        own = self._usable_own()
        if own is not None and fingerprint_of(own.certificate_pem) == fingerprint_of(certificate):
            remove_file(self._next_key)
            return
        hint = "begin again with `kvmsec cluster renew-crypto --node NAME`"
        pair = Pair(certificate, self._required(self._next_key, hint))
        require_whole(pair, "the new certificate")
        _require_signed(certificate, self.anchors_der())
        if own is not None and read_private(self._previous_own, hint=_OWN) is None:
            write_private(self._previous_own, own.pem)
        write_private(self._own, pair.pem)
        remove_file(self._next_key)

    def rollback(self) -> None:
        """Be as before `prepare`. The pair first: both anchors are trusted until it is back."""
        self._remove_unfinished()
        own = read_private(self._previous_own, hint=_OWN)
        if own is not None:
            self._pair(self._previous_own, own)
            write_private(self._own, own)
            remove_file(self._previous_own)
        remove_file(self._next_key)
        anchors = read_private(self._previous_anchors, hint=_FROM_MASTER)
        if anchors is not None:
            own_now = self._usable_own()
            if own_now is None or _is_signed(own_now, anchors_of(anchors)):
                write_private(self._anchors, anchors)
            remove_file(self._previous_anchors)

    def finish(self, anchors: str) -> None:
        """Trust these anchors alone, and forget what a rollback would need.

        In that order backwards: after a kill, a rollback must not bring back an old pair when
        other nodes have dropped the anchor that signed it. Raises BadPem, and changes nothing,
        when the node's own certificate would not be trusted any more.
        """
        self._remove_unfinished()
        _require_signed(self.own().certificate_pem, anchors_of(anchors))
        self.forget_renewal()
        write_private(self._anchors, anchors)

    def forget_renewal(self) -> None:
        """Remove what `prepare` and `commit` have kept; what is in force stays."""
        # The anchors first: with them alone a rollback would drop those that signed the new pair.
        for path in (self._next_key, self._previous_anchors, self._previous_own):
            remove_file(path)

    def _remove_unfinished(self) -> None:
        """Remove what a writer that was killed has left: it may hold a key."""
        for name in _NAMES:
            for leftover in self.directory.glob(f".{name}.*"):
                remove_file(leftover)

    def _required(self, path: Path, hint: str) -> str:
        text = read_private(path, hint=hint)
        if text is None:
            raise KeyFileRefused(path, "is missing", hint=hint)
        return text

    def _pair(self, path: Path, text: str) -> Pair:
        return require_whole(Pair.parse(text, str(path)), str(path))


def _require_signed(certificate_pem: str, anchors: tuple[bytes, ...]) -> None:
    """Refuse a certificate that these anchors have not signed, by the rules that peers judge by."""
    try:
        anchor_of(load_certificate(certificate_pem), anchors)
    except PeerRefused as error:
        raise BadPem("this node's certificate", error.reason) from error


def _is_signed(own: Pair, anchors: tuple[bytes, ...]) -> bool:
    try:
        _require_signed(own.certificate_pem, anchors)
    except BadPem:
        return False
    return True
