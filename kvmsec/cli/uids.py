"""`kvmsec uids`: the pool's users on this node, and who holds which uid."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

import click

from kvmsec.cli.failures import WrongUsage
from kvmsec.cli.output import print_json, print_table, say, shown_line
from kvmsec.cli.params import POOL, WHOLE_NUMBER, json_option
from kvmsec.cli.session import Session, pass_session

if TYPE_CHECKING:
    from kvmsec.agent import UidState
    from kvmsec.cli.session import Node
    from uidpool.provision import Plan, Removal
    from uidpool.ranges import UidRanges

_KEYS: Final = ("uid", "user", "state", "instance", "root", "reason")
_COLUMNS: Final = ("uid", "user", "state", "instance", "reason")


@click.group
def uids() -> None:
    """The pool's users, and who holds which uid."""


@uids.command
@click.argument("pool", type=POOL)
@click.option("--remove", is_flag=True, help="Take back the users that this command made.")
@click.option("--dry-run", is_flag=True, help="Say what would be done.")
@click.option(
    "--format",
    "printed_as",
    type=click.Choice(["sysusers"]),
    help="Print the users as a file for /etc/sysusers.d instead of making them.",
)
@pass_session
def provision(
    session: Session, pool: UidRanges, remove: bool, dry_run: bool, printed_as: str | None
) -> None:
    """Make the users of POOL (such as 1000-5000,8000) on this node.

    Users that are there already are left alone, or refused if they are unfit for a pool.

    --remove refuses uids that an instance of any root of this host has, or that are in the pool of
    this root, of / or of a root that a held or resting uid is of. Other roots are not known.
    """
    from kvmsec.node import provisioning

    if not pool:  # such as an unset variable of a script
        raise WrongUsage("POOL names no uid", hint="write uids and ranges: 200000-200099,8000")
    if remove and printed_as:
        raise WrongUsage("--remove and --format can't go together")
    if remove:
        _take_back(session, pool, dry_run=dry_run)
        return
    if printed_as:
        say(provisioning.sysusers_file(session.paths, pool), is_complete=False)
        return
    if not dry_run:
        session.require_root()
    plan = provisioning.plan(session.paths, pool)
    if not dry_run:
        session.run(lambda node: provisioning.apply(plan))
    _tell_plan(plan, dry_run=dry_run)


def _take_back(session: Session, pool: UidRanges, *, dry_run: bool) -> None:
    from kvmsec.node import provisioning

    async def act(node: Node) -> Removal:
        if dry_run:
            return provisioning.plan_removal(session.paths, pool)
        # What an interrupted start holds would be in the way.
        await node.reconcile()
        return await provisioning.remove(session.paths, pool)

    removal = session.run(act)
    say(f"users {'to remove' if dry_run else 'removed'}: {_counted(removal.remove)}")
    if removal.kept:
        say(f"left alone, not as this command made them: {_counted(removal.kept)}")


def _tell_plan(plan: Plan, *, dry_run: bool) -> None:
    say(f"users {'to make' if dry_run else 'made'}: {_counted(plan.create)}")
    if plan.present:
        say(f"there already: {_counted(plan.present)}")


def _counted(uids: UidRanges) -> str:
    return shown_line(f"{uids} ({uids.size()})") if uids else "none"


@uids.command("list")
@click.option("--all", "with_free", is_flag=True, help="The free ones as well, 10,000 at most.")
@json_option
@pass_session
def list_uids(session: Session, with_free: bool, as_json: bool) -> None:
    """Who holds which uid here, what is quarantined and why."""
    states = session.run(lambda node: node.uid_states(with_free=with_free))
    if as_json:
        print_json([_document(state) for state in states])
        return
    own = str(session.paths.root)
    print_table(
        _COLUMNS,
        ((one.uid, one.user, one.state, _holder(one, own), one.reason) for one in states),
    )


def _document(state: UidState) -> dict[str, object]:
    return {key: getattr(state, key) for key in _KEYS}


def _holder(state: UidState, own: str) -> str | None:
    """The instance, and where it is from when that is another root than our own."""
    if state.root in (None, own):
        return state.instance
    return f"{state.instance or '-'} (of {state.root})"


@uids.command
@click.argument("uid", type=WHOLE_NUMBER)
@pass_session
def release(session: Session, uid: int) -> None:
    """Clean the quarantined UID, or say what still holds it."""
    state = session.run(lambda node: node.release_uid(uid))
    say(f"uid {uid} is {state.state}")
