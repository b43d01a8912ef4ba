"""`kvmsec node`: the members of the cluster; the daemon's own verb is in `node.py`."""

from __future__ import annotations

import re
import sys
from typing import TYPE_CHECKING, Any, Final

import click

from kvmsec.cli.failures import FAILED, WrongUsage
from kvmsec.cli.output import (
    complain,
    print_facts,
    print_json,
    print_table,
    remark,
    say,
    shown_line,
    warn,
)
from kvmsec.cli.params import ENDPOINT, NODE_NAME, json_option
from kvmsec.cli.session import Session, pass_session

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Mapping
    from datetime import timedelta

    from kvmsec.cli.session import Node, Reach
    from kvmsec.cluster.members.master import Changed, Master
    from kvmsec.model.endpoints import Endpoint
    from kvmsec.rpc.messages import NodeInfo

_SPAN: Final = re.compile(r"([0-9]{1,6})([smhd])", re.ASCII)
_UNITS: Final = {"s": 1, "m": 60, "h": 3600, "d": 86400}

_UNKNOWN: Final = dict.fromkeys(("version", "revision", "confirmed_at", "answer"))
"""What a member says of itself: the same keys in JSON, whether it answers or not."""

_name_argument = click.argument("name", type=NODE_NAME)


def _span(_: click.Context, __: click.Parameter, text: str) -> timedelta:
    from datetime import timedelta

    found = _SPAN.fullmatch(text)
    if found is None:
        raise click.BadParameter(f"{text[:40]!a} is no time span such as 30m, 2h or 1d")
    return timedelta(seconds=int(found[1]) * _UNITS[found[2]])


# Joining -------------------------------------------------------------------------------------


@click.command
@_name_argument
@click.option(
    "--valid-for",
    "lifetime",
    default="1h",
    metavar="SPAN",
    callback=_span,
    help="How long the token is good (1h; at most 7d).",
)
@click.option("--readd", is_flag=True, help="For a member that has lost its files.")
@pass_session
def invite(session: Session, name: str, lifetime: timedelta, readd: bool) -> None:
    """Print a token with which the node NAME may join; on the master.

    Whoever has the token may become that node: carry it over a way that you trust. It is good
    once.
    """
    session.require_root()
    from kvmsec.cluster.members.inviting import invite_node
    from kvmsec.pki.files import KeyFiles
    from kvmsec.pki.invitations import Invitations
    from kvmsec.pki.joining import format_token

    invitation = invite_node(
        session.store,
        KeyFiles(session.paths.key_files),
        Invitations(session.paths.invitations),
        name,
        lifetime=lifetime,
        is_member_again=readd,
    )
    say(format_token(invitation))
    verb = "readd" if readd else "add"
    remark(f"it is good once, until {invitation.expires_at:%F %T} UTC")
    remark(f"on {name} run `kvmsec node join` and `kvmsec node serve`")
    remark(f"then run `kvmsec node {verb} {name}` here")


@click.command
@click.argument("token", required=False)
@pass_session
def join(session: Session, token: str | None) -> None:
    """Accept the invitation of TOKEN; on the node that is to join.

    Without TOKEN it is read from standard input, where no other user of this host can see it. A
    daemon that runs listens for the master when this returns.
    """
    given = token if token is not None else _read_token()

    async def accept(node: Node) -> str:
        from kvmsec.cluster.members.arriving import accept_token
        from kvmsec.daemon.reaching import have_taken_up
        from kvmsec.pki.files import KeyFiles
        from kvmsec.pki.invitations import Invitations

        await node.reconcile()
        invitation = accept_token(
            given,
            KeyFiles(session.paths.key_files),
            session.store,
            Invitations(session.paths.invitations),
        )
        await have_taken_up(node)
        return invitation.node_name

    name = session.run(accept)
    say(f"this node will join as {shown_line(name)}")
    say("next: `kvmsec node serve` here, unless it runs; then on the master what it has named:")
    say(f"`kvmsec node add {name}`, or `kvmsec node readd {name}` for a member")


def _read_token() -> str:
    if sys.stdin.isatty():
        return str(click.prompt("token", hide_input=True, err=True))
    return sys.stdin.readline(4096)


@click.command
@click.argument("endpoint", type=ENDPOINT, metavar="HOST[:PORT]")
@click.option("--name", type=NODE_NAME, help="Which of the invited nodes it is.")
@pass_session
def add(session: Session, endpoint: Endpoint, name: str | None) -> None:
    """Make a member of the invited node at HOST; on the master.

    Its name is that of its invitation. Interrupted, run it again.
    """

    async def act(master: Master) -> Changed:
        from kvmsec.cluster.members.joining import add as add_node

        return await add_node(master, endpoint.host, port=endpoint.port, name=name)

    _change(session, act, "is a member")


@click.command
@_name_argument
@pass_session
def readd(session: Session, name: str) -> None:
    """Give the member NAME its files and the state again; on the master."""

    async def act(master: Master) -> Changed:
        from kvmsec.cluster.members.joining import readd as readd_node

        return await readd_node(master, name)

    _change(session, act, "is up to date")


# Roles and leaving ---------------------------------------------------------------------------


@click.command
@_name_argument
@pass_session
def promote(session: Session, name: str) -> None:
    """Make a master candidate of NAME: it may order, and gets the cluster's key."""

    async def act(master: Master) -> Changed:
        from kvmsec.cluster.members.roles import promote as promote_node

        return await promote_node(master, name)

    _change(session, act, "is a master candidate")


