"""The steps of a renewal, each on all members at once, each written down before the next begins.

A step may have been done without being known: the master was killed, or the answer lost. So each
may be done again, and what is known of a member is never more than what it did.
"""

import asyncio
from collections.abc import Awaitable, Callable, Iterable, Sequence
from datetime import datetime
from typing import Final
from uuid import UUID

from attrs import field, frozen
from msgspec.structs import replace

from kvmsec.cluster.renewal.errors import RenewalStopped, ShowsAnother, TooFewAnswer
from kvmsec.cluster.renewal.journal import Direction, Journal, Progress, Renewal, Step
from kvmsec.cluster.renewal.nodes import (
    CertificateNode,
    Credentials,
    NotReached,
    NotTrusted,
    OwnKeys,
)
from kvmsec.cluster.renewal.plan import (
    behind,
    credentials_for,
    may_drop,
    state_of,
    with_members_of,
)
from kvmsec.errors import Conflict, NoCluster
from kvmsec.linux.errors import Fault
from kvmsec.model.cluster import Cluster
from kvmsec.pki.certificates import fingerprint_of, sign_request
from kvmsec.store import Store

_ATTEMPTS: Final = 20

_LOOK_AGAIN_S: Final = (0.0, 0.2, 1.0, 3.0)
"""A daemon takes up what its files hold within a moment, not at once."""

Action = Callable[[CertificateNode, Progress], Awaitable[Progress]]


def _go_on(_: str) -> None:
    """What stands between the steps where nobody watches."""


@frozen(kw_only=True)
class Renewing:
    """What a renewal works with.

    `own_uuid` is this node's. `on_step` is told before and after each thing that is done; what it
    raises ends the renewal there, as a kill would. `only` is the one member that steps are done
    on, None for all. `patience_s` is how many seconds another's turn is waited for.
    """

    own_uuid: UUID
    store: Store
    nodes: Sequence[CertificateNode]
    keys: OwnKeys
    journal: Journal
    now: Callable[[], datetime]
    on_step: Callable[[str], None] = field(default=_go_on)
    only: UUID | None = None
    patience_s: float = 0.0

    def keep(self, renewal: Renewal) -> Renewal:
        """Write the journal: what it says is known from here on."""
        self.on_step(f"{renewal.direction}: journal")
        self.journal.save(renewal)
        self.on_step(f"{renewal.direction}: journal kept")
        return renewal

    def node(self, uuid: UUID) -> CertificateNode | None:
        return next((node for node in self.nodes if node.uuid == uuid), None)


async def advance(work: Renewing, renewal: Renewal, *, is_forced: bool = False) -> Renewal:
    """Go as far as the members let it; the journal is removed where all are at the end.

    `is_forced` drops the old however few answer. Raises RenewalStopped and TooFewAnswer, both
    before anything was dropped, NoCluster, and what the store and the disk raise.
    """
    renewal = work.keep(with_members_of(renewal, _cluster(work)))
    if renewal.direction is Direction.BACK:
        renewal = await _go_back(work, renewal)
    else:
        for stage in (_prepare, _list, _commit, _prove):
            renewal = await stage(work, renewal)
        renewal = await _drop(work, renewal, is_forced=is_forced)
    if not behind(renewal):
        work.on_step("the end")
        work.journal.remove()
    return renewal


# Forward -------------------------------------------------------------------------------------


async def _prepare(work: Renewing, renewal: Renewal) -> Renewal:
    cluster = _cluster(work)

    async def prepare(node: CertificateNode, progress: Progress) -> Progress:
        if not progress.renews:
            return replace(progress, step=Step.PREPARED)
        old = progress.old
        member = cluster.member(progress.uuid)
        if member is not None and len(member.certificates) > 1:
            old = await node.presented_certificate()
        request = await node.prepare(renewal.both_anchors, kind=renewal.key_kind)
        certificate = sign_request(
            renewal.signing_pair,
            request,
            node_name=progress.name,
            node_uuid=progress.uuid,
            now=work.now(),
        )
        return replace(
            progress,
            step=Step.PREPARED,
            old=old,
            certificate=certificate,
            new=fingerprint_of(certificate),
        )

    return await _at(work, renewal, Step.UNTOUCHED, "prepare", prepare)


