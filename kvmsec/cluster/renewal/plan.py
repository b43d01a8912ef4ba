"""What a renewal comes to: pure, from values to values.

The invariant, which holds however often the master is killed and whichever nodes are away:
*between the master and each member there is a pair that both accept*. With O for the old anchor,
certificate or fingerprint of the master, and N for the new:

| a member after | trusts | shows | lists | the master shows | and trusts |
|---|---|---|---|---|---|
| untouched | O | O | O | O | O N |
| prepared | O N | O | O | O | O N |
| listed | O N | O | O N, or N when it is late | O or N, or N | O N |
| committed | O N | N | O N, or N | N | O N |
| finished | N | N | N | N | N, or O N |

So the master keeps both of its pairs, and both anchors, until the last member has finished, and
tries the two in turn: what a member did last may be unknown, but it is one step or the next.
A candidate that calls another member meets the same table with its own certificate: those that
were reached list and trust both before any of them shows the new.
"""

from collections.abc import Sequence
from datetime import datetime
from typing import Final
from uuid import UUID

from attrs import evolve, frozen
from msgspec.structs import replace

from kvmsec.cluster.renewal.errors import UnknownMember
from kvmsec.cluster.renewal.journal import Direction, Progress, Renewal, Step, joined
from kvmsec.cluster.renewal.nodes import Credentials
from kvmsec.model.cluster import Cluster, Member
from kvmsec.pki.certificates import fingerprint_of
from kvmsec.pki.keys import KeyKind
from kvmsec.pki.pems import Pair, split_pems


@frozen(kw_only=True)
class Own:
    """What the master's own key files hold: anchors (PEM), and what it shows."""

    anchors: str
    client: Pair


def begin(
    cluster: Cluster,
    own: Own,
    *,
    signing: Pair,
    node: str | None,
    now: datetime,
    key_kind: KeyKind = KeyKind.ED25519,
    can_return: bool = True,
) -> Renewal:
    """The renewal that gives members new certificates, signed with `signing`, trusted in the end.

    `node` is the one member that gets one, None for all. The master may call with another pair
    than the state has for it, where its own is lost. Raises UnknownMember and BadPem.
    """
    named = None if node is None else cluster.named(node)
    if node is not None and named is None:
        raise UnknownMember(node)
    masters = fingerprint_of(own.client.certificate_pem)
    return Renewal(
        cluster=cluster.uuid,
        master=cluster.master,
        started_at=now,
        can_return=can_return,
        key_kind=key_kind,
        signing_certificate=signing.certificate_pem,
        signing_key=signing.key_pem,
        old_anchors=joined(own.anchors),
        old_client_certificate=own.client.certificate_pem,
        old_client_key=own.client.key_pem,
        members=tuple(
            _untouched(
                member,
                renews=named is None or member == named,
                old=masters if masters in member.certificates else None,
            )
            for member in cluster.nodes
        ),
    )


def _untouched(member: Member, *, renews: bool, old: str | None = None) -> Progress:
    """What a member shows where the state has two certificates is for itself to say."""
    if old is None and len(member.certificates) == 1:
        old = member.certificates[0]
    return Progress(uuid=member.uuid, name=member.name, renews=renews, old=old)


def with_members_of(renewal: Renewal, cluster: Cluster) -> Renewal:
    """The renewal with the members that joined since, and without those that left."""
    kept = tuple(
        renewal.member(member.uuid) or _untouched(member, renews=renewal.has_new_anchor)
        for member in cluster.nodes
    )
    return replace(renewal, members=kept)


def listed(progress: Progress, direction: Direction) -> tuple[str, ...] | None:
    """The fingerprints that count for a member: old and new, until one of them is dropped.

    None where the renewal has nothing to say of it.
    """
    if progress.new is None:
        return None
    old = () if progress.old is None else (progress.old,)
    if progress.step is Step.RETURNED:
        return old
    is_settled = progress.step in (Step.PROVED, Step.FINISHED)
    if direction is Direction.DROPPING and is_settled:
        return (progress.new,)
    return (*old, progress.new)


