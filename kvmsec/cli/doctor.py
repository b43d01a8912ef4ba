"""`kvmsec doctor`: whether this host is ready."""

from __future__ import annotations

from typing import TYPE_CHECKING

import click

from kvmsec.cli.findings import conclude
from kvmsec.cli.params import json_option
from kvmsec.cli.session import Session, pass_session

if TYPE_CHECKING:
    from kvmsec.agent import Finding
    from kvmsec.cli.session import Node


@click.command
@json_option
@pass_session
def doctor(session: Session, as_json: bool) -> None:
    """Is this host ready? Each check with its fix."""

    async def ask(node: Node) -> tuple[Finding, ...]:
        from kvmsec.rpc.remote import RemoteAgent

        if isinstance(node, RemoteAgent):
            return await node.doctor()  # the daemon adds what it needs itself
        from kvmsec.daemon.doctor import doctor
        from kvmsec.node.host import Host

        return await doctor(node, Host(session.paths))

    conclude(session.run(ask), as_json=as_json)