async def _list(work: Renewing, renewal: Renewal) -> Renewal:
    """Give the list with old and new to those that will show the new, and to all others.

    The others first, the master among them: once it is known who is listed, that is not done again.
    """
    if not _those(renewal, Step.PREPARED):
        return renewal
    kept = put_in_store(work, lambda cluster: state_of(renewal, cluster))
    await tell(work, renewal, kept, but=tuple(Step)[: Step.LISTED.number])

    async def put(node: CertificateNode, progress: Progress) -> Progress:
        await node.put_state(*kept)
        return replace(progress, step=Step.LISTED)

    return await _at(work, renewal, Step.PREPARED, "list", put)


async def _commit(work: Renewing, renewal: Renewal) -> Renewal:
    async def commit(node: CertificateNode, progress: Progress) -> Progress:
        if progress.certificate is not None:
            await node.commit(progress.certificate)
        return replace(progress, step=Step.COMMITTED)

    return await _at(work, renewal, Step.LISTED, "commit", commit)


async def _prove(work: Renewing, renewal: Renewal) -> Renewal:
    """Call as it will be once the old is dropped: the new pair, and the new anchor alone."""
    after = Credentials(work.keys.own(), renewal.signing_certificate)

    async def prove(node: CertificateNode, progress: Progress) -> Progress:
        for pause_s in _LOOK_AGAIN_S:
            await asyncio.sleep(pause_s)
            shown = await node.through(after).presented_certificate()
            if progress.new in (None, shown):
                return replace(progress, step=Step.PROVED)
        raise ShowsAnother(progress.name, str(progress.new))

    return await _at(work, renewal, Step.COMMITTED, "prove", prove, is_as_it_is=True)


async def _drop(work: Renewing, renewal: Renewal, *, is_forced: bool) -> Renewal:
    """Have the old forgotten by those that were proved; from here on there is no way back."""
    if not _those(renewal, Step.PROVED):
        return renewal
    if renewal.direction is Direction.FORWARD:
        if not (is_forced or may_drop(renewal)):
            raise TooFewAnswer([one.name for one in renewal.members if one.problem is not None])
        renewal = work.keep(replace(renewal, direction=Direction.DROPPING))
    kept = put_in_store(work, lambda cluster: state_of(renewal, cluster))
    await tell(work, renewal, kept, but=tuple(Step)[: Step.FINISHED.number])

    async def drop(node: CertificateNode, progress: Progress) -> Progress:
        member = kept[0].member(progress.uuid)
        if renewal.has_new_anchor and member is not None and member.is_candidate:
            # Before anybody trusts the new anchor alone, so that a candidate that takes over
            # from the master can sign whatever the others trust.
            await node.put_file("server.key", renewal.signing_key)
        return replace(progress, problem=None)

    renewal = await _at(work, renewal, Step.PROVED, "hand the key to", drop)

    async def finish(node: CertificateNode, progress: Progress) -> Progress:
        await node.put_state(*kept)
        if progress.renews:
            await node.finish(renewal.signing_certificate)
        return replace(progress, step=Step.FINISHED)

    handed = [one.uuid for one in renewal.members if one.problem is None]
    return await _at(work, renewal, Step.PROVED, "finish", finish, only=handed)


# Back ----------------------------------------------------------------------------------------


async def _go_back(work: Renewing, renewal: Renewal) -> Renewal:
    """Everybody shows the old again before the list forgets the new."""

    async def go_back(node: CertificateNode, progress: Progress) -> Progress:
        if progress.renews:
            await node.rollback()
            await node.finish(renewal.old_anchors)
        return replace(progress, step=Step.RETURNED)

    for step in tuple(Step)[: Step.FINISHED.number]:
        renewal = await _at(work, renewal, step, "roll back", go_back)
    kept = put_in_store(work, lambda cluster: state_of(renewal, cluster))
    await tell(work, renewal, kept, but=tuple(Step)[: Step.RETURNED.number])
    return renewal


# One step on many members ----------------------------------------------------------------------


def _those(renewal: Renewal, step: Step) -> tuple[Progress, ...]:
    return tuple(one for one in renewal.members if one.step is step)


