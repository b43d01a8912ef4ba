"""What the master's daemon does from time to time: it confirms every copy of the state."""

import asyncio
from collections.abc import Callable, Mapping
from typing import Final

from kvmsec.cluster.handing import spread
from kvmsec.cluster.nodes import Directory
from kvmsec.cluster.operations import settle
from kvmsec.cluster.team import Team
from kvmsec.linux.errors import Fault
from kvmsec.store import Store
from kvmsec.store.freshness import is_truth

SHARE: Final = 4
"""A copy is confirmed this many times within the time that it counts for: lost calls don't hurt."""
LONGEST_S: Final = 60.0
"""So that a node that comes back has the state within a minute, however long copies count."""

Report = Callable[[str], None]


async def upkeep(
    store: Store, directory: Directory, *, copy_valid_s: float, report: Report
) -> None:
    """Keep the members up to date for as long as this runs; on a node that isn't the master, wait.

    `report` is told, a line each, who falls behind, who is back, and what failed. Ends only by
    being cancelled.
    """
    every_s = min(LONGEST_S, copy_valid_s / SHARE)
    behind: Mapping[str, str] = {}
    while True:
        try:
            now_behind = await sync(store, directory)
            for line in _news(behind, now_behind):
                report(line)
            behind = now_behind
        except (Fault, OSError) as error:
            report(f"the members could not be brought up to date: {error}")
        except Exception as error:
            # A bug, then; but what a member may have answered must not end the master's daemon.
            words = f"unexpected {type(error).__name__}: {str(error)[:300]}"
            report(f"the members could not be brought up to date: {words}")
        await asyncio.sleep(every_s)


async def sync(store: Store, directory: Directory) -> Mapping[str, str]:
    """Hand the state to every member that answers; returns who doesn't have it, and why.

    Then lets draining uids go that nobody holds, where all have said so. Nothing on a node that is
    not the master, or the only one. Raises what the store and this node raise.
    """
    cluster, _ = store.load()
    if cluster is None or len(cluster.nodes) == 1 or not is_truth(cluster, store.identity()):
        return {}
    behind = await spread(store, Team.of(store, directory, cluster))
    if cluster.draining and not behind:
        return (await settle(store, directory)).silent
    return behind


def _news(before: Mapping[str, str], now: Mapping[str, str]) -> list[str]:
    lost = [f"{name} is not up to date: {why}" for name, why in now.items() if name not in before]
    back = [f"{name} is up to date again" for name in before if name not in now]
    return lost + back
