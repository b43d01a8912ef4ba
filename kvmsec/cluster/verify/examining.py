"""Asking all members about themselves, and judging what they say."""

from collections.abc import Callable, Collection, Iterable, Mapping
from datetime import UTC, datetime
from typing import Any, Final

from attrs import evolve, frozen

from kvmsec.agent import Finding
from kvmsec.cluster.asking import ask_all
from kvmsec.cluster.handing import require_cluster
from kvmsec.cluster.nodes import Directory, Household
from kvmsec.cluster.verify import certificates, standing, uids
from kvmsec.cluster.verify.codes import found
from kvmsec.cluster.verify.subject import Heard, Subject, Unheard
from kvmsec.linux.errors import Fault
from kvmsec.model.cluster import Cluster
from kvmsec.pki.errors import LIST_MENDED
from kvmsec.rpc.errors import LIST_UNUSABLE, OWN_LIST_UNUSABLE
from kvmsec.store import Store
from kvmsec.store.freshness import COPY_VALID_S
from uidpool.ranges import UidRanges

DEADLINE_S: Final = 60.0
"""A canary for each family and a look at every uid's users take a node seconds, not a minute."""

CHECKS: Final = (
    standing.check_answers,
    standing.check_identity,
    standing.check_clocks,
    standing.check_versions,
    standing.check_copies,
    standing.check_certless,
    certificates.check_anchors,
    certificates.check_own,
    certificates.check_renewal,
    certificates.check_lists,
    certificates.check_keys,
    uids.check_pool,
    uids.check_leases,
    uids.check_rules,
    uids.check_confinement,
)

MOST_ALIKE: Final = 50
"""Findings of one code about one node: more than anybody reads, and a node may say anything."""

OnHeard = Callable[[str], None]


@frozen
class _Asked:
    """One node to be asked; `name` is the member's, whatever the node calls itself."""

    name: str
    household: Household


async def verify(
    store: Store,
    directory: Directory,
    here: Household,
    *,
    copy_valid_s: float = COPY_VALID_S,
    deadline_s: float = DEADLINE_S,
    awaited: Collection[str] = (),
    on_heard: OnHeard = lambda name: None,
) -> tuple[Finding, ...]:
    """What is wrong with the cluster, a finding each; a sound node has one that says so.

    On the master or another candidate: a plain node is refused by the others. `awaited` are the
    members that a renewal waits for, which its journal on the master tells
    (`kvmsec.cluster.renewal.operations.awaited`). `on_heard` is told each node that answered, as it
    does. Raises NoCluster, and what the store raises; changes nothing.
    """
    cluster, revision = require_cluster(store)
    identity = store.identity()
    own = identity.uuid if identity is not None else None
    nodes = [
        _Asked(node.name, here if node.uuid == own else directory.node(node).household)
        for node in cluster.nodes
    ]
    answers = await ask_all(
        # This node last: what it does in place would keep the loop from asking the others.
        sorted(nodes, key=lambda node: node.household is here),
        lambda node: _examine(node, cluster.guarded_uids, on_heard),
        deadline_s=deadline_s,
    )
    unheard = {name: Unheard(why, is_refusal=False) for name, why in answers.silent.items()}
    refused = {name: _refused(name, why, cluster) for name, why in answers.refused.items()}
    return judge(
        Subject(
            cluster=cluster,
            revision=revision,
            now=datetime.now(UTC),
            copy_valid_s=copy_valid_s,
            answers={**answers.answered, **unheard, **refused},
            awaited=awaited,
        )
    )


async def _examine(node: _Asked, pool: UidRanges, on_heard: OnHeard) -> Heard:
    asked_at = datetime.now(UTC)
    examination = await node.household.examine(pool)
    heard = Heard(examination, asked_at, datetime.now(UTC))
    on_heard(node.name)
    return heard


def _refused(name: str, error: Fault | OSError, cluster: Cluster) -> Unheard:
    """With the better hint, where the refusal's evidence tells what is wrong."""
    evidence = getattr(error, "evidence", None)
    hint = _hint_for(name, evidence, cluster) if isinstance(evidence, dict) else None
    return Unheard(str(error), is_refusal=True, hint=hint)


def _hint_for(name: str, evidence: Mapping[str, Any], cluster: Cluster) -> str | None:
    if evidence.get("list") == LIST_UNUSABLE:
        return f"on {name} {LIST_MENDED}"
    if evidence.get("list") == OWN_LIST_UNUSABLE:
        return f"on this node {LIST_MENDED}"
    if evidence.get("step") == "role":
        # A plain node is told so by all others, and nothing is wrong with them.
        who = ", ".join(node.name for node in cluster.nodes if node.is_candidate)
        return f"run `kvmsec cluster verify` on one of: {who}"
    return None


def judge(subject: Subject) -> tuple[Finding, ...]:
    """All findings of all checks, by the members' order; pure."""
    findings = _cut(finding for check in CHECKS for finding in check(subject))
    names = {member.name: place for place, member in enumerate(subject.cluster.nodes)}
    touched = {finding.node for finding in findings}
    findings += [
        found("node-ok", "ok", name, "node", "nothing is wrong with it")
        for name in names
        if name not in touched
    ]
    return tuple(sorted(findings, key=lambda one: names[one.node or ""]))


def _cut(findings: Iterable[Finding]) -> list[Finding]:
    """The first of each code and node, and how many like them there are besides."""
    alike: dict[tuple[str, str | None], list[Finding]] = {}
    for one in findings:
        alike.setdefault((one.code, one.node), []).append(one)
    kept: list[Finding] = []
    for several in alike.values():
        kept += several[:MOST_ALIKE]
        if left_out := several[MOST_ALIKE:]:
            worst = next((one for one in left_out if one.severity == "error"), left_out[0])
            kept.append(evolve(worst, message=f"{len(left_out)} more like these are left out"))
    return kept


def without_ignored(findings: tuple[Finding, ...], codes: Collection[str]) -> tuple[Finding, ...]:
    """Errors of these codes are warnings: they are told, and don't count."""
    return tuple(
        evolve(one, severity="warning") if one.code in codes and one.severity == "error" else one
        for one in findings
    )
