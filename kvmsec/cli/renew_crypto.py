"""`kvmsec cluster renew-crypto`: new certificates, and no node cut off meanwhile."""

from __future__ import annotations

from typing import TYPE_CHECKING

import click

from kvmsec.cli.failures import FAILED, WrongUsage
from kvmsec.cli.output import print_json, remark, say, shown_line, warn
from kvmsec.cli.params import json_option
from kvmsec.cli.session import Session, pass_session

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from kvmsec.cli.session import Node
    from kvmsec.cluster.renewal.operations import Outcome, Step, Wish


@click.command("renew-crypto")
@click.option(
    "--new-cluster-certificate",
    "new_cluster",
    is_flag=True,
    help="A new server.pem and key, and with them new certificates of all nodes.",
)
@click.option("--new-node-certificates", "new_nodes", is_flag=True, help="A new client.pem each.")
@click.option("--node", "name", metavar="NAME", help="A new client.pem of this node alone.")
@click.option(
    "--key-kind",
    type=click.Choice(["ed25519", "p256", "rsa3072"]),
    help="The kind of the new keys (ed25519); rsa3072 for old peers.",
)
@click.option("--abort", is_flag=True, help="Take back what was begun, while that is possible.")
@click.option(
    "--forget-offline",
    "forget",
    is_flag=True,
    help="End what was begun without the nodes that don't answer; they need `node readd`.",
)
@click.option("--dry-run", is_flag=True, help="Say what would be done on each node; do nothing.")
@json_option
@pass_session
def renew_crypto(
    session: Session,
    new_cluster: bool,
    new_nodes: bool,
    name: str | None,
    key_kind: str | None,
    abort: bool,
    forget: bool,
    dry_run: bool,
    as_json: bool,
) -> None:
    """Renew certificates on all nodes; without an option, go on with what was interrupted.

    Old and new are both trusted until every node that answers was seen to show the new. A command
    that was killed is gone on with by this one, or taken back with --abort.
    """
    session.require_root()
    wish = _wish(new_cluster, new_nodes, name, key_kind)
    if sum((wish is not None, abort, forget)) > 1 or (dry_run and (abort or forget)):
        raise WrongUsage("one thing at a time: renew, --abort or --forget-offline")
    from kvmsec.cli.certificates import renewing
    from kvmsec.cluster.renewal import operations

    async def preview(here: Node) -> Sequence[Step]:
        async with renewing(session, here) as work:
            return await operations.preview(work, wish)

    async def act(here: Node) -> Outcome | None:
        async with renewing(session, here) as work:
            if abort:
                return await operations.abort(work)
            if forget:
                return await operations.forget_offline(work)
            if wish is None:
                return await operations.go_on(work)
            return await operations.renew(work, wish)

    if dry_run:
        _show_plan(session.run(preview), as_json=as_json)
    else:
        _show_outcome(session.run(act), as_json=as_json)


def _wish(
    new_cluster: bool, new_nodes: bool, name: str | None, key_kind: str | None
) -> Wish | None:
    from kvmsec.cluster.renewal.operations import Wish
    from kvmsec.pki.keys import KeyKind

    if new_cluster and name is not None:
        raise WrongUsage(
            "a new cluster certificate is for all nodes",
            hint="leave --node away, or renew that one node's certificate alone",
        )
    if not (new_cluster or new_nodes or name is not None):
        if key_kind is not None:
            raise WrongUsage("--key-kind is for something new: say what")
        return None
    return Wish(
        new_cluster_certificate=new_cluster,
        node=name,
        key_kind=KeyKind(key_kind or KeyKind.ED25519),
    )


def _show_plan(steps: Sequence[Step], *, as_json: bool) -> None:
    if as_json:
        print_json([{"node": one.node, "what": one.what, "problem": one.problem} for one in steps])
        return
    if not steps:
        say("no renewal is under way; nothing would be done")
    for one in steps:
        say(f"{shown_line(one.node)}: {one.what}")
        if one.problem is not None:
            say(f"  it would be left behind, and catch up later: {shown_line(one.problem)}")


def _show_outcome(outcome: Outcome | None, *, as_json: bool) -> None:
    if as_json:
        print_json(
            {
                "pending": outcome is not None and not outcome.is_at_its_end,
                "direction": None if outcome is None else outcome.direction.value,
                "behind": {} if outcome is None else dict(outcome.behind),
                "forgotten": [] if outcome is None else list(outcome.forgotten),
            }
        )
    elif outcome is None:
        say("no renewal is under way; nothing was done")
    else:
        _tell(outcome)
    if outcome is not None and not outcome.is_at_its_end:
        raise click.exceptions.Exit(FAILED)


def _listed(names: Iterable[str]) -> str:
    return ", ".join(map(shown_line, names))


def _tell(outcome: Outcome) -> None:
    back = outcome.direction.value == "back"
    ended = "everything is as it was before" if back else "the new certificates are in force"
    if outcome.is_at_its_end:
        say(ended)
    else:
        say(f"{ended}, but not on {_listed(outcome.behind)}: to catch up on answering again")
    for name, why in outcome.behind.items():
        warn(f"{name} is behind: {why}")
    if outcome.behind:
        remark("`kvmsec cluster renew-crypto` tries again; --forget-offline ends it without them")
    for name in outcome.forgotten:
        warn(f"{name} was forgotten: run `kvmsec node readd {name}` once it is back")
