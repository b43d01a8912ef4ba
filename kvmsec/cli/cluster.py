"""`kvmsec cluster`: the cluster that this node belongs to, and its uid pool."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING

import click

from kvmsec.cli.failures import FAILED, WrongUsage
from kvmsec.cli.output import complain, print_facts, print_json, say, shown_line
from kvmsec.cli.params import CLUSTER_NAME, POOL, SECURITY_MODEL, json_option
from kvmsec.cli.session import Session, pass_session

if TYPE_CHECKING:
    from kvmsec.cli.session import Node
    from kvmsec.model.cluster import Cluster
    from kvmsec.model.security import SecurityModel
    from uidpool.ranges import UidRanges

_pool_option = click.option(
    "--uid-pool", type=POOL, metavar="POOL", help="The uids of the instances: 1000-5000,8000."
)
_model_option = click.option(
    "--security-model",
    type=SECURITY_MODEL,
    help="What an instance runs under that asks for no model of its own.",
)


@click.group
def cluster() -> None:
    """The cluster: its uid pool and its security model."""


@cluster.command
@click.option("--name", type=CLUSTER_NAME, required=True, help="What the cluster is called.")
@_pool_option
@_model_option
@pass_session
def init(
    session: Session, name: str, uid_pool: UidRanges | None, security_model: str | None
) -> None:
    """Make a cluster of this node."""
    from kvmsec.cluster import operations
    from uidpool.ranges import EMPTY

    async def make(node: Node) -> Cluster:
        await node.reconcile()
        return await operations.init(
            session.store,
            node,
            name,
            uid_pool=EMPTY if uid_pool is None else uid_pool,
            security_model=_model(security_model),
        )

    _tell(session.run(make))


@cluster.command
@_pool_option
@click.option("--add-uids", type=POOL, metavar="POOL", help="Uids that join the pool.")
@click.option("--remove-uids", type=POOL, metavar="POOL", help="Uids that leave the pool.")
@click.option("--drain", is_flag=True, help="Uids in use leave once they are free.")
@_model_option
@pass_session
def modify(
    session: Session,
    uid_pool: UidRanges | None,
    add_uids: UidRanges | None,
    remove_uids: UidRanges | None,
    drain: bool,
    security_model: str | None,
) -> None:
    """Change the uid pool or the security model."""
    if (uid_pool, add_uids, remove_uids, security_model) == (None, None, None, None):
        raise WrongUsage("nothing to change was named")
    from kvmsec.cluster import operations
    from kvmsec.cluster.changes import Change
    from kvmsec.cluster.nodes import Alone
    from uidpool.ranges import EMPTY

    change = Change(
        uid_pool=uid_pool,
        add=EMPTY if add_uids is None else add_uids,
        remove=EMPTY if remove_uids is None else remove_uids,
        drain=drain,
        security_model=_model(security_model),
    )

    async def make(node: Node) -> Cluster:
        await node.reconcile()
        return (await operations.modify(session.store, Alone(node), change)).cluster

    _tell(session.run(make))


@cluster.command
@json_option
@pass_session
def info(session: Session, as_json: bool) -> None:
    """What the cluster is."""
    session.require_root()
    from kvmsec.cluster import operations

    facts = operations.info(session.store)
    (print_json if as_json else print_facts)(facts)


@cluster.command
@click.option("--yes", is_flag=True, help="Don't ask.")
@pass_session
def destroy(session: Session, yes: bool) -> None:
    """Forget the cluster; instances must have been stopped."""
    session.require_root()
    from kvmsec.cluster import operations

    name = operations.info(session.store)["name"]
    if not yes and not _is_sure(f"Forget the cluster {name}, its pool and its packet rules?"):
        complain("nothing was changed")
        raise click.exceptions.Exit(FAILED)

    async def end(node: Node) -> None:
        await node.reconcile()
        await operations.destroy(session.store, node)

    session.run(end)
    say(f"the cluster {shown_line(str(name))} is no more")


def _is_sure(question: str) -> bool:
    if not sys.stdin.isatty():
        raise WrongUsage(
            "this asks before it acts, and nobody is at a terminal", hint="say --yes to mean it"
        )
    return click.confirm(question, err=True)


def _model(name: str | None) -> SecurityModel | None:
    from kvmsec.model.security import SecurityModel

    return None if name is None else SecurityModel(name)


def _tell(made: Cluster) -> None:
    """Say what the cluster is now."""
    pool = f"{made.uid_pool} ({made.uid_pool.size()} uids)" if made.uid_pool else "empty"
    say(
        f"cluster {shown_line(made.name)}: security model {made.default_model.value}, "
        f"uid pool {shown_line(pool)}"
    )
    if made.draining:
        say(f"leaving once they are free: {shown_line(str(made.draining))}")
