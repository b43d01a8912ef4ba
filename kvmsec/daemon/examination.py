"""What `cluster verify` wants to know of this node: read piece by piece, none in another's way."""

from collections.abc import Awaitable, Callable, Sequence
from typing import TYPE_CHECKING, Any, TypeVar

from kvmsec.linux.errors import Fault
from kvmsec.model.security import SecurityModel
from kvmsec.node import records
from kvmsec.node.local import LocalNode
from kvmsec.node.reconcile import is_true
from kvmsec.rpc import messages as m
from kvmsec.rpc import values
from uidpool.ranges import UidRanges

if TYPE_CHECKING:
    from kvmsec.pki.files import KeyFiles

_T = TypeVar("_T")


async def examine(
    node: LocalNode, files: "KeyFiles", info: m.NodeInfo, pool: UidRanges
) -> m.Examination:
    """Look at this node; what can't be read is None or empty, and named in `unreadable`."""
    unreadable: list[str] = []

    def read(what: str, look: Callable[[], _T]) -> _T | None:
        try:
            return look()
        except (Fault, OSError, ValueError) as error:
            unreadable.append(values.words(f"{what}: {error}"))
            return None

    async def ask(what: str, question: Awaitable[Sequence[Any]]) -> Sequence[Any]:
        try:
            return await question
        except (Fault, OSError) as error:
            unreadable.append(values.words(f"{what}: {error}"))
            return ()

    problems = await ask("the pool's users", node.check_pool(pool))
    rules = await ask("the packet rules", node.verify_rules())
    kept = read("the instances' records", lambda: records.every(node.host.paths)) or []
    running = [one for one in kept if is_true(one)]
    leases = read("the leases", lambda: _leases(node, kept)) or ()
    leased = {(one.uid, one.instance) for one in leases}
    return m.Examination(
        info=info,
        anchors=read("server.pem", lambda: _anchors(files)),
        certificate=read("client.pem", lambda: _facts(files.own().certificate_pem)),
        holds_cluster_key=files.holds_cluster_key(),
        candidates=read("the list of candidates", lambda: _candidates(files)),
        pool_problems=tuple(_finding_of(one) for one in problems),
        leases=leases,
        running_without_lease=tuple(
            one.name
            for one in running
            if one.model is SecurityModel.POOL and (one.uid, one.name) not in leased
        ),
        rules=values.findings_message(rules).findings,
        unconfined=tuple(one.name for one in running if one.model is SecurityModel.NONE),
        may_be_missing=node.host.config.confinement.may_be_missing,
        unreadable=tuple(unreadable),
    )


def _anchors(files: "KeyFiles") -> tuple[m.CertificateFacts, ...]:
    from kvmsec.pki.pems import split_pems

    return tuple(map(_facts, split_pems(files.anchors(), "server.pem")))


def _facts(pem: str) -> m.CertificateFacts:
    from kvmsec.pki.certificates import facts_of

    facts = facts_of(pem)
    return m.CertificateFacts(
        fingerprint=facts.fingerprint,
        subject=facts.subject,
        names=facts.names,
        not_before=facts.not_before,
        not_after=facts.not_after,
    )


def _candidates(files: "KeyFiles") -> tuple[tuple[Any, str], ...]:
    listed = files.candidates()
    return tuple((uuid, one) for uuid, known in sorted(listed.items()) for one in sorted(known))


def _leases(node: LocalNode, kept: Sequence[records.InstanceRecord]) -> tuple[m.LeaseFacts, ...]:
    root = str(node.host.paths.root)
    alive = {(one.name, one.generation) for one in kept if is_true(one)}
    return tuple(
        m.LeaseFacts(
            uid=one.uid,
            instance=one.instance,
            is_alive=(one.instance, one.generation) in alive,
        )
        for one in node.host.claims.leases()
        if one.root == root
    )


def _finding_of(problem: Any) -> m.Finding:
    return m.Finding(
        code=f"pool-{problem.code}",
        severity="error",
        item=values.words(f"uids {problem.uids}"),
        message=values.words(problem.message),
        hint=values.maybe_words(problem.hint),
    )
