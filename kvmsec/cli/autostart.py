"""`kvmsec instance autostart`: what a boot runs."""

from __future__ import annotations

from typing import TYPE_CHECKING

from kvmsec.cli.failures import report
from kvmsec.cli.output import complain, say

if TYPE_CHECKING:
    from kvmsec.autostart import Attempt
    from kvmsec.cli.session import Node, Session


async def start_all(session: Session, node: Node) -> list[str]:
    """Start them, and say what became of each; returns the names of those that failed."""
    from kvmsec.autostart import find_wanted, start_wanted

    failed = []
    async for attempt in start_wanted(node, dict(find_wanted(session.paths))):
        _tell(attempt, is_debug=session.is_debug)
        if attempt.failed is not None:
            failed.append(attempt.name)
    return failed


def _tell(attempt: Attempt, *, is_debug: bool) -> None:
    from kvmsec.cli.instance import tell_start

    if attempt.failed is not None:
        complain(f"{attempt.name} can't be started")
        report(attempt.failed, is_debug=is_debug)
    elif attempt.started is not None:
        tell_start(attempt.started)
    else:
        say(f"{attempt.name} runs already")
