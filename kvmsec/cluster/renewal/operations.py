"""`cluster renew-crypto`: begin, go on, go back, forget who is away, and let nodes catch up."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from uuid import UUID

from attrs import evolve, frozen
from msgspec.structs import replace

from kvmsec.cluster.renewal.errors import (
    NothingToAbort,
    NoWayBack,
    RenewalPending,
)
from kvmsec.cluster.renewal.journal import Direction, Renewal
from kvmsec.cluster.renewal.nodes import CertificateNode, NotReached, NotTrusted, OwnKeys
from kvmsec.cluster.renewal.plan import (
    Own,
    begin,
    behind,
    is_left_over,
    is_of_others,
    steps_left,
    without,
)
from kvmsec.cluster.renewal.sequence import Renewing, advance, put_in_store, tell
from kvmsec.errors import NoCluster, NotMaster
from kvmsec.linux.locks import FileLock
from kvmsec.model.cluster import Cluster
from kvmsec.pki.certificates import fingerprint_of, make_cluster_pair
from kvmsec.pki.errors import PkiError
from kvmsec.pki.keys import KeyKind


@frozen(kw_only=True)
class Wish:
    """What is to be made new.

    A new cluster certificate brings new node certificates with it, which it has to sign. `node`
    is the one member that gets a new one, None for all.
    """

    new_cluster_certificate: bool = False
    node: str | None = None
    key_kind: KeyKind = KeyKind.ED25519


@frozen(kw_only=True)
class Outcome:
    """How far a renewal came.

    `behind` has the members that it still waits for, and why; `forgotten` those that it ended
    without, which need `node readd`.
    """

    direction: Direction
    behind: Mapping[str, str]
    forgotten: tuple[str, ...] = ()

    @property
    def is_at_its_end(self) -> bool:
        return not self.behind


@frozen(kw_only=True)
class Step:
    """What a renewal would do with one member; `problem` says why the member can't be asked."""

    node: str
    what: str
    problem: str | None = None


async def renew(work: Renewing, wish: Wish) -> Outcome:
    """Begin a renewal, and go as far as the members let it.

    Raises RenewalPending, NotMaster, NoCluster, UnknownMember, LockBusy, RenewalStopped,
    TooFewAnswer, and what the store, the key files and the disk raise.
    """
    with _turn(work):
        cluster = _require_master(work)
        if (standing := _standing(work, cluster)) is not None:
            raise RenewalPending([one.name for one in behind(standing)])
        return _outcome(await advance(work, _begun(work, cluster, wish)))


async def go_on(work: Renewing) -> Outcome | None:
    """Go on with what was interrupted; None where nothing was.

    A renewal that another master began, whose journal is not here, is brought to its end with the
    anchor whose key this node has. Raises what `renew` raises, but RenewalPending.
    """
    with _turn(work):
        cluster = _require_master(work)
        renewal = _standing(work, cluster) or _left_over(work, cluster)
        return None if renewal is None else _outcome(await advance(work, renewal))


async def abort(work: Renewing) -> Outcome:
    """Take a renewal back, as long as nobody was told to drop the old.

    Raises NothingToAbort, NoWayBack, and what `renew` raises.
    """
    with _turn(work):
        renewal = _require_standing(work)
        if renewal.direction is Direction.DROPPING or not renewal.can_return:
            raise NoWayBack
        return _outcome(await advance(work, replace(renewal, direction=Direction.BACK)))


async def forget_offline(work: Renewing) -> Outcome:
    """Go on, and end the renewal without the members that are still behind then.

    No certificate counts for them any more: they need `node readd`. Raises NothingToAbort, and
    what `renew` raises.
    """
    with _turn(work):
        renewal = await advance(work, _require_standing(work), is_forced=True)
        if not (left := behind(renewal)):
            return _outcome(renewal)
        forgotten = [one.uuid for one in left]
        kept = put_in_store(work, lambda cluster: without(cluster, forgotten))
        await tell(work, renewal, kept, but=[one.step for one in left])
        work.on_step("forget")
        work.journal.remove()
        return Outcome(
            direction=renewal.direction, behind={}, forgotten=tuple(one.name for one in left)
        )


async def catch_up_certificates(work: Renewing, node: UUID | None = None) -> Outcome | None:
    """Let a member (None: all) catch up with a renewal that has passed it; None if none has.

    For whoever is about to call a member, on the master: it costs one look for a file when no
    renewal is pending. Before the old is dropped there is nothing to catch up with, and where
    another command renews just now, that one sees to it. Raises what the store, the key files and
    the disk raise; a member that was not reached is in the outcome.
    """
    if not work.journal.is_there():
        return None
    lock = FileLock(work.journal.lock_path)
    if not lock.try_acquire():
        return None
    with lock:
        renewal = _standing(work, _require_master(work))
        if renewal is None or renewal.direction is Direction.FORWARD:
            return None
        return _outcome(await advance(evolve(work, only=node), renewal))


