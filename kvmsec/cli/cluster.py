"""`kvmsec cluster`: the cluster that this node belongs to, and its uid pool."""

from __future__ import annotations

import re
import sys
from typing import TYPE_CHECKING, Final

import click

from kvmsec.cli.certless import cluster_certless
from kvmsec.cli.failures import FAILED, WrongUsage
from kvmsec.cli.members import tell_behind
from kvmsec.cli.output import complain, print_facts, print_json, print_table, say, shown_line, warn
from kvmsec.cli.params import CLUSTER_NAME, ENDPOINT, POOL, SECURITY_MODEL, json_option
from kvmsec.cli.renew_crypto import renew_crypto
from kvmsec.cli.session import Session, pass_session
from kvmsec.cli.verify import verify

if TYPE_CHECKING:
    from collections.abc import Mapping

    from kvmsec.cli.session import Node, Reach
    from kvmsec.cluster.members.takeover import Taken
    from kvmsec.cluster.operations import Done
    from kvmsec.errors import PoolRefused
    from kvmsec.model.cluster import Cluster
    from kvmsec.model.endpoints import Endpoint
    from kvmsec.model.security import SecurityModel
    from uidpool.ranges import UidRanges

_UIDS: Final = re.compile(r"uids? (?P<uids>[0-9,…-]+):? (?P<reason>.*)", re.DOTALL)

_pool_option = click.option(
    "--uid-pool", type=POOL, metavar="POOL", help="The uids of the instances: 1000-5000,8000."
)
_model_option = click.option(
    "--security-model",
    type=SECURITY_MODEL,
    help="What an instance runs under that asks for no model of its own.",
)


@click.group(commands=(verify, renew_crypto, cluster_certless))
def cluster() -> None:
    """The cluster: its uid pool, its security model, and whether all is well with it."""


