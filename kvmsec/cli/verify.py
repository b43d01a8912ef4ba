"""`kvmsec cluster verify`: what is wrong with the cluster, and what mends it."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

import click

from kvmsec.cli.failures import CHECK_FOUND_ERRORS, WrongUsage
from kvmsec.cli.findings import conclude_for_nodes
from kvmsec.cli.output import say, shown_line, warn
from kvmsec.cli.params import json_option
from kvmsec.cli.session import Session, pass_session

if TYPE_CHECKING:
    from kvmsec.agent import Finding
    from kvmsec.cli.session import Reach


@click.command
@json_option
@click.option("--error-codes", is_flag=True, help="A line each, its code first; for scripts.")
@click.option(
    "--ignore-errors",
    "ignored",
    multiple=True,
    metavar="CODE",
    help="Errors of this code count as warnings; may be repeated.",
)
@pass_session
def verify(session: Session, as_json: bool, error_codes: bool, ignored: tuple[str, ...]) -> None:
    """Ask every member about itself, and hold the answers against each other.

    Ends with status 3 when a finding is an error; docs/verify.md has the codes.
    """
    from kvmsec.cluster.verify import examining
    from kvmsec.cluster.verify.codes import CODES

    if as_json and error_codes:
        raise WrongUsage("--json and --error-codes can't go together")
    if unknown := sorted(set(ignored) - CODES):
        raise WrongUsage(f"there is no code {unknown[0]}", hint=f"there are {_listed(CODES)}")
    session.require_root()

    async def ask(reach: Reach) -> tuple[Finding, ...]:
        with _progress(len(session.members)) as heard:
            return await examining.verify(
                session.store,
                reach,
                reach.household,
                copy_valid_s=session.copy_valid_s,
                awaited=_awaited(session),
                on_heard=heard,
            )

    findings = examining.without_ignored(session.run_reaching(ask), ignored)
    if error_codes:
        _print_lines(findings)
    else:
        conclude_for_nodes(findings, as_json=as_json)


def _awaited(session: Session) -> tuple[str, ...]:
    """Whom a renewal waits for; a journal that can't be read must not keep the rest from sight."""
    if not session.paths.renewal.exists():
        return ()
    from kvmsec.cli.certificates import means
    from kvmsec.cluster.renewal.errors import BadJournal
    from kvmsec.cluster.renewal.operations import awaited
    from kvmsec.pki.errors import PkiError

    try:
        return awaited(means(session, None).work())
    except (BadJournal, PkiError) as error:
        warn(error.message)
        return ()


def _print_lines(findings: tuple[Finding, ...]) -> None:
    for one in findings:
        item, message = shown_line(one.item), shown_line(one.message)
        say(f"{one.code} {one.severity} {one.node} {item}: {message}")
    if any(one.severity == "error" for one in findings):
        raise click.exceptions.Exit(CHECK_FOUND_ERRORS)


@contextmanager
def _progress(total: int) -> Iterator[Callable[[str], None]]:
    """A bar on stderr while nodes answer, where a person looks."""
    if not sys.stderr.isatty():
        yield lambda name: None
        return
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn())
    # Without its thread: a process that may fork has one only.
    bar = Progress(*columns, console=Console(stderr=True), transient=True, auto_refresh=False)
    task = bar.add_task("asking the nodes", total=total)
    bar.start()

    def heard(_: str) -> None:
        bar.advance(task)
        bar.refresh()

    try:
        yield heard
    finally:
        bar.stop()


def _listed(codes: frozenset[str]) -> str:
    return ", ".join(sorted(codes))
