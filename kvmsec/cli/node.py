"""`kvmsec node`: this node's daemon, and the members of its cluster."""

from __future__ import annotations

import click

from kvmsec.cli.certless import node_certless
from kvmsec.cli.members import COMMANDS
from kvmsec.cli.output import shown_text
from kvmsec.cli.params import BIND
from kvmsec.cli.session import Session, pass_session


@click.group(commands=(*COMMANDS, node_certless))
def node() -> None:
    """This node's daemon, and the nodes of its cluster."""


@node.command
@click.option(
    "--bind",
    "binds",
    type=BIND,
    multiple=True,
    metavar="ADDRESS[:PORT]",
    help="Listen for other nodes here (port 1811); may be repeated. Every address unless told.",
)
@pass_session
def serve(session: Session, binds: tuple[str, ...]) -> None:
    """Serve this node until SIGTERM: to other nodes, and to the commands on this host.

    Instances live on when it ends. SIGHUP reads kvmsec.toml again.
    """
    session.require_root()
    import asyncio

    from kvmsec.daemon.serving import serve as serve_node

    def tell(line: str) -> None:
        click.echo(f"kvmsec: {shown_text(line)}", err=True)

    asyncio.run(serve_node(session.root, binds, tell))
