"""`kvmsec firewall`: the packet rules that keep instances off the node's network."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import click

from kvmsec.cli.findings import conclude
from kvmsec.cli.output import print_facts, print_json, say, shown_line
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
    rules = session.run(lambda node: node.show_rules())
    (print_json if as_json else _tell)(dict(rules))


def _tell(rules: Mapping[str, Any]) -> None:
    if rules["backend"] is None:
        say("no packet rules of this root are in force")
        return
    print_facts({key: rules[key] for key in ("backend", "tag", "uids", "families")})
    by_family = ", ".join(f"{family} {count}" for family, count in rules["dropped"].items())
    say(f"dropped packets: {rules['dropped_packets']} ({by_family})")
    _tell_list("last drops", [_drop(one) for one in rules["last_drops"]], rules["last_drops_note"])
    _tell_list("rules", _indented(rules["rules"]), None)


def _tell_list(name: str, lines: Iterable[str], note: str | None) -> None:
    known = list(lines)
    say(f"{name}:" if known else f"{name}: {shown_line(note or 'none')}")
    for line in known:
        say(f"  {shown_line(line)}")


def _drop(one: Mapping[str, Any]) -> str:
    port = "" if one["port"] is None else f" port {one['port']}"
    test = ", kvmsec's own test" if one["is_canary"] else ""
    return (
        f"{one['at']} uid {one['uid']}: {one['protocol']} to {one['destination']}{port} "
        f"by {one['interface']}{test}"
    )


def _indented(rules: Iterable[str]) -> Iterator[str]:
    """A rule a line, those of a chain further in; legacy rules have no braces."""
    depth = 0
    for rule in rules:
        depth -= rule.startswith("}")
        yield "  " * depth + rule
        depth += rule.endswith("{")


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
    """Compare the rules with what they must be, and try them.

    A packet is sent that must be refused.
    """
    conclude(session.run(lambda node: node.verify_rules()), as_json=as_json)


@firewall.command
@click.option("--force", is_flag=True, help="Even while instances run under them.")
@pass_session
def remove(session: Session, force: bool) -> None:
    """Take the rules away; refused while instances run under them."""
    session.run(lambda node: node.remove_rules(force=force))
    say("the packet rules are gone")
