"""Ganeti's own `uidpool.py`, unchanged but for where its lock files lie; run by Debian's Python.

A draw is what its KVM hypervisor does at each start: parse the pool, expand it, request a uid.

usage: ganeti_uids.py LOCKS
"""

import os
import sys
import time
from pathlib import Path

from drawers import Drawn, draw_in_processes
from orders import serve


def main() -> None:
    # The package has a directory for each version, and a link to the one in use that is configured.
    sys.path.append(str(max(Path("/usr/share/ganeti").glob("[3-9].[0-9]*"))))
    from ganeti import constants, errors, pathutils, uidpool

    pathutils.UIDPOOL_LOCKDIR = sys.argv[1]
    held = []

    def request(pool: str) -> object:
        uids = set(uidpool.ExpandUidPool(uidpool.ParseUidPool(pool)))
        return uidpool.RequestUnusedUid(uids)

    def draw(pool: str) -> float:
        begin = time.perf_counter()
        held.append(request(pool))
        return time.perf_counter() - begin

    def give_back() -> None:
        uidpool.ReleaseUid(held.pop())

    def many(pool: str, drawers: int, each: int) -> list[Drawn]:
        def release(uid: object) -> None:
            uidpool.ReleaseUid(uid)

        return draw_in_processes(
            drawers,
            each,
            lambda: request(pool),
            lambda uid: uid.GetUid(),
            release,
            errors.LockError,
        )

    serve(
        {
            "version": lambda: constants.RELEASE_VERSION,
            "draw": draw,
            "give back": give_back,
            "many": many,
        }
    )


if __name__ == "__main__":
    os.environ["PATH"] = "/usr/sbin:/usr/bin:/sbin:/bin"
    main()
