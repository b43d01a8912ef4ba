"""Who may order: the list of the master candidates' certificates, `ssconf_master_candidates_certs`.

A line is `uuid=fingerprint`. During a renewal a uuid stands twice, with the old and the new one.
"""

import re
from collections.abc import Mapping
from typing import Final
from uuid import UUID

from kvmsec.pki.errors import CANDIDATES_FILE, BadCandidates

LIMIT_BYTES: Final = 1 << 20

_LINE: Final = re.compile(
    r"([0-9a-f]{8}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{12})=([0-9a-f]{64})", re.ASCII
)
_MOST_OF_ONE: Final = 2  # Before and after a renewal.
_PROBLEMS_KEPT: Final = 1000


def parse_candidates(text: str, source: str = CANDIDATES_FILE) -> Mapping[UUID, frozenset[str]]:
    """Read the list; empty lines don't count. Raises BadCandidates with every fault at once.

    An empty list is a fault: nobody may order then.
    """
    found: dict[UUID, frozenset[str]] = {}
    owners: dict[str, UUID] = {}
    problems: list[str] = []
    for number, line in enumerate(text.split("\n"), 1):
        if not line.strip():
            continue
        if (match := _LINE.fullmatch(line)) is None:
            problems.append(f"line {number} is not uuid=sha256 in lower case: {line[:120]}")
        else:
            uuid, fingerprint = UUID(match[1]), match[2]
            problems += _clashes(number, uuid, fingerprint, found, owners)
            owners.setdefault(fingerprint, uuid)
            found[uuid] = found.get(uuid, frozenset()) | {fingerprint}
        if len(problems) >= _PROBLEMS_KEPT:
            break
    if not found and not problems:
        problems.append("it is empty")
    if problems:
        raise BadCandidates(source, problems)
    return found


def _clashes(
    number: int,
    uuid: UUID,
    fingerprint: str,
    found: Mapping[UUID, frozenset[str]],
    owners: Mapping[str, UUID],
) -> list[str]:
    """What is wrong with a line that is well formed, after those before it."""
    owner = owners.get(fingerprint)
    if owner == uuid:
        return [f"line {number} says again what a line before it said"]
    if owner is not None:
        return [f"line {number} has the certificate of the node {owner} under {uuid}"]
    if len(found.get(uuid, ())) >= _MOST_OF_ONE:
        return [f"line {number} is the third certificate of the node {uuid}"]
    return []


def format_candidates(candidates: Mapping[UUID, frozenset[str]]) -> str:
    """The list as text, in a fixed order. Raises BadCandidates for one that can't be read back."""
    lines = [
        f"{uuid}={fingerprint}\n"
        for uuid, fingerprints in sorted(candidates.items())
        for fingerprint in sorted(fingerprints)
    ]
    text = "".join(lines)
    parse_candidates(text)
    return text
