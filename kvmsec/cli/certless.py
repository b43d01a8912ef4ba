"""`kvmsec cluster certless`, `kvmsec node certless`: for a while without client certificates."""

from __future__ import annotations

import re
import sys
from typing import TYPE_CHECKING, Any, Final

import click

from kvmsec.cli.failures import FAILED, WrongUsage
from kvmsec.cli.output import print_facts, print_json, remark, say, shown_line, warn
from kvmsec.cli.params import PATH, json_option
from kvmsec.cli.session import Session, pass_session

if TYPE_CHECKING:
    from collections.abc import Callable
    from datetime import timedelta
    from pathlib import Path
    from uuid import UUID

    from kvmsec.cli.session import Node
    from kvmsec.cluster.certless import Handed

_SPAN: Final = re.compile(r"([0-9]{1,4})([mh])", re.ASCII)
_END: Final = "`kvmsec cluster certless disable` ends it"
_CARRY: Final = (
    "`kvmsec cluster certless enable --for SPAN --bundle FILE` on the master writes it; carry it "
    "over, and name it here"
)
_BUNDLE_LIMIT_BYTES: Final = 1 << 20


def _span(_: click.Context, __: click.Parameter, text: str) -> timedelta:
    from datetime import timedelta

    found = _SPAN.fullmatch(text)
    if found is None:
        raise click.BadParameter(f"{text[:40]!a} is no time span such as 30m or 2h")
    return timedelta(minutes=int(found[1]) * (60 if found[2] == "h" else 1))


@click.group("certless")
def cluster_certless() -> None:
    """The last resort: for a while, run without client certificates."""


@cluster_certless.command
@click.option(
    "--for",
    "lasts",
    required=True,
    metavar="SPAN",
    callback=_span,
    help="How long: 10m to 24h. It ends by itself.",
)
@click.option(
    "--bundle",
    type=PATH,
    metavar="FILE",
    help="Write it, sealed, to be carried to nodes that can't be reached.",
)
@pass_session
def enable(session: Session, lasts: timedelta, bundle: Path | None) -> None:
    """Hand a common, short-lived certificate to every node that can be reached; on the master.

    While it lasts, every node that holds it may order on every other that does.
    """
    session.require_root()
    from kvmsec.cli.certificates import certificate_nodes, now, own_uuid
    from kvmsec.cluster import certless

    passphrase = None if bundle is None else _new_passphrase()

    async def hand_out(here: Node) -> Handed:
        async with certificate_nodes(session, here) as nodes:
            return await certless.enable(
                session.store,
                nodes,
                own_uuid(session),
                lasts,
                now=now(),
                log=_log(session),
                passphrase=passphrase,
            )

    handed = session.run(hand_out)
    if bundle is not None and handed.bundle is not None:
        from kvmsec.linux.files import write_atomically

        write_atomically(bundle, handed.bundle)
        say(f"carry {shown_line(str(bundle))} to each node without it, and run there:")
        say(f"kvmsec node certless {shown_line(bundle.name)}")
    until = "" if handed.until is None else f" until {handed.until.isoformat()}"
    say(f"{_running(handed)} without client certificates{until}")
    remark(_END)
    _name_missed(handed, "does not have it")


@cluster_certless.command
@pass_session
def disable(session: Session) -> None:
    """End it before its time; on the master."""
    session.require_root()
    from kvmsec.cli.certificates import certificate_nodes, own_uuid
    from kvmsec.cluster import certless

    async def end(here: Node) -> Handed:
        async with certificate_nodes(session, here) as nodes:
            return await certless.disable(
                session.store, nodes, own_uuid(session), log=_log(session)
            )

    handed = session.run(end)
    say(f"{_running(handed)} with client certificates again")
    _name_missed(handed, "keeps it until its end")


def _running(handed: Handed) -> str:
    return "1 node runs" if len(handed.done) == 1 else f"{len(handed.done)} nodes run"


