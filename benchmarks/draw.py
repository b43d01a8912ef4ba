"""Drawing a uid, beside Ganeti's own `uidpool.py`, each whole: parse the pool, choose, look.

kvmsec looks at processes, IPC and files of the chosen uid; Ganeti asks `pgrep`. What is taken is
hard links to one record: their names are what either of them goes by.
"""

import asyncio
import contextlib
import random
import tempfile
from collections import Counter, defaultdict, deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Final

from attrs import frozen

from benchmarks import peers
from benchmarks.effort import Effort
from benchmarks.loop import Sample, Series, Stopwatch, Work, interleave
from benchmarks.report import Cell, Curve, Plot, Report, Table, Target
from benchmarks.series import milliseconds, ratio, uniformity
from benchmarks.worker import Worker, WorkerFailed
from benchmarks.workers.drawers import Drawn, draw_in_processes
from kvmsec.linux.errors import Fault
from kvmsec.linux.processes import boot_id, myself
from uidpool import usage
from uidpool.ranges import UidRanges
from uidpool.records import Lease, encode
from uidpool.waiting import WaitingClaims

FIRST: Final = 1_000_000
KVMSEC: Final = "kvmsec"
GANETI: Final = "Ganeti"
DRAW: Final = "draw"
SHARED_POOL: Final = 1000
SHARED: Final = f"{FIRST}-{FIRST + SHARED_POOL - 1}"
HELD: Final = 10
TOO_UNEVEN: Final = 1e-6
"""A p-value below this is no accident: one run in a million of a fair draw."""

SIZES: Final = (10, 100, 1_000, 10_000, 100_000, 1_000_000)
TAKEN: Final = (0.0, 0.5, 0.9, 0.99, 0.9999)


@frozen
class Measured:
    size: int
    taken: float
    series: dict[str, Series]


@frozen
class Together:
    """Drawers at once from one pool: how long a draw took, draws a second, and what went wrong."""

    who: str
    drawers: int
    draws_s: tuple[float, ...]
    per_second: float
    refused: int
    doubles: int


@frozen
class Places:
    """Where the leases of kvmsec and the lock files of Ganeti lie."""

    leases: Path
    state: Path
    locks: Path

    @property
    def claims(self) -> WaitingClaims:
        # What a uid has left is nobody's here: a release cleans nothing.
        return WaitingClaims(self.leases, self.state, root="/", clean=usage.Usage)