async def preview(work: Renewing, wish: Wish | None) -> Sequence[Step]:
    """What a renewal would do, member by member; changes nothing, writes nothing.

    `wish` is None for what going on would do. Raises what `renew` raises.
    """
    cluster = _require_master(work)
    renewal = _standing(work, cluster, is_look=True)
    if renewal is not None and wish is not None:
        raise RenewalPending([one.name for one in behind(renewal)])
    if renewal is None:
        renewal = _left_over(work, cluster) if wish is None else _begun(work, cluster, wish)
    if renewal is None:
        return ()
    steps: list[Step] = []
    for one in renewal.members:
        node = work.node(one.uuid)
        problem = await _why_not(node) if node is not None else "nobody knows how to call it"
        steps.append(Step(node=one.name, what=steps_left(renewal, one), problem=problem))
    return steps


async def _why_not(node: CertificateNode) -> str | None:
    try:
        await node.presented_certificate()
    except (NotReached, NotTrusted, PkiError) as error:
        return error.message
    return None


def require_none_pending(work: Renewing) -> None:
    """For whoever changes the members: not while a renewal is on its way. Raises RenewalPending.

    One that an earlier master has left over counts, too.
    """
    cluster = _require_master(work)
    if (standing := _standing(work, cluster)) is not None:
        raise RenewalPending([one.name for one in behind(standing)])
    if is_left_over(cluster, work.keys.anchors()):
        raise RenewalPending([])


def awaited(work: Renewing) -> tuple[str, ...]:
    """The members that a renewal still waits for, by its journal; changes nothing.

    None on a node that is not the master. Raises NoCluster, and what the store and the journal
    raise.
    """
    cluster, _ = work.store.load()
    if cluster is None:
        raise NoCluster
    if cluster.master != work.own_uuid or not work.journal.is_there():
        return ()
    renewal = _standing(work, cluster, is_look=True)
    return () if renewal is None else tuple(one.name for one in behind(renewal))


# What is there -------------------------------------------------------------------------------


@contextmanager
def _turn(work: Renewing) -> Iterator[None]:
    """One renewal at a time. Raises LockBusy."""
    lock = FileLock(work.journal.lock_path)
    lock.acquire(timeout_s=work.patience_s)
    with lock:
        yield


def _require_master(work: Renewing) -> Cluster:
    cluster, _ = work.store.load()
    if cluster is None:
        raise NoCluster
    if cluster.master != work.own_uuid:
        raise NotMaster(cluster.master_member.name)
    return cluster


def _standing(work: Renewing, cluster: Cluster, *, is_look: bool = False) -> Renewal | None:
    """The renewal in the journal. One that others have ended since is removed, not gone on with.

    That is so after another node was the master for a while, and this one is it again.
    """
    renewal = work.journal.load()
    if renewal is None:
        return None
    if not is_of_others(renewal, cluster, fingerprint_of(work.keys.own().certificate_pem)):
        return renewal
    if not is_look:
        work.journal.remove()
    return None


def _require_standing(work: Renewing) -> Renewal:
    renewal = _standing(work, _require_master(work))
    if renewal is None:
        raise NothingToAbort
    return renewal


def _begun(work: Renewing, cluster: Cluster, wish: Wish) -> Renewal:
    own = _own(work.keys)
    if is_left_over(cluster, own.anchors):
        # A third anchor would be one too many; and nobody knows who trusts which of the two.
        raise RenewalPending([])
    if wish.new_cluster_certificate:
        now = work.now()
        signing = make_cluster_pair(cluster.name, cluster.uuid, kind=wish.key_kind, now=now)
    else:
        signing = work.keys.cluster()
    return begin(
        cluster, own, signing=signing, node=wish.node, key_kind=wish.key_kind, now=work.now()
    )


def _left_over(work: Renewing, cluster: Cluster) -> Renewal | None:
    own = _own(work.keys)
    if not is_left_over(cluster, own.anchors):
        return None
    signing = work.keys.cluster()
    return begin(cluster, own, signing=signing, node=None, now=work.now(), can_return=False)


def _own(keys: OwnKeys) -> Own:
    return Own(anchors=keys.anchors(), client=keys.own())


def _outcome(renewal: Renewal) -> Outcome:
    return Outcome(
        direction=renewal.direction,
        behind={one.name: one.problem or "it was not asked yet" for one in behind(renewal)},
    )
