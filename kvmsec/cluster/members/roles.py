"""Making a candidate of a node, and a plain node of a candidate."""

from attrs import evolve

from kvmsec.cluster.handing import spread
from kvmsec.cluster.members.master import Changed, Master, require_member, with_member
from kvmsec.cluster.operations import update
from kvmsec.errors import MemberRefused
from kvmsec.linux.errors import Fault
from kvmsec.model.cluster import Cluster, Member, Role
from kvmsec.rpc.messages import FileRequest


async def promote(master: Master, name: str) -> Changed:
    """Let a node order, and hand it the cluster's key, so that it may become the master.

    Steps: key, save, spread. Killed at any of them, run it again, or `demote`. Raises NoCluster,
    NotMaster, RenewalPending, UnknownMember, MemberRefused, and what the node raises; the node is
    plain then.
    """
    cluster = master.settled_cluster()
    member = require_member(cluster, name)
    if not member.certificates:
        raise MemberRefused(
            f"{member.name} has no certificate that could stand on the list of candidates",
            hint=f"give it one with `kvmsec node readd {member.name}`",
        )
    if member.uuid == cluster.master:
        return Changed(member=member)
    household = master.directory.node(member).household
    master.on_step("key")
    await household.put_file(FileRequest(name="server.key", content=master.authority.cluster_key()))
    try:
        master.on_step("save")
        await update(master.store, lambda now: _with_role(now, member, Role.CANDIDATE))
    except BaseException as error:
        try:
            await household.put_file(FileRequest(name="server.key", content=None))
        except Fault as another:
            error.add_note(f"{member.name} still has the cluster's key: {another}")
        raise
    master.on_step("spread")
    behind = await spread(master.store, master.team())
    return Changed(member=require_member(master.cluster(), name), behind=behind)


async def demote(master: Master, name: str) -> Changed:
    """Let a candidate order no more: first every list forgets it, then its key is taken away.

    Steps: save, spread, key. Killed at any of them, run it again. Raises NoCluster, NotMaster,
    RenewalPending, UnknownMember, MemberRefused for the master.
    """
    cluster = master.settled_cluster()
    member = require_member(cluster, name)
    require_not_master(cluster, member, "demoted")
    master.on_step("save")
    await update(master.store, lambda now: _with_role(now, member, Role.PLAIN))
    master.on_step("spread")
    behind = dict(await spread(master.store, master.team()))
    master.on_step("key")
    notes = await take_key(master, member)
    if behind:
        notes.append(f"until they answer, these still take its orders: {', '.join(behind)}")
    return Changed(member=require_member(master.cluster(), name), behind=behind, notes=notes)


async def take_key(master: Master, member: Member) -> list[str]:
    """Take the cluster's key from a node that has had it; returns what a person has to know."""
    notes = [key_note(member)]
    try:
        household = master.directory.node(member).household
        await household.put_file(FileRequest(name="server.key", content=None))
    except Fault as error:
        notes.append(f"its server.key is still there, remove it by hand: {error}")
    return notes


def key_note(member: Member) -> str:
    """What a person has to know of a node that is no candidate any more."""
    return (
        f"{member.name} has had the cluster's key: a copy of it is worthless only after "
        "`kvmsec cluster renew-crypto --new-cluster-certificate`"
    )


def require_not_master(cluster: Cluster, member: Member, what: str) -> None:
    """Raises MemberRefused: the master is what the others trust, and always a candidate."""
    if member.uuid == cluster.master:
        raise MemberRefused(
            f"{member.name} is the master, and can't be {what}",
            hint="run `kvmsec cluster master-failover` on another candidate first",
        )


def _with_role(cluster: Cluster, member: Member, role: Role) -> Cluster:
    """The role alone: what a rival changed of the member since stays."""
    standing = cluster.member(member.uuid)
    return cluster if standing is None else with_member(cluster, evolve(standing, role=role))