def state_of(renewal: Renewal, cluster: Cluster) -> Cluster:
    """The cluster's state with the fingerprints that count at this point of the renewal."""

    def renewed(member: Member) -> Member:
        progress = renewal.member(member.uuid)
        counting = None if progress is None else listed(progress, renewal.direction)
        return member if counting is None else evolve(member, certificates=counting)

    return evolve(cluster, nodes=tuple(map(renewed, cluster.nodes)))


def without(cluster: Cluster, forgotten: Sequence[UUID]) -> Cluster:
    """The cluster's state in which no certificate counts for these members."""
    return evolve(
        cluster,
        nodes=tuple(
            evolve(member, certificates=()) if member.uuid in forgotten else member
            for member in cluster.nodes
        ),
    )


def credentials_for(renewal: Renewal, progress: Progress, client: Pair) -> tuple[Credentials, ...]:
    """What the master may have to show to a member, the likeliest first.

    `client` is the pair in the master's own files, old or new.
    """
    anchors = renewal.both_anchors
    ways = [Credentials(client, anchors)]
    if client != renewal.old_client:
        ways.append(Credentials(renewal.old_client, anchors))
    if progress.step in (Step.UNTOUCHED, Step.PREPARED):
        ways.reverse()
    return tuple(ways)


def behind(renewal: Renewal) -> tuple[Progress, ...]:
    """The members that are not where the renewal goes."""
    goal = Step.RETURNED if renewal.direction is Direction.BACK else Step.FINISHED
    return tuple(one for one in renewal.members if one.step is not goal)


def may_drop(renewal: Renewal) -> bool:
    """Whether more than half have been proved to answer on the new: of the members, and of those
    that get a new certificate.

    With fewer the master is likelier cut off than the others are, and the old pair that would
    still reach them would be on this one node alone. A renewal of a single member that does not
    answer has renewed nothing, and can still be taken back.
    """
    renewed = [one for one in renewal.members if one.renews]
    return _are_most_proved(renewal.members) and _are_most_proved(renewed)


def _are_most_proved(members: Sequence[Progress]) -> bool:
    proved = [one for one in members if one.step in (Step.PROVED, Step.FINISHED)]
    return 2 * len(proved) > len(members)


def is_left_over(cluster: Cluster, anchors: str) -> bool:
    """Whether a renewal is under way whose journal is on another node, or lost."""
    return len(split_pems(anchors)) > 1 or any(
        len(member.certificates) > 1 for member in cluster.nodes
    )


def is_of_others(renewal: Renewal, cluster: Cluster, client_fingerprint: str) -> bool:
    """Whether a journal is from a time that is over: another cluster, or renewed by others since.

    `client_fingerprint` is that of the certificate in this node's files.
    """
    own = renewal.member(renewal.master)
    if (renewal.cluster, renewal.master) != (cluster.uuid, cluster.master) or own is None:
        return True
    called_with = fingerprint_of(renewal.old_client_certificate)
    return client_fingerprint not in (own.old, own.new, called_with)


_NEXT: Final = {
    Step.UNTOUCHED: "make a key, trust old and new",
    Step.PREPARED: "take the list of candidates with old and new",
    Step.LISTED: "serve and call with its new certificate",
    Step.COMMITTED: "prove that it answers on the new",
    Step.PROVED: "drop the old",
}


def steps_left(renewal: Renewal, progress: Progress) -> str:
    """What is still to be done on a member, in words."""
    if renewal.direction is Direction.BACK:
        return "go back to the old" if progress.step is not Step.RETURNED else "nothing"
    left = [words for step, words in _NEXT.items() if step.number >= progress.step.number]
    if not progress.renews:
        left = [_NEXT[Step.PREPARED], "drop the old from the list"] if left else []
    return "; ".join(left) or "nothing"