@click.command
@_name_argument
@pass_session
def demote(session: Session, name: str) -> None:
    """Let NAME order no more, and take the cluster's key from it."""

    async def act(master: Master) -> Changed:
        from kvmsec.cluster.members.roles import demote as demote_node

        return await demote_node(master, name)

    _change(session, act, "is no master candidate")


@click.command
@_name_argument
@click.option("--force", is_flag=True, help="Even if it does not answer.")
@pass_session
def remove(session: Session, name: str, force: bool) -> None:
    """Take NAME out of the cluster; its instances must have been stopped."""

    async def act(master: Master) -> Changed:
        from kvmsec.cluster.members.leaving import remove as remove_node

        return await remove_node(master, name, force=force)

    _change(session, act, "is no member any more")


@click.command
@click.option("--yes", is_flag=True, help="Don't ask.")
@click.option("--force", is_flag=True, help="Even if the master still has it for a member.")
@pass_session
def leave(session: Session, yes: bool, force: bool) -> None:
    """Wipe this node's part in a cluster that has removed it, or is gone.

    For a member that has lost its files as well. On a sound one, use `kvmsec node remove` on the
    master instead.
    """
    session.require_root()
    question = "Forget the cluster, its certificates and its packet rules on this node?"
    if not yes and not sys.stdin.isatty():
        raise WrongUsage(
            "this asks before it acts, and nobody is at a terminal", hint="say --yes to mean it"
        )
    if not yes and not click.confirm(question, err=True):
        complain("nothing was changed")
        raise click.exceptions.Exit(FAILED)

    async def wipe(reach: Reach) -> None:
        from kvmsec.cluster.members.leaving import require_released
        from kvmsec.pki.files import KeyFiles

        await reach.here.reconcile()
        if not force:
            await require_released(session.store, reach, KeyFiles(session.paths.key_files))
        await reach.household.leave()

    session.run_reaching(wipe)
    say("this node belongs to no cluster")


def _change(session: Session, act: Callable[[Master], Awaitable[Changed]], what: str) -> None:
    """Change the members, and tell what came of it."""

    async def make(reach: Reach) -> Changed:
        from kvmsec.cli.certificates import require_none_pending
        from kvmsec.cluster.authority import KeyFilesAuthority, PkiInvitations
        from kvmsec.cluster.members.master import Master
        from kvmsec.pki.files import KeyFiles
        from kvmsec.pki.invitations import Invitations

        await reach.here.reconcile()
        master = Master(
            store=session.store,
            directory=reach,
            authority=KeyFilesAuthority(KeyFiles(session.paths.key_files)),
            invitations=PkiInvitations(Invitations(session.paths.invitations)),
            on_step=session.on_step,
            require_none_pending=lambda: require_none_pending(session),
        )
        return await act(master)

    changed = session.run_reaching(make)
    say(f"{shown_line(changed.member.name)} {what}")
    for note in changed.notes:
        remark(note)
    tell_behind(changed.behind)


def tell_behind(behind: Mapping[str, str]) -> None:
    """Name those that don't know of a change yet."""
    for name, reason in behind.items():
        warn(f"{name} does not know yet, and will be told when it answers: {reason}")


# Showing -------------------------------------------------------------------------------------


@click.command(name="list")
@json_option
@pass_session
def list_nodes(session: Session, as_json: bool) -> None:
    """The members, and whether they answer."""
    rows = session.run_reaching(lambda reach: _described(session, reach))
    if as_json:
        print_json(rows)
        return
    headings = ("name", "role", "address", "port", "version", "revision", "answer")
    print_table(headings, [tuple(row[heading] for heading in headings) for row in rows])


@click.command
@_name_argument
@json_option
@pass_session
def info(session: Session, name: str, as_json: bool) -> None:
    """All that is known of the member NAME."""
    session.require_root()
    from kvmsec.cluster.handing import require_cluster
    from kvmsec.cluster.members.master import require_member

    cluster, _ = require_cluster(session.store)
    wanted = require_member(cluster, name).name
    rows = session.run_reaching(lambda reach: _described(session, reach, only=wanted))
    (print_json if as_json else print_facts)(rows[0])


async def _described(
    session: Session, reach: Reach, *, only: str | None = None
) -> list[dict[str, Any]]:
    """Each member as the state has it, and what it says of itself."""
    from importlib.metadata import version

    from kvmsec.cluster.asking import ask_all
    from kvmsec.cluster.handing import require_cluster
    from kvmsec.cluster.operations import describe

    cluster, revision = require_cluster(session.store)
    identity = session.store.identity()
    own = identity.uuid if identity is not None else None
    wanted = [node for node in cluster.nodes if only in (None, node.name)]
    others = [reach.node(node) for node in wanted if node.uuid != own]
    answers = await ask_all(others, lambda node: node.household.info())
    rows = []
    for member in wanted:
        said = answers.answered.get(member.name)
        row = {**describe(member, cluster), **_UNKNOWN}
        if member.uuid == own:
            row |= {"version": version("kvmsec"), "revision": revision, "answer": "this node"}
        elif said is not None:
            row |= _said(said)
        else:
            refused = answers.refused.get(member.name)
            why = refused if refused is not None else answers.silent.get(member.name)
            row["answer"] = f"{'none' if refused is None else 'refused'}: {why}"
        rows.append(row)
    return rows


def _said(info: NodeInfo) -> dict[str, Any]:
    return {
        "version": info.version,
        "revision": info.revision,
        "confirmed_at": info.confirmed_at,
        "answer": "yes",
    }


COMMANDS: Final = (invite, join, add, readd, promote, demote, remove, leave, list_nodes, info)
"""The verbs of `kvmsec node` about members, for its group (`@click.group(commands=COMMANDS)`)."""
