"""Taking a node out of the cluster."""

from typing import Final

from attrs import evolve

from kvmsec.cluster.asking import is_out_of_reach, kind_of
from kvmsec.cluster.handing import spread
from kvmsec.cluster.members.master import (
    Changed,
    Master,
    require_member,
    with_member,
    without_member,
)
from kvmsec.cluster.members.roles import key_note, require_not_master
from kvmsec.cluster.nodes import Directory, MemberNode
from kvmsec.cluster.operations import update
from kvmsec.errors import MemberRefused, NodeSilent
from kvmsec.linux.errors import Fault
from kvmsec.model.cluster import Cluster, Member
from kvmsec.pki.files import KeyFiles
from kvmsec.store import Store

_END_OF_MASTER: Final = (
    "run `kvmsec cluster master-failover --force` on another candidate, then `kvmsec node remove` "
    "there; a cluster of this node alone ends by `kvmsec cluster destroy`"
)


async def remove(master: Master, name: str, *, force: bool = False) -> Changed:
    """Take a node out: nobody takes its orders, then it forgets the cluster, then all forget it.

    With `force` a node that does not answer is taken out as well; its files are not wiped then.
    Steps: distrust, leave, save, spread. Killed at any of them, run it again: a node that doesn't
    answer then has left already. Raises NoCluster, NotMaster, UnknownMember, MemberRefused for the
    master, NodeSilent, and InstancesRun or UidsInUse of the node; it stays what it was then.
    """
    cluster = master.cluster()
    member = require_member(cluster, name)
    require_not_master(cluster, member, "removed")
    master.on_step("distrust")
    await update(master.store, lambda now: _leaving(now, member, is_leaving=True))
    await spread(master.store, master.team())
    notes: list[str] = []
    try:
        master.on_step("leave")
        await master.directory.node(member).household.leave()
    except Fault as error:
        if not is_out_of_reach(error) or not (force or member.is_leaving):
            await _stay(master, member)
            raise _told(member, error) from error
        notes.append(
            f"{member.name} did not answer: if it still runs, its instances and files are still "
            f"there; wipe it with `kvmsec node leave` on it ({error})"
        )
    master.on_step("save")
    await update(master.store, lambda now: without_member(now, member))
    master.on_step("spread")
    behind = await spread(master.store, master.team())
    if member.is_candidate:
        notes.append(key_note(member))
    return Changed(member=member, behind=behind, notes=notes)


async def _stay(master: Master, member: Member) -> None:
    """Trust the node as before: it is not taken out."""
    await update(master.store, lambda now: _leaving(now, member, is_leaving=False))
    await spread(master.store, master.team())


def _told(member: Member, error: Fault) -> Fault:
    if not is_out_of_reach(error):
        return error
    return NodeSilent(
        member.name,
        str(error),
        hint="start its daemon; if it is gone for good, take it out with --force",
    )


async def require_released(store: Store, directory: Directory, files: KeyFiles) -> None:
    """Return where this node may forget its cluster by itself.

    That is where the cluster has let it go, is gone or can't be asked, and where this node's own
    files are broken, so that it has to join anew. Raises MemberRefused for a sound member that the
    master still has, and for the master.
    """
    try:
        cluster, _ = store.load()
        identity = store.identity()
        files.own()
        files.anchors()
    except Fault:
        return
    member = None if cluster is None or identity is None else cluster.member(identity.uuid)
    if cluster is None or member is None:
        return
    if member.uuid == cluster.master:
        raise _sound(member, cluster, _END_OF_MASTER)
    if await _has(directory.node(cluster.master_member)):
        raise _sound(member, cluster, f"run `kvmsec node remove {member.name}` on the master")


async def _has(master: MemberNode) -> bool:
    """Whether the master has this node for a member: it may not ask, or it may as a candidate."""
    try:
        await master.household.info()
    except Fault as error:
        evidence = getattr(error, "evidence", None)
        is_no_stranger = isinstance(evidence, dict) and evidence.get("step") == "role"
        return kind_of(error) == "Refused" and is_no_stranger
    except OSError:
        return False
    return True


def _sound(member: Member, cluster: Cluster, instead: str) -> MemberRefused:
    return MemberRefused(
        f"this node is {member.name}, a sound member of the cluster {cluster.name}",
        hint=f"{instead}; --force has it forget the cluster all the same, which the others go on "
        "to count with",
    )


def _leaving(cluster: Cluster, member: Member, *, is_leaving: bool) -> Cluster:
    standing = cluster.member(member.uuid)
    if standing is None:
        return cluster
    return with_member(cluster, evolve(standing, is_leaving=is_leaving))