def measure(effort: Effort) -> Report:
    missing = peers.lacks_ganeti()
    with contextlib.ExitStack() as running:
        peer = None
        if missing is None:
            peer = running.enter_context(peers.worker("ganeti_uids.py", "/run/ganeti"))
            try:
                peer.ask("version")
            except WorkerFailed as error:
                peer, missing = None, f"Ganeti's uidpool.py, which does not run here ({error})"
        measured = [
            _one_size(size, effort, peer)
            for size in effort.pick(SIZES, (10, 10_000, 1_000_000), (10, 1_000))
        ]
        drawers = effort.pick((1, 2, 4, 16, 64), (1, 16), (1, 4))
        together = [_together(n, effort.pick(1920, 160, 16) // n, peer) for n in drawers]
    return _report(
        [one for some in measured for one in some],
        [one for some in together for one in some],
        *_fairness(effort.pick(100_000, 2_000, 100)),
        missing,
    )


# One at a time -------------------------------------------------------------------------------


def _one_size(size: int, effort: Effort, peer: Worker | None) -> list[Measured]:
    text = f"{FIRST}-{FIRST + size - 1}"
    fractions = effort.pick(TAKEN, (0.0, 0.99), (0.0, 0.5))
    if effort is Effort.QUICK and size > 100_000:
        fractions = (0.0,)  # A million files take longer to make than all the rest.
    rounds = effort.pick(31 if size < 100_000 else 5, 9 if size < 100_000 else 3, 1)
    order = random.Random(size).sample(range(FIRST, FIRST + size), size)
    found, filled = [], 0
    with _places() as places:
        works = {KVMSEC: _kvmsec_work(places, text)}
        if peer is not None:
            works[GANETI] = _ganeti_work(peer, text)
        for taken in fractions:
            count = min(int(size * taken), size - 1)
            _take(places, order[filled:count])
            filled = count
            found.append(Measured(size, taken, asyncio.run(interleave(rounds, works))))
    return found


@contextlib.contextmanager
def _places() -> Iterator[Places]:
    locks = Path("/run/ganeti")  # Its worker was told so; each size begins anew.
    with tempfile.TemporaryDirectory(dir="/run") as place, _emptied_afterwards(locks):
        leases = Path(place, "leases")
        leases.mkdir(mode=0o700)
        yield Places(leases, Path(place, "state"), locks)


@contextlib.contextmanager
def _emptied_afterwards(directory: Path) -> Iterator[None]:
    directory.mkdir(exist_ok=True)
    yield
    for path in directory.iterdir():
        path.unlink()


def _take(places: Places, uids: Sequence[int]) -> None:
    if not uids:
        return
    lease = Lease(uids[0], "other", "g", "/", boot_id(), myself(), datetime.now(UTC), 60.0)
    for directory, content in ((places.leases, encode(lease)), (places.locks, b"")):
        first = directory / str(uids[0])
        first.write_bytes(content)
        for uid in uids[1:]:
            (directory / str(uid)).hardlink_to(first)


def _kvmsec_work(places: Places, text: str) -> Work:
    claims = places.claims

    def draw() -> float:
        watch = Stopwatch()
        lease = _draw(claims, text)
        taken_s = watch.lap()
        claims.release(lease.key)
        return taken_s

    return _second(draw)


def _draw(claims: WaitingClaims, text: str) -> Lease:
    pool = UidRanges.parse(text)
    return claims.draw(pool, instance="vm", generation="g", reuse_delay_s=0)


def _ganeti_work(peer: Worker, text: str) -> Work:
    def draw() -> float:
        taken_s = peer.ask("draw", pool=text)
        peer.ask("give back")
        return float(taken_s)

    return _second(draw)


def _second(draw: Callable[[], float]) -> Work:
    """The first finds the processor's caches full of what the other has just worked with."""

    async def work() -> Sample:
        draw()
        return {DRAW: draw()}

    return work


# Many at once --------------------------------------------------------------------------------


def _together(drawers: int, each: int, peer: Worker | None) -> list[Together]:
    with _places() as places:
        found = [_summed(KVMSEC, drawers, _kvmsec_drawers(places.claims, drawers, each))]
        if peer is not None:
            drawn = peer.ask("many", pool=SHARED, drawers=drawers, each=each)
            found.append(_summed(GANETI, drawers, [tuple(one) for one in drawn]))
    return found


def _kvmsec_drawers(claims: WaitingClaims, drawers: int, each: int) -> list[Drawn]:
    return draw_in_processes(
        drawers,
        each,
        lambda: _draw(claims, SHARED),
        lambda lease: lease.uid,
        lambda lease: claims.release(lease.key),
        Fault,
    )


def _summed(who: str, drawers: int, drawn: Sequence[Drawn]) -> Together:
    good = [one for one in drawn if one[0] >= 0]
    took_s = max(until for *_, until in drawn) - min(begin for _, begin, _, _ in drawn)
    return Together(
        who,
        drawers,
        tuple(had - begin for _, begin, had, _ in good),
        len(good) / took_s,
        len(drawn) - len(good),
        double_draws(good),
    )


def double_draws(drawn: Iterable[Drawn]) -> int:
    """How often a uid was had by one drawer before another had let go of it."""
    spans = defaultdict(list)
    for uid, _, had, until in drawn:
        spans[uid].append((had, until))
    return sum(
        later[0] < earlier[1]
        for some in spans.values()
        for earlier, later in zip(sorted(some), sorted(some)[1:], strict=False)
    )


def _fairness(draws: int) -> tuple[Table, tuple[str, ...]]:
    """How even draws are, one after the other, and whether one is ever of a uid that is held."""
    counts: Counter[int] = Counter()
    held: deque[Lease] = deque()
    doubles = 0
    with _places() as places:
        # Records alone: what it looks at doesn't choose.
        claims = WaitingClaims(
            places.leases, places.state, root="/", inspect=usage.Usage, clean=usage.Usage
        )
        for _ in range(draws):
            lease = _draw(claims, SHARED)
            doubles += any(lease.uid == other.uid for other in held)
            counts[lease.uid] += 1
            held.append(lease)
            if len(held) > HELD:
                claims.release(held.popleft().key)
    even = uniformity(counts, SHARED_POOL)
    problems = []
    if doubles:
        problems.append(f"{doubles} draws were of a uid that was held")
    if even.p_value < TOO_UNEVEN:
        problems.append(f"draws are uneven: p = {even.p_value:.3g}")
    row: tuple[Cell, ...] = (draws, even.chi_squared, even.degrees, even.p_value, doubles)
    head = ("draws", "chi-squared", "degrees of freedom", "p", "of a held uid")
    title = f"Whether each uid of {SHARED_POOL:,} is as likely, {HELD} of them held"
    return Table("fairness", title, head, (row,)), tuple(problems)


# What is told --------------------------------------------------------------------------------


def _report(
    measured: Sequence[Measured],
    together: Sequence[Together],
    fairness: Table,
    problems: tuple[str, ...],
    missing: str | None,
) -> Report:
    return Report(
        "draw",
        tables=(_alone(measured), _shared(together), fairness),
        plots=tuple(_plots(measured)),
        targets=_targets(measured),
        missing=(missing,) if missing else (),
        problems=(*problems, *_broken(together)),
    )


def _broken(together: Sequence[Together]) -> Iterator[str]:
    """What of kvmsec's own draws at once went wrong; a peer's is told in the table."""
    for one in together:
        if one.who == KVMSEC and (one.doubles or one.refused):
            yield (
                f"of {one.drawers} drawers at once, {one.doubles} draws were of a uid that another "
                f"had, and {one.refused} were refused"
            )


def _alone(measured: Sequence[Measured]) -> Table:
    rows: list[tuple[Cell, ...]] = []
    for one in measured:
        ours, theirs = one.series[KVMSEC][DRAW], one.series.get(GANETI)
        cells: tuple[Cell, ...] = (None, None)
        if theirs is not None:
            cells = (milliseconds(theirs[DRAW]), ratio(theirs[DRAW], ours))
        rows.append((f"{one.size:,}", f"{100 * one.taken:g} %", milliseconds(ours), *cells))
    head = ("uids in the pool", "taken", "kvmsec, ms", "Ganeti, ms", "Ganeti / kvmsec")
    return Table("draw", "A draw", head, tuple(rows), "Median (p10 to p90).")


def _shared(together: Sequence[Together]) -> Table:
    rows = tuple(
        (
            one.drawers,
            one.who,
            milliseconds(one.draws_s) if one.draws_s else None,
            one.per_second,
            one.refused,
            one.doubles,
        )
        for one in together
    )
    head = ("drawers", "", "a draw, ms", "draws a second", "refused", "drawn twice at once")
    title = f"Drawers at once, from a pool of {SHARED_POOL:,}"
    return Table("drawers", title, head, rows, "Each gives its uid back before it draws again.")


def _plots(measured: Sequence[Measured]) -> Iterator[Plot]:
    for taken in (0.0, 0.99):
        some = [one for one in measured if one.taken == taken]
        curves = tuple(
            Curve(
                who,
                tuple(
                    (one.size, milliseconds(one.series[who][DRAW]))
                    for one in some
                    if who in one.series
                ),
            )
            for who in (KVMSEC, GANETI)
        )
        curves = tuple(curve for curve in curves if curve.points)
        if not curves:
            continue
        title = f"A draw, {100 * taken:g} % of the pool taken"
        key = f"draw_{100 * taken:g}"
        yield Plot(key, title, "uids in the pool", "ms", curves, is_log_x=True, is_log_y=True)


def _targets(measured: Sequence[Measured]) -> tuple[Target, ...]:
    by_place = {(one.size, one.taken): one.series for one in measured}

    def faster(size: int, taken: float) -> float | None:
        series = by_place.get((size, taken))
        if series is None or GANETI not in series:
            return None
        return ratio(series[GANETI][DRAW], series[KVMSEC][DRAW])

    small, large = by_place.get((10, 0.0)), by_place.get((1_000_000, 0.0))
    grown = ratio(large[KVMSEC][DRAW], small[KVMSEC][DRAW]) if small and large else None
    bounds: Sequence[tuple[int, float, float]] = (
        (10_000, 0.99, 5),
        (1_000_000, 0.0, 100),
        (1_000_000, 0.99, 100),
    )
    return (
        Target("draw from 1,000,000 uids, against one from 10, none taken", 1.2, grown, " x"),
        *(
            Target(
                f"draw from {size:,} uids, {100 * taken:g} % taken, faster than Ganeti",
                bound,
                faster(size, taken),
                " x",
                at_least=True,
            )
            for size, taken, bound in bounds
        ),
    )