@cluster.command
@click.option("--name", type=CLUSTER_NAME, required=True, help="What the cluster is called.")
@_pool_option
@_model_option
@click.option(
    "--address",
    "endpoint",
    type=ENDPOINT,
    metavar="HOST[:PORT]",
    help="Where other nodes will reach this one; its name and port 1811 unless told.",
)
@click.option(
    "--key-kind",
    type=click.Choice(["ed25519", "p256", "rsa3072"]),
    default="ed25519",
    help="What kind of keys the certificates have; rsa3072 is for old peers.",
)
@pass_session
def init(
    session: Session,
    name: str,
    uid_pool: UidRanges | None,
    security_model: str | None,
    endpoint: Endpoint | None,
    key_kind: str,
) -> None:
    """Make a cluster of this node, its master."""
    from kvmsec.cluster import operations
    from kvmsec.model.addresses import PORT
    from uidpool.ranges import EMPTY

    async def make(node: Node) -> Cluster:
        from kvmsec.cluster.authority import KeyFilesFounding
        from kvmsec.pki.files import KeyFiles
        from kvmsec.pki.keys import KeyKind

        await node.reconcile()
        return await operations.init(
            session.store,
            node,
            name,
            uid_pool=EMPTY if uid_pool is None else uid_pool,
            security_model=_model(security_model),
            address=None if endpoint is None else endpoint.host,
            port=PORT if endpoint is None else endpoint.port,
            founding=KeyFilesFounding(KeyFiles(session.paths.key_files), KeyKind(key_kind)),
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
    """Change the uid pool or the security model, on all nodes or on none."""
    if (uid_pool, add_uids, remove_uids, security_model) == (None, None, None, None):
        raise WrongUsage("nothing to change was named")
    from kvmsec.cluster import operations
    from kvmsec.cluster.changes import Change
    from kvmsec.errors import PoolRefused
    from uidpool.ranges import EMPTY

    change = Change(
        uid_pool=uid_pool,
        add=EMPTY if add_uids is None else add_uids,
        remove=EMPTY if remove_uids is None else remove_uids,
        drain=drain,
        security_model=_model(security_model),
    )

    async def make(reach: Reach) -> Done:
        await reach.here.reconcile()
        return await operations.modify(session.store, reach, change, on_step=session.on_step)

    try:
        done = session.run_reaching(make)
    except PoolRefused as refused:
        if len(session.members) < 2:
            raise
        _print_refusal(refused)
        raise click.exceptions.Exit(FAILED) from refused
    _tell(done.cluster)
    for node, reason in done.silent.items():
        warn(f"{node} did not answer, and takes the change up when it does: {reason}")


def _print_refusal(refused: PoolRefused) -> None:
    """The table of node, uids and reason."""
    rows = [
        (node, *_uids_and_reason(problem))
        for node, problems in refused.by_node.items()
        for problem in problems
    ]
    print_table(("node", "uids", "reason"), rows)
    nodes = ", ".join(refused.by_node)
    complain(f"the uid pool is refused by {nodes}; nothing has changed", refused.hint)


def _uids_and_reason(problem: str) -> tuple[str | None, str]:
    found = _UIDS.match(problem)
    return (found["uids"], found["reason"]) if found else (None, problem)


@cluster.command
@pass_session
def sync(session: Session) -> None:
    """Hand the state to every node that answers; on the master.

    Nodes that a renewal of certificates still waits for catch up with it first.
    """

    async def act(reach: Reach) -> Mapping[str, str]:
        from kvmsec.cluster.handing import require_cluster
        from kvmsec.cluster.team import require_master
        from kvmsec.cluster.upkeep import sync as sync_nodes

        await reach.here.reconcile()
        require_master(session.store, require_cluster(session.store)[0])
        await _catch_up_certificates(session, reach)
        return await sync_nodes(session.store, reach)

    behind = session.run_reaching(act)
    tell_behind(behind)
    if behind:
        raise click.exceptions.Exit(FAILED)
    say("every node has the state")


async def _catch_up_certificates(session: Session, reach: Reach) -> None:
    if not session.paths.renewal.exists():
        return
    from kvmsec.cli.certificates import renewing
    from kvmsec.cluster.renewal.operations import catch_up_certificates

    async with renewing(session, reach.here) as work:
        outcome = await catch_up_certificates(work)
    for name, why in ({} if outcome is None else outcome.behind).items():
        warn(f"{name} has not got its new certificate yet: {why}")


@cluster.command
@click.option("--force", is_flag=True, help="Even if the master answers.")
@pass_session
def master_failover(session: Session, force: bool) -> None:
    """Make this master candidate the master, when the old one is gone.

    The newest copy of the state among the candidates that answer is what the cluster goes on from:
    a change that reached none of them is lost. Make sure that the old master is off: there is no
    quorum that would keep two from deciding at once.
    """

    async def act(reach: Reach) -> Taken:
        from kvmsec.cluster.members.takeover import take_over

        await reach.here.reconcile()
        return await take_over(session.store, reach, force=force, on_step=session.on_step)

    taken = session.run_reaching(act)
    say(
        f"{taken.cluster.master_member.name} is the master; the state goes on from revision "
        f"{taken.copied}, the copy of {taken.source}"
    )
    for name, reason in taken.unheard.items():
        warn(f"the candidate {name} did not say what it has; what only it knew is lost: {reason}")
    tell_behind(taken.behind)
    _tell_left_over(session)


def _tell_left_over(session: Session) -> None:
    """Of a renewal that the old master had begun: nobody but this one can end it now."""
    from kvmsec.cli.certificates import require_none_pending
    from kvmsec.cluster.renewal.errors import RenewalPending
    from kvmsec.pki.errors import PkiError

    try:
        require_none_pending(session)
    except RenewalPending:
        warn("a renewal of certificates was left over: end it by `kvmsec cluster renew-crypto`")
    except PkiError as error:
        warn(error.message)


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

    async def end(reach: Reach) -> None:
        from kvmsec.daemon.reaching import have_taken_up
        from kvmsec.pki.files import KeyFiles

        await reach.here.reconcile()
        await operations.destroy(session.store, reach.here)
        KeyFiles(session.paths.key_files).remove_all()
        await have_taken_up(reach.here)

    session.run_reaching(end)
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
