"""Inviting a node: on the master."""

from datetime import UTC, datetime, timedelta

from kvmsec.cluster.handing import require_cluster
from kvmsec.cluster.team import require_master
from kvmsec.errors import MemberRefused, UnknownMember
from kvmsec.pki.certificates import fingerprint_of
from kvmsec.pki.files import KeyFiles
from kvmsec.pki.invitations import Invitations
from kvmsec.pki.joining import LIFETIME, Invitation, invite
from kvmsec.store import Store


def invite_node(
    store: Store,
    files: KeyFiles,
    invitations: Invitations,
    name: str,
    *,
    lifetime: timedelta = LIFETIME,
    is_member_again: bool = False,
) -> Invitation:
    """Make and keep an invitation; it takes the place of an earlier one of the same node.

    `is_member_again` is for a member that has lost its files. Raises NoCluster, NotMaster,
    MemberRefused, UnknownMember, BadName, BadLifetime, and what the key files raise.
    """
    cluster, _ = require_cluster(store)
    require_master(store, cluster)
    standing = cluster.named(name)
    if standing is None and is_member_again:
        raise UnknownMember(name)
    if standing is not None and not is_member_again and not _is_invited(invitations, name):
        raise MemberRefused(
            f"{standing.name} is a member already",
            hint="if it has lost its files, add --readd",
        )
    now = datetime.now(UTC)
    anchor = fingerprint_of(files.cluster().certificate_pem)
    invitation = invite(
        name if standing is None else standing.name, anchor, now=now, lifetime=lifetime
    )
    invitations.add(invitation, now)
    return invitation


def _is_invited(invitations: Invitations, name: str) -> bool:
    """Whether a node is on its way in: an `add` of it was begun and not finished."""
    return any(one.node_name == name for one in invitations.current(datetime.now(UTC)))
