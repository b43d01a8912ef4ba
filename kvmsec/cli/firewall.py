"""`kvmsec firewall`: the packet rules that keep instances off the node's network."""

from __future__ import annotations

import click

from kvmsec.cli.findings import conclude
from kvmsec.cli.output import print_facts, print_json, say
from kvmsec.cli.params import json_option
from kvmsec.cli.session import Session, pass_session


@click.group
def firewall() -> None:
    """What instances can't send, and the proof."""


@firewall.command
@json_option
@pass_session
def show(session: Session, as_json: bool) -> None:
    """The rules, their counters and the last packets that were refused."""
    facts = session.run(lambda node: node.show_rules())
    (print_json if as_json else print_facts)(dict(facts))


@firewall.command
@pass_session
def apply(session: Session) -> None:
    """Put the rules in place, whatever is there now."""
    session.run(lambda node: node.apply_rules())
    say("the packet rules are in place")


@firewall.command
@json_option
@pass_session
def verify(session: Session, as_json: bool) -> None:
    """Compare the rules with what they must be, and send a packet that must be refused."""
    conclude(session.run(lambda node: node.verify_rules()), as_json=as_json)


@firewall.command
@click.option("--force", is_flag=True, help="Even while instances run under them.")
@pass_session
def remove(session: Session, force: bool) -> None:
    """Take the rules away."""
    session.run(lambda node: node.remove_rules(force=force))
    say("the packet rules are gone")