@cluster_certless.command
@json_option
@pass_session
def show(session: Session, as_json: bool) -> None:
    """Whether this node runs without client certificates, and until when."""
    session.require_root()
    from kvmsec.cli.certificates import key_files, now
    from kvmsec.pki.certificates import facts_of

    common = key_files(session).certless(now())
    facts: dict[str, Any] = {"certless": common is not None, "fingerprint": None, "until": None}
    if common is not None:
        found = facts_of(common.certificate_pem)
        facts |= {"fingerprint": found.fingerprint, "until": found.not_after.isoformat()}
    (print_json if as_json else print_facts)(facts)
    if common is not None and not as_json:
        remark(_END)


@click.command("certless")
@click.argument("file", type=PATH)
@pass_session
def node_certless(session: Session, file: Path) -> None:
    """Install the certificate of the last resort from FILE, as the master has sealed it.

    The passphrase is asked for, or read from standard input. No daemon is needed; one that runs
    has taken it up when this returns.
    """
    session.require_root()
    from kvmsec.cli.certificates import key_files, now
    from kvmsec.cluster.certless import CERTLESS_FILE, open_bundle
    from kvmsec.linux.files import read_bounded
    from kvmsec.pki.certificates import facts_of
    from kvmsec.pki.errors import SealBroken

    try:
        sealed = read_bounded(file, _BUNDLE_LIMIT_BYTES)
    except ValueError as error:
        raise WrongUsage(str(error)) from None
    except OSError as error:
        raise SealBroken(f"{file}: {error.strerror}", hint=_CARRY) from error
    pair = open_bundle(sealed, _passphrase(), cluster=_known_cluster(session), now=now())
    session.paths.make_directories()
    key_files(session).put("certless.pem", pair.pem)
    facts = facts_of(pair.certificate_pem)
    _log(session)(f"{CERTLESS_FILE} ({facts.fingerprint}) was installed by hand")
    _have_it_taken_up(session)
    say(f"this node runs without client certificates until {facts.not_after.isoformat()}")


def _have_it_taken_up(session: Session) -> None:
    """By the daemon, if there is one, whose troubles must not keep the last resort out."""
    from kvmsec.cli.certificates import means
    from kvmsec.linux.errors import Fault

    try:
        session.run(lambda here: means(session, here).after_change())
    except Fault as error:
        warn(f"this node's daemon may need some seconds to take it up: {error.message}")


def _known_cluster(session: Session) -> UUID | None:
    """This node's cluster; a state that can't be read must not keep the last resort out."""
    from kvmsec.errors import StoreError

    try:
        cluster, _ = session.store.load()
    except StoreError:
        return None
    return None if cluster is None else cluster.uuid


def _new_passphrase() -> str:
    """Typed twice, or made here and shown once; never an argument, never a variable."""
    from kvmsec.pki.sealing import SHORTEST_PASSPHRASE, make_passphrase

    typed = ""
    if sys.stdin.isatty():
        typed = click.prompt(
            "Passphrase for the file (empty: make one)",
            default="",
            show_default=False,
            hide_input=True,
            confirmation_prompt=True,
            err=True,
        )
    if not typed:
        typed = make_passphrase()
        click.echo(f"passphrase, shown this once: {typed}", err=True)
    if len(typed) < SHORTEST_PASSPHRASE:
        raise WrongUsage(f"a passphrase has at least {SHORTEST_PASSPHRASE} characters")
    return typed


def _passphrase() -> str:
    if sys.stdin.isatty():
        return str(click.prompt("Passphrase of the file", hide_input=True, err=True))
    return sys.stdin.readline(1024).strip()


def _name_missed(handed: Handed, what: str) -> None:
    for name, why in handed.missed.items():
        warn(f"{name} {what}: {why}")
    if handed.missed:
        raise click.exceptions.Exit(FAILED)


def _log(session: Session) -> Callable[[str], None]:
    from kvmsec.node.journal import note

    path = session.paths.log / "cluster.log"
    return lambda line: note(path, line)
