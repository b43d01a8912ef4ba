"""`kvmsec config`: the node's own settings."""

from __future__ import annotations

import click

from kvmsec.cli.output import print_json, print_table, say, shown_line
from kvmsec.cli.params import json_option
from kvmsec.cli.session import Session, pass_session


@click.group
def config() -> None:
    """This node's settings, kvmsec.toml."""


@config.command
@json_option
@pass_session
def show(session: Session, as_json: bool) -> None:
    """Every setting in effect, and where it comes from."""
    import json

    from kvmsec.config import show_config

    settings = show_config(session.paths.config)
    if as_json:
        keys = ("key", "value", "origin")
        print_json([{key: getattr(setting, key) for key in keys} for setting in settings])
        return
    rows = [(setting.key, json.dumps(setting.value), setting.origin) for setting in settings]
    print_table(("setting", "value", "from"), rows)


@config.command
@pass_session
def check(session: Session) -> None:
    """Is the file right? Every fault of it otherwise."""
    from kvmsec.config import load_config

    path = session.paths.config
    load_config(path)
    what = "is right" if path.exists() else "is not there: every setting has its default"
    say(f"{shown_line(str(path))} {what}")
