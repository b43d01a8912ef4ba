"""The entry point: the group that all nouns hang from, and the border that every error meets."""

from __future__ import annotations

import sys
from importlib import import_module
from pathlib import Path
from typing import Any, Final

import click

from kvmsec.cli.failures import report, silence_stdout
from kvmsec.cli.params import PATH
from kvmsec.cli.session import Session

_NOUNS: Final = ("doctor", "config", "cluster", "uids", "firewall", "instance", "node", "audit")
"""Each is a module beside this one, and a command of the same name in it."""


class _Nouns(click.Group):
    """The nouns, each loaded when it is asked for; no error of theirs gets past this group."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(_NOUNS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in _NOUNS:
            return None
        command = getattr(import_module(f"kvmsec.cli.{cmd_name}"), cmd_name)
        assert isinstance(command, click.Command)
        return command

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except click.exceptions.Exit:
            raise
        except BaseException as error:
            is_debug = isinstance(ctx.obj, Session) and ctx.obj.is_debug
            raise click.exceptions.Exit(report(error, is_debug=is_debug)) from error

    def main(self, *args: Any, **extra: Any) -> Any:
        """Run the command line and exit with its status: 0 to 3, or 128 and a signal's number."""
        given = {"prog_name": "kvmsec"} | extra | {"standalone_mode": False}
        try:
            status = super().main(*args, **given)
        except (click.ClickException, click.Abort, OSError) as error:
            status = report(error, is_debug=False)
        sys.exit(status or 0)


@click.group(cls=_Nouns, context_settings={"help_option_names": ["-h", "--help"]})
@click.option(
    "--root",
    type=PATH,
    default="/",
    envvar="KVMSEC_ROOT",
    metavar="DIR",
    help="Keep all files below this directory (default: /; KVMSEC_ROOT).",
)
@click.option("--debug", is_flag=True, help="Show where an error comes from.")
@click.version_option(package_name="kvmsec", message="%(prog)s %(version)s")
@click.pass_context
def kvmsec(context: click.Context, root: Path, debug: bool) -> None:
    """KVM guests that do not trust each other, each under a uid of its own."""
    context.obj = Session(root, is_debug=debug)


def entry_point() -> None:
    """What the console script `kvmsec` calls."""
    for stream in (sys.stdout, sys.stderr):
        # What the terminal's encoding lacks is escaped rather than an error.
        stream.reconfigure(errors="backslashreplace")  # type: ignore[union-attr]
    try:
        kvmsec.main()
    finally:
        _let_go_of_stdout()


def _let_go_of_stdout() -> None:
    """Drop what could not be printed: Python would fail over it once more at its own end."""
    try:
        sys.stdout.flush()
    except OSError:
        silence_stdout()
