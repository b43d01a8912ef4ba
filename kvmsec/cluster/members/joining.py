"""Bringing a node into the cluster, or back into it."""

from uuid import uuid4

from attrs import evolve

from kvmsec.cluster.asking import is_out_of_reach, is_silence
from kvmsec.cluster.handing import catch_up, require_cluster, spread, state_of
from kvmsec.cluster.members.master import (
    Changed,
    Master,
    require_member,
    with_member,
    without_member,
)
from kvmsec.cluster.operations import update
from kvmsec.errors import MemberRefused, NodeSilent
from kvmsec.linux.errors import Fault
from kvmsec.model.addresses import PORT
from kvmsec.model.cluster import Cluster, Member
from kvmsec.pki.errors import LIST_MENDED
from kvmsec.rpc.errors import LIST_UNUSABLE
from kvmsec.rpc.messages import FileRequest


async def add(
    master: Master, address: str, *, port: int = PORT, name: str | None = None
) -> Changed:
    """Make a member of the invited node at this address; returns it, a plain node.

    Its name is that of its invitation: the one that is the address, or the only one, unless `name`
    chooses. Steps: hello, save, admit, spend, spread. Killed at any of them, run it again: who has
    joined by then needs no invitation any more. Raises NoCluster, NotMaster, RenewalPending,
    MemberRefused, and what the node and the authority raise; the node is no member then, unless a
    note of the error says that it may be.
    """
    cluster = master.settled_cluster()
    begun = _begun(master, cluster, address, port, name)
    if begun is not None and await _has_joined(master, begun):
        return await _make_known(master, begun)
    wanted = name or _invited(master, address, begun or cluster.named(address))
    _require_not_spent(master, cluster, wanted)
    return await _bring_in(master, _planned(cluster, wanted, address, port))


async def readd(master: Master, name: str) -> Changed:
    """Mend a member that has lost its files or its copy of the state.

    One that answers gets them again; one that doesn't joins anew under its old uuid, if it is
    invited. Raises NoCluster, NotMaster, RenewalPending, UnknownMember, MemberRefused, NodeSilent,
    and what `add` raises.
    """
    cluster = master.settled_cluster()
    member = require_member(cluster, name)
    if member.uuid == cluster.master:
        raise MemberRefused(
            f"{member.name} is the master, which is what others are mended from",
            hint="renew its certificate with `kvmsec cluster renew-crypto --node NAME`; for "
            "lost files, `kvmsec cluster master-failover --force` on another candidate, then this",
        )
    if master.invitations.is_current(member.name):
        return await _bring_in(master, evolve(member, is_leaving=False))
    try:
        await _refresh(master, member)
    except Fault as error:
        if not is_out_of_reach(error):
            raise
        raise NodeSilent(member.name, str(error), hint=_mended_by(member, error)) from error
    behind = await spread(master.store, master.team())
    return Changed(member=member, behind=behind, notes=await _unfit(master, member))


def _mended_by(member: Member, error: Fault) -> str:
    if getattr(error, "evidence", {}).get("list") == LIST_UNUSABLE:
        return f"on {member.name} {LIST_MENDED}"
    return (
        f"start its daemon; where it has lost its files, run `kvmsec node invite {member.name} "
        "--readd` here, `kvmsec node leave` and then `kvmsec node join` there, and this once more"
    )


async def _refresh(master: Master, member: Member) -> None:
    household = master.directory.node(member).household
    await household.put_file(FileRequest(name="server.pem", content=master.authority.anchors()))
    if member.is_candidate:
        key = master.authority.cluster_key()
        await household.put_file(FileRequest(name="server.key", content=key))
    await catch_up(master.store, master.directory, member)


def _begun(
    master: Master, cluster: Cluster, address: str, port: int, name: str | None
) -> Member | None:
    """The member at this address that is invited no more: an `add` that was killed made it one."""
    for member in cluster.nodes:
        is_meant = member.name == (name or member.name) and (member.address, member.port) == (
            address,
            port,
        )
        if is_meant and member.uuid != cluster.master and not member.is_leaving:
            return None if master.invitations.is_current(member.name) else member
    return None


