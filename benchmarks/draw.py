"""How long a draw takes from a pool of 10,000 uids of which 9,999 are taken.

As root it works in namespaces of its own, with its leases below /run as on a real node, and
measures the whole draw. Otherwise it leaves out the look at what the uid still has.
"""

import argparse
import os
import statistics
import tempfile
import time
from datetime import UTC, datetime
from pathlib import Path

import _sandbox

from kvmsec.linux.processes import boot_id, myself
from uidpool import usage
from uidpool.ranges import UidRanges
from uidpool.records import Lease, encode
from uidpool.waiting import WaitingClaims

POOL = UidRanges.parse("210000-219999")
FREE = 214321


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--draws", type=int, default=101)
    arguments = parser.parse_args()
    if os.geteuid() == 0:
        _sandbox.enter()
    with tempfile.TemporaryDirectory(dir="/run" if os.geteuid() == 0 else None) as place:
        leases, state = Path(place) / "leases", Path(place) / "state"
        fill(leases)
        records_only = WaitingClaims(
            leases, state, root="/", inspect=usage.Usage, clean=usage.Usage
        )
        print(f"pool of {POOL.size():,} uids, {POOL.size() - 1:,} taken, {arguments.draws} draws")
        report("choosing and recording", records_only, arguments.draws)
        if os.geteuid() == 0:
            whole = WaitingClaims(leases, state, root="/", clean=usage.Usage)
            report("with the look at the uid", whole, arguments.draws)


def fill(leases: Path) -> None:
    leases.mkdir(mode=0o700)
    for uid in POOL:
        if uid != FREE:
            lease = Lease(uid, "other", "g", "/", boot_id(), myself(), now(), 60.0)
            (leases / str(uid)).write_bytes(encode(lease))


def now() -> datetime:
    return datetime.now(UTC)


def report(what: str, claims: WaitingClaims, draws: int) -> None:
    times_ms = []
    for number in range(draws):
        started = time.perf_counter()
        lease = claims.draw(POOL, instance="vm", generation=str(number), reuse_delay_s=0)
        times_ms.append((time.perf_counter() - started) * 1000)
        assert lease.uid == FREE
        claims.release(lease.key)
    tenths = statistics.quantiles(times_ms, n=10)
    median = statistics.median(times_ms)
    print(f"{what:26} median {median:.2f} ms, p10 {tenths[0]:.2f} ms, p90 {tenths[8]:.2f} ms")


if __name__ == "__main__":
    main()
