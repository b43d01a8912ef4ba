"""What a person or a machine reads on stdout, and what is said on stderr.

Everything is escaped on its way out, whoever wrote it: no name, path or guest's word can steer a
terminal or forge a line.
"""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Any, Final

import click

from hypervisor.foreign_text import escaped

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping, Sequence
    from datetime import datetime

    from kvmsec.agent import Finding

_LINE_LIMIT: Final = 8192
_NOTHING: Final = "-"
_LIST_CHARS: Final = 100
_MOST_WIDE: Final = 40
"""Of a column that is filled up for all: one long item of a node makes no page of blanks."""
_STYLES: Final = {"ok": "green", "warning": "yellow", "error": "red"}


class ReaderGone(Exception):
    """Nobody reads what we print any more (`kvmsec … | head`)."""


def say(text: str = "", *, is_complete: bool = True) -> None:
    """Print text that is fit to be shown; without `is_complete` the line goes on.

    Raises ReaderGone, and OSError that names the standard output.
    """
    try:
        click.echo(text, nl=is_complete)
    except BrokenPipeError:
        raise ReaderGone from None
    except OSError as error:
        raise OSError(error.errno, error.strerror, "the standard output") from error


def complain(message: str, hint: str | None = None) -> None:
    """An error as every command reports it: `kvmsec: …`, and `hint: …` where there is one."""
    click.echo(f"kvmsec: {shown_text(message)}", err=True)
    if hint:
        click.echo(f"hint: {shown_text(hint)}", err=True)


def remark(note: str) -> None:
    """One more thing to know of the error that was just complained about: `note: …`."""
    click.echo(f"note: {shown_text(note)}", err=True)


def warn(message: str) -> None:
    """Something that a person should know although the command did what it was told."""
    complain(f"warning: {message}")


def shown_line(text: str | bytes) -> str:
    """Foreign text on one line, escaped."""
    return escaped(text, limit_chars=_LINE_LIMIT)


def shown_text(text: str) -> str:
    """Foreign text of several lines: each escaped, those after the first one indented.

    So no line but the first can pass for one of ours.
    """
    first, *others = text.split("\n")
    indented = (line if line.startswith(" ") else f"  {line}" for line in others)
    return "\n".join(map(shown_line, (first, *indented)))


# Machines ------------------------------------------------------------------------------------


def print_json(value: object) -> None:
    """One document; escapes are JSON's own (ASCII only), so that it is safe to look at, too."""
    import json

    say(json.dumps(value, indent=2, default=_plain))


def _plain(value: Any) -> object:
    """What JSON lacks: times in ISO 8601 and UTC, everything else as its text."""
    from datetime import datetime
    from enum import Enum

    if isinstance(value, datetime):
        return _in_utc(value).isoformat()
    if isinstance(value, Enum):
        return value.value
    if isinstance(value, bytes):
        return value.decode(errors="backslashreplace")
    return str(value)


def _in_utc(time: datetime) -> datetime:
    from datetime import UTC

    try:
        return time.astimezone(UTC)
    except OverflowError:  # Another node's word for a time at the end of all years.
        return time


def print_findings_json(findings: Iterable[Finding]) -> None:
    keys = ("code", "severity", "node", "item", "message", "hint")
    print_json([{key: getattr(finding, key) for key in keys} for finding in findings])


# People --------------------------------------------------------------------------------------


def print_table(headings: Sequence[str], rows: Iterable[Sequence[object]]) -> None:
    """A table: drawn where a person's terminal is, plain aligned columns anywhere else."""
    cells = [[_cell(value) for value in row] for row in rows]
    if sys.stdout.isatty():
        _draw_table(headings, cells)
        return
    lines = [[heading.upper() for heading in headings], *cells]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    for line in lines:
        padded = (cell.ljust(width) for cell, width in zip(line, widths, strict=True))
        say("  ".join(padded).rstrip())


def _draw_table(headings: Sequence[str], rows: Iterable[Sequence[str]]) -> None:
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    # No lines: nine columns must fit into eighty characters.
    table = Table(*headings, box=None, pad_edge=False, padding=(0, 2, 0, 0))
    for row in rows:
        # As Text: brackets in a name are no markup.
        table.add_row(*(Text(cell, overflow="fold") for cell in row))
    console = Console(highlight=False)
    with console.capture() as drawn:
        console.print(table)
    say(drawn.get(), is_complete=False)


def _cell(value: object) -> str:
    return _NOTHING if value is None or value == "" else shown_line(str(value))


def print_facts(facts: Mapping[str, object]) -> None:
    """A line for each fact that is known, `name: value`; tables in it go a level deeper.

    A long list comes below its name, an element a line.
    """
    lines = list(_lines_of(facts, ""))
    width = max((len(name) for name, _ in lines), default=0) + 1
    for name, values in lines:
        if len(values) == 1:
            say(f"{name + ':':<{width}} {values[0]}")
        else:
            say("\n  ".join((f"{name}:", *values)))


def _lines_of(facts: Mapping[str, object], above: str) -> Iterator[tuple[str, Sequence[str]]]:
    for key, value in facts.items():
        yield from _lines_about(above + shown_line(str(key).replace("_", " ")), value)


def _lines_about(name: str, value: object) -> Iterator[tuple[str, Sequence[str]]]:
    if isinstance(value, dict):
        yield from _lines_of(value, f"{name}.")
    elif isinstance(value, list | tuple) and any(isinstance(one, dict) for one in value):
        for index, one in enumerate(value):
            yield from _lines_about(f"{name}[{index}]", one)
    elif isinstance(value, list | tuple):
        cells = [_cell(one) for one in value]
        if cells:
            together = ", ".join(cells)
            yield name, cells if len(together) > _LIST_CHARS else [together]
    elif value is not None and value != "":
        yield name, [_yes_or_no(value) if isinstance(value, bool) else _cell(value)]


def _yes_or_no(value: bool) -> str:
    return "yes" if value else "no"


def print_findings(findings: Iterable[Finding]) -> None:
    """Check by check: its severity, what it is about, what was found, and the fix."""
    _print_labelled([(shown_line(finding.item), finding) for finding in findings])


def print_nodes_findings(findings: Iterable[Finding]) -> None:
    """The same, each with the name of its node before what it is about."""
    known = list(findings)
    nodes = [shown_line(finding.node or _NOTHING) for finding in known]
    width = min(_MOST_WIDE, max(map(len, nodes), default=0))
    _print_labelled(
        [
            (f"{node:<{width}}  {shown_line(finding.item)}", finding)
            for node, finding in zip(nodes, known, strict=True)
        ]
    )


def _print_labelled(findings: Sequence[tuple[str, Finding]]) -> None:
    width = min(_MOST_WIDE, max((len(label) for label, _ in findings), default=0))
    for label, finding in findings:
        severity = click.style(f"{finding.severity:<9}", fg=_STYLES.get(finding.severity))
        say(f"{severity}{label:<{width}}  {shown_text(finding.message)}")
        if finding.hint:
            say(f"{'':<{width + 11}}hint: {shown_text(finding.hint)}")


def duration(seconds: float) -> str:
    """A time span in its two largest units: `41s`, `2m 05s`, `3h 10m`, `12d 4h`."""
    whole = max(0, int(seconds))
    minutes, second = divmod(whole, 60)
    hours, minute = divmod(minutes, 60)
    days, hour = divmod(hours, 24)
    if days:
        return f"{days}d {hour}h"
    if hours:
        return f"{hours}h {minute:02}m"
    return f"{minutes}m {second:02}s" if minutes else f"{whole}s"
