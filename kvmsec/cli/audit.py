"""`kvmsec audit`: how well a running QEMU is confined, anybody's, point by point."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Final

import click

from kvmsec.cli.failures import CHECK_FOUND_ERRORS, WrongUsage
from kvmsec.cli.output import print_json, print_table, say, shown_line, shown_text, warn
from kvmsec.cli.params import INSTANCE_NAME, SCORE, WHOLE_NUMBER, json_option
from kvmsec.cli.session import Session, is_root, pass_session

if TYPE_CHECKING:
    from kvmsec.audit.examination import Report, Subject
    from kvmsec.audit.score import Finding

_MARKS: Final = {"sealed": "+", "exposed": "-", "unknown": "?", "note": " "}
_ORDER: Final = {"exposed": 0, "unknown": 1, "sealed": 2, "note": 3}
_COLORS: Final = {
    **{"DANGEROUS": "red", "UNSAFE": "red", "EXPOSED": "yellow", "MEDIUM": None},
    **{"OK": "green", "SAFE": "green", "PERFECT": "green"},
}


@click.command
@click.argument("name", type=INSTANCE_NAME, required=False)
@click.option("--pid", type=WHOLE_NUMBER, help="Any process, kvmsec's instance or not.")
@click.option("--all", "everything", is_flag=True, help="Every QEMU of this host (the default).")
@click.option(
    "--threshold",
    type=SCORE,
    metavar="SCORE",
    help="End with status 3 when a score is above this (0.0 to 10.0; without it, never).",
)
@click.option(
    "--canary", is_flag=True, help="Try the packet rules: send a packet as each process's uid."
)
@json_option
@pass_session
def audit(
    session: Session,
    name: str | None,
    pid: int | None,
    everything: bool,
    threshold: float | None,
    canary: bool,
    as_json: bool,
) -> None:
    """How well is a running QEMU confined? A score, and each fix.

    The score goes from 0.0, sealed, to 10.0. With a NAME or --pid, point by point.
    """
    if sum((name is not None, pid is not None, everything)) > 1:
        raise WrongUsage("a NAME, --pid and --all exclude each other")
    if canary:
        session.require_root()
    if name is not None or pid is not None:
        reports = [_examine_one(session, name, pid, canary)]
    else:
        reports = _examine_all(session, canary)
    if as_json:
        print_json([report.plain() for report in reports])
    elif name is not None or pid is not None:
        _print_page(reports[0])
    else:
        _print_table(reports)
    if threshold is not None and any(report.score > threshold for report in reports):
        raise click.exceptions.Exit(CHECK_FOUND_ERRORS)


def _examine_one(session: Session, name: str | None, pid: int | None, with_canary: bool) -> Report:
    from kvmsec.audit.examination import Subject, examine

    if name is not None:
        return examine(_subject_of(session, name), with_canary=with_canary)
    assert pid is not None
    known = {subject.pid: subject for subject in _instances(session)}
    return examine(known.get(pid, Subject(pid)), with_canary=with_canary)


def _subject_of(session: Session, name: str) -> Subject:
    """The process of an instance. Raises UnknownInstance, and NotRunning."""
    from kvmsec.audit.examination import Subject
    from kvmsec.errors import NotRunning

    info = session.run(lambda node: node.info(name))
    if info.pid is None:
        raise NotRunning(name, info.state)
    return Subject(info.pid, name, _tolerated(session), _sockets(session, name))


def _examine_all(session: Session, with_canary: bool) -> list[Report]:
    from kvmsec.audit.examination import examine_all

    found = examine_all(_instances(session), with_canary=with_canary)
    return sorted(found, key=lambda report: (-report.score, report.pid))


def _instances(session: Session) -> Sequence[Subject]:
    """The node's own instances; what is known of them may be missing, and then that is said."""
    from kvmsec.audit.examination import Subject
    from kvmsec.linux.errors import Fault

    if not is_root():
        warn("without root much can't be read; what can't be is taken for open")
        return ()
    try:
        known = session.run(lambda node: node.list())
        tolerated = _tolerated(session)
    except (Fault, OSError) as error:
        warn(f"which of them are instances of this root is not known: {error}")
        return ()
    return [
        Subject(one.pid, one.name, tolerated, _sockets(session, one.name))
        for one in known
        if one.pid is not None
    ]


def _tolerated(session: Session) -> tuple[str, ...]:
    from kvmsec.config import load_config

    return load_config(session.paths.config).confinement.may_be_missing


def _sockets(session: Session, name: str) -> tuple[str, ...]:
    """Where its sockets are: on a filesystem with many files a search for them would give up."""
    place = session.paths.instance(name)
    return str(place.qmp_socket), str(place.serial_socket)


# People --------------------------------------------------------------------------------------


def _print_table(reports: Sequence[Report]) -> None:
    if not reports:
        say("no QEMU runs here")
        return
    headings = ("name", "pid", "uid", "user", "score", "rating", "most exposed by")
    print_table(headings, [_row(report) for report in reports])
    if any(report.unread for report in reports):
        say("? something could not be read, and is taken for open")


def _row(report: Report) -> tuple[object, ...]:
    worst = sorted(report.findings, key=lambda finding: -finding.exposure)
    codes = ", ".join(finding.code for finding in worst[:3] if finding.exposure)
    score = f"{report.score:.1f}{'?' if report.unread else ''}"
    uid = "?" if report.uid is None else report.uid
    return report.name, report.pid, uid, report.user, score, report.rating, codes


def _print_page(report: Report) -> None:
    whose = f"instance {report.instance}" if report.instance else report.name
    uid = "an unknown uid" if report.uid is None else f"uid {report.uid}"
    user = f" ({report.user})" if report.user else ""
    program = report.executable or "an unknown program"
    say(f"{shown_line(whose)}: pid {report.pid}, {uid}{shown_line(user)}, {shown_line(program)}\n")
    findings = sorted(report.findings, key=lambda one: (_ORDER[one.state], -one.exposure))
    print_table(("", "point", "what was found", "exposure"), [_line(one) for one in findings])
    for finding in findings:
        if finding.state in ("exposed", "unknown"):
            _print_advice(finding)
    color: Any = _COLORS[report.rating]
    total = click.style(f"{report.score:.1f} {report.rating}", fg=color, bold=True)
    say(f"\nOverall exposure of {shown_line(report.name)}: {total}")


def _line(finding: Finding) -> tuple[object, ...]:
    exposure = f"{finding.exposure:.2f}" if finding.exposure else ""
    return _MARKS[finding.state], finding.code, finding.message, exposure


def _print_advice(finding: Finding) -> None:
    say(f"\n{finding.code}: {shown_text(finding.why)}")
    if finding.hint:
        say(f"  hint: {shown_text(finding.hint)}")