async def _at(
    work: Renewing,
    renewal: Renewal,
    step: Step,
    what: str,
    action: Action,
    *,
    is_as_it_is: bool = False,
    only: Iterable[UUID] | None = None,
) -> Renewal:
    """Do one thing on all members that are at `step`; the master is the last.

    Without `is_as_it_is` each is called with whichever of the master's pairs it accepts. A member
    that was not reached stays where it is; where one refused, RenewalStopped is raised if there is
    a way back, and nobody else waits for it if there is none.
    """
    here = [
        one
        for one in _those(renewal, step)
        if (only is None or one.uuid in only) and work.only in (None, one.uuid)
    ]
    if not here:
        return renewal
    others = [one for one in here if one.uuid != renewal.master]
    masters = [one for one in here if one.uuid == renewal.master]
    refusals: list[str] = []
    for group in (others, masters):
        tried = await asyncio.gather(
            *(_one(work, renewal, one, what, action, is_as_it_is=is_as_it_is) for one in group),
            return_exceptions=True,
        )
        done: list[Progress] = []
        for progress, outcome in zip(group, tried, strict=True):
            if isinstance(outcome, NotReached | NotTrusted):
                done.append(replace(progress, problem=outcome.message))
            elif isinstance(outcome, Fault):
                refusals.append(outcome.message)
                done.append(replace(progress, problem=outcome.message))
            elif isinstance(outcome, BaseException):
                raise outcome
            else:
                done.append(replace(outcome, problem=None))
        renewal = renewal.having(*done)
    renewal = work.keep(renewal)
    if refusals and renewal.direction is Direction.FORWARD:
        raise RenewalStopped(refusals)
    return renewal


async def _one(
    work: Renewing,
    renewal: Renewal,
    progress: Progress,
    what: str,
    action: Action,
    *,
    is_as_it_is: bool,
) -> Progress:
    node = work.node(progress.uuid)
    if node is None:
        raise NotReached(progress.name, "nobody knows how to call it")
    work.on_step(f"{what} {progress.name}")
    if is_as_it_is:
        done = await action(node, progress)
    else:
        done = await _through_any(
            node,
            credentials_for(renewal, progress, work.keys.own()),
            lambda reached: action(reached, progress),
        )
    work.on_step(f"{what} {progress.name}: done")
    return done


async def _through_any(
    node: CertificateNode,
    ways: Sequence[Credentials],
    action: Callable[[CertificateNode], Awaitable[Progress]],
) -> Progress:
    """Try one pair after the other, as long as it is trust that is missing."""
    for way in ways[:-1]:
        try:
            return await action(node.through(way))
        except NotTrusted:
            continue
    return await action(node.through(ways[-1]))


async def tell(
    work: Renewing, renewal: Renewal, kept: tuple[Cluster, int], *, but: Sequence[Step]
) -> None:
    """Hand out the state to those who don't wait for it; whoever misses it gets it later."""
    told = [one for one in renewal.members if one.step not in but]

    async def put(node: CertificateNode, progress: Progress) -> Progress:
        await node.put_state(*kept)
        return progress

    outcomes = await asyncio.gather(
        *(_one(work, renewal, one, "tell", put, is_as_it_is=False) for one in told),
        return_exceptions=True,
    )
    for outcome in outcomes:
        if isinstance(outcome, BaseException) and not isinstance(outcome, Fault):
            raise outcome


# The store -----------------------------------------------------------------------------------


def _cluster(work: Renewing) -> Cluster:
    cluster, _ = work.store.load()
    if cluster is None:
        raise NoCluster
    return cluster


def put_in_store(work: Renewing, change: Callable[[Cluster], Cluster]) -> tuple[Cluster, int]:
    """Change the cluster's state, over rivals' changes; returns it, and its revision."""
    for attempt in range(_ATTEMPTS):
        cluster, revision = work.store.load()
        if cluster is None:
            raise NoCluster
        changed = change(cluster)
        if changed == cluster:
            return cluster, revision
        work.on_step("state")
        try:
            revision = work.store.save(changed, revision)
        except Conflict:
            if attempt == _ATTEMPTS - 1:
                raise
            continue
        work.on_step("state kept")
        return changed, revision
    raise AssertionError("the last attempt returns or raises")