def _require_not_spent(master: Master, cluster: Cluster, name: str) -> None:
    """Raises MemberRefused for a member whose invitation is spent; nobody else is meant."""
    member = cluster.named(name)
    if member is None or member.uuid == cluster.master or master.invitations.is_current(name):
        return
    raise MemberRefused(
        f"{member.name} is a member already, or its join was finished halfway: its invitation is "
        "spent",
        hint=f"`kvmsec node readd {member.name}` mends it, once its daemon runs",
    )


def _invited(master: Master, address: str, standing: Member | None) -> str:
    """Which invitation a node at this address has; without any, the member that stands there.

    Raises MemberRefused.
    """
    names = master.invitations.current()
    if address in names:
        return address
    if len(names) == 1:
        return names[0]
    if not names and standing is not None:
        return standing.name
    raise MemberRefused(
        f"which of the invited nodes is at {address}? there are {', '.join(names)}"
        if names
        else "no node is invited",
        hint="name it with --name" if names else "run `kvmsec node invite NAME` first",
    )


def _planned(cluster: Cluster, name: str, address: str, port: int) -> Member:
    """The member to be: a new one, or the one that an interrupted `add` has begun with."""
    standing = cluster.named(name)
    if standing is None:
        return Member(name, uuid=uuid4(), address=address, port=port)
    if standing.uuid == cluster.master:
        raise MemberRefused(
            f"{name} is the master's name", hint="invite the node under another name"
        )
    return evolve(standing, address=address, port=port)


async def _bring_in(master: Master, member: Member) -> Changed:
    if not master.invitations.is_current(member.name):
        raise MemberRefused(
            f"the node {member.name} is not invited, or not any more",
            hint=f"run `kvmsec node invite {member.name}` and carry the token over",
        )
    if not await _has_joined(master, member):
        await _let_join(master, member)
    master.on_step("spend")
    master.invitations.spend(member.name)
    return await _make_known(master, member)


async def _make_known(master: Master, member: Member) -> Changed:
    """The last step of an `add`: everybody gets the state with the member in it."""
    master.on_step("spread")
    behind = await spread(master.store, master.team())
    joined = require_member(master.cluster(), member.name)
    return Changed(member=joined, behind=behind, notes=await _unfit(master, joined))


async def _has_joined(master: Master, member: Member) -> bool:
    """Whether the node took its admission in a run that was killed before it heard so."""
    cluster = master.cluster()
    if cluster.member(member.uuid) is None:
        return False
    try:
        info = await master.directory.node(member).household.info()
    except Fault:
        return False
    return info.uuid == member.uuid and info.cluster_uuid == cluster.uuid


async def _let_join(master: Master, member: Member) -> None:
    before = master.cluster().member(member.uuid)
    master.on_step("hello")
    joining = master.directory.joining(member)
    request = await joining.hello(member.name, member.uuid)
    signed = master.authority.sign(request, member)
    certified = evolve(member, certificates=(signed.fingerprint,))
    master.on_step("save")
    await update(master.store, lambda now: with_member(now, certified))
    try:
        master.on_step("admit")
        state = state_of(*require_cluster(master.store))
        await joining.admit(master.authority.anchors(), signed.certificate, state)
    except Fault as error:
        if is_silence(error):
            error.add_note(
                f"{member.name} may be a member now: run `kvmsec node add` again, or take it out "
                f"with `kvmsec node remove {member.name} --force`"
            )
        else:
            await _take_back(master, certified, before)
        raise


async def _take_back(master: Master, member: Member, before: Member | None) -> None:
    await update(
        master.store,
        lambda now: without_member(now, member) if before is None else with_member(now, before),
    )


async def _unfit(master: Master, member: Member) -> list[str]:
    """What keeps a new node from starting instances under `pool`, for a person to mend."""
    pool = master.cluster().uid_pool
    if not pool:
        return []
    try:
        problems = await master.directory.node(member).check_pool(pool)
    except Fault as error:
        return [f"whether the pool's users are there could not be asked: {error}"]
    return [
        f"{member.name}: {one.message}" + (f" ({one.hint})" if one.hint else "") for one in problems
    ]
