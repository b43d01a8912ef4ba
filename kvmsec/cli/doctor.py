"""`kvmsec doctor`: whether this host is ready."""

from __future__ import annotations

import click

from kvmsec.cli.findings import conclude
from kvmsec.cli.params import json_option
from kvmsec.cli.session import Session, pass_session


@click.command
@json_option
@pass_session
def doctor(session: Session, as_json: bool) -> None:
    """Is this host ready? Each check with its fix."""
    conclude(session.run(lambda node: node.doctor()), as_json=as_json)
