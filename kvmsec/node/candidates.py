"""The list of those that may order, as this node's copy of the state has it."""

from collections.abc import Mapping
from pathlib import Path
from uuid import UUID

from kvmsec.paths import Paths
from kvmsec.pki.candidates import format_candidates, parse_candidates
from kvmsec.pki.errors import CANDIDATES_FILE, BadCandidates, KeyFileRefused
from kvmsec.pki.private_files import read_private, write_private
from kvmsec.store import Store


def write_candidates(paths: Paths, store: Store) -> None:
    """Bring the list up to the state, where it differs. Raises what the store raises, and OSError.

    A cluster of one node without certificates has no list.
    """
    cluster, _ = store.load()
    wanted = cluster.orderers if cluster is not None else {}
    path = paths.key_files / CANDIDATES_FILE
    if wanted and wanted != _listed(path):
        write_private(path, format_candidates(wanted))


def _listed(path: Path) -> Mapping[UUID, frozenset[str]] | None:
    """The list as it stands; None for one that can't be used, and is to be replaced."""
    try:
        return parse_candidates(read_private(path, hint="") or "")
    except (BadCandidates, KeyFileRefused):
        return None
