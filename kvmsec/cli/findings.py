"""How checks end: what they found is shown, and an error among it is exit status 3."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import click

from kvmsec.cli.failures import CHECK_FOUND_ERRORS
from kvmsec.cli.output import print_findings, print_findings_json, print_nodes_findings

if TYPE_CHECKING:
    from kvmsec.agent import Finding


def conclude(findings: Sequence[Finding], *, as_json: bool) -> None:
    """Show the findings; raises Exit with status 3 when one of them is an error."""
    (print_findings_json if as_json else print_findings)(findings)
    _end(findings)


def conclude_for_nodes(findings: Sequence[Finding], *, as_json: bool) -> None:
    """The same for what was found on several nodes, each finding with its node's name."""
    (print_findings_json if as_json else print_nodes_findings)(findings)
    _end(findings)


def _end(findings: Sequence[Finding]) -> None:
    if any(finding.severity == "error" for finding in findings):
        raise click.exceptions.Exit(CHECK_FOUND_ERRORS)
