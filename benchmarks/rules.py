"""Packet rules: what it takes to put them in place, what a packet pays, and whether one leaks.

The peers are the programs that an administrator writes the same two rules (LOG and DROP) with:
`iptables`, called once for each rule, and `iptables-restore`, once for all. Both address families,
everywhere.
"""

import asyncio
from collections.abc import Sequence
from typing import Final

from attrs import frozen

from benchmarks.effort import Effort
from benchmarks.loop import Sample, Series, Stopwatch, Work, interleave
from benchmarks.packets import NO_RULES, PACKET, Costs, Leak, leaked, packet_costs
from benchmarks.report import Cell, Curve, Plot, Report, Table, Target
from benchmarks.rule_sets import (
    FAMILIES,
    FIRST,
    RESTORE,
    TAG,
    Pool,
    flush,
    peer_rules,
    restore,
    restore_text,
    run,
)
from benchmarks.series import milliseconds, ratio, summarise
from firewall.backend import BACKENDS, BackendName, make_backend
from firewall.policy import Policy

APPLY, CHANGE, AGAIN, VERIFY = "apply", "change", "again", "verify"
ONE_BY_ONE: Final = "iptables, once a rule"
SIZES: Final = (1, 10, 100, 1_000, 10_000, 100_000)
SLOW: Final = {"iptables": 10_000, ONE_BY_ONE: 1_000}
"""Ranges above which a way is left out of a full run: it takes minutes. A tenth of it otherwise."""


@frozen
class Applied:
    pool: Pool
    way: str
    series: Series


def measure(effort: Effort) -> Report:
    sizes = effort.pick(SIZES, (1, 100, 10_000), (1, 10))
    pools = [Pool(size, False) for size in sizes]
    pools += [Pool(size, True) for size in sizes if size > 1]
    applied = [one for pool in pools for one in _applied(pool, effort)]
    held = effort.pick((1, 10, 100, 1_000, 10_000), (1, 100, 1_000), (1, 10))
    packets = {
        scattered: packet_costs([Pool(size, scattered) for size in held], effort.pick(15, 5, 1))
        for scattered in (False, True)
    }
    return _report(applied, packets, [leaked(name, effort) for name in BACKENDS])


# In place ------------------------------------------------------------------------------------


def _applied(pool: Pool, effort: Effort) -> list[Applied]:
    works: dict[str, Work] = {name: _backend_work(name, pool) for name in BACKENDS}
    works |= {RESTORE: _restore_work(pool), ONE_BY_ONE: _one_by_one_work(pool)}
    share = effort.pick(1, 10, 10)
    for way, most in SLOW.items():
        if pool.ranges > most // share:
            del works[way]
    is_large = pool.ranges >= 1_000
    found = asyncio.run(
        interleave(effort.pick(3 if is_large else 11, 2, 1), works, warm_up=not is_large)
    )
    return [Applied(pool, way, series) for way, series in found.items()]


def _backend_work(name: BackendName, pool: Pool) -> Work:
    backend = make_backend(name, TAG)
    policy = Policy(pool.pairs)
    changed = Policy((*pool.pairs, (FIRST - 10, FIRST - 10)))

    async def work() -> Sample:
        watch = Stopwatch()
        backend.apply(policy)
        applied_s = watch.lap()
        backend.apply(policy)
        again_s = watch.lap()
        backend.apply(changed)
        changed_s = watch.lap()
        problems = backend.compare(changed)
        verified_s = watch.lap()
        backend.remove()
        assert not problems, problems
        return {APPLY: applied_s, AGAIN: again_s, CHANGE: changed_s, VERIFY: verified_s}

    return work


def _restore_work(pool: Pool) -> Work:
    text = restore_text(pool)

    async def work() -> Sample:
        watch = Stopwatch()
        restore(text)
        applied_s = watch.lap()
        flush()
        return {APPLY: applied_s}

    return work


def _one_by_one_work(pool: Pool) -> Work:
    rules = list(peer_rules(pool))

    async def work() -> Sample:
        watch = Stopwatch()
        for family in FAMILIES:
            for rule in rules:
                run([family, "-A", "OUTPUT", *rule])
        applied_s = watch.lap()
        flush()
        return {APPLY: applied_s}

    return work


# What is told --------------------------------------------------------------------------------


def _report(
    applied: Sequence[Applied],
    packets: dict[bool, Costs],
    leaks: Sequence[Leak],
) -> Report:
    problems = [
        f"{one.backend}: {one.arrived} packets leaked while rules were applied again"
        for one in leaks
        if one.arrived
    ]
    problems += [
        f"{one.backend}: nothing arrived without rules either, so nothing is shown"
        for one in leaks
        if not one.arrived_without_rules
    ]
    return Report(
        "rules",
        tables=(_applied_table(applied), *map(_packet_table, *_sides(packets)), _leak_table(leaks)),
        plots=(_applied_plot(applied), *map(_packet_plot, *_sides(packets))),
        targets=_targets(packets[True], leaks),
        problems=tuple(problems),
    )


def _sides(
    packets: dict[bool, Costs],
) -> tuple[list[bool], list[Costs]]:
    return list(packets), list(packets.values())


def _applied_table(applied: Sequence[Applied]) -> Table:
    rows = []
    for one in applied:
        cells = [
            milliseconds(one.series[what]) if what in one.series else "-"
            for what in (APPLY, AGAIN, CHANGE, VERIFY)
        ]
        rows.append((f"{one.pool.size:,}, {one.pool.words}", one.way, *cells))
    head = ("uids", "", "apply to none, ms", "apply again, ms", "apply a change, ms", "verify, ms")
    note = "Median (p10 to p90). Left out is what takes minutes."
    return Table("rules", "Rules in place", head, tuple(rows), note)


def _applied_plot(applied: Sequence[Applied]) -> Plot:
    ways = list(dict.fromkeys(one.way for one in applied))
    curves = tuple(
        Curve(
            way,
            tuple(
                (one.pool.size, milliseconds(one.series[APPLY]))
                for one in applied
                if one.way == way and (one.pool.is_scattered or one.pool.size == 1)
            ),
        )
        for way in ways
    )
    title = "Rules for uids that lie each by itself, applied to none"
    return Plot("rules_apply", title, "uids", "ms", curves, is_log_x=True, is_log_y=True)


def _packet_table(is_scattered: bool, found: Costs) -> Table:
    base = found[NO_RULES, 0][PACKET]
    rows: list[tuple[Cell, ...]] = [
        (way, size, summarise(series[PACKET], scale=1e6), ratio(series[PACKET], base))
        for (way, size), series in sorted(found.items())
    ]
    words = Pool(2, is_scattered).words
    head = ("rules", "uids", "a packet, us", "x no rules")
    title = f"A packet of a uid that is in no pool ({words})"
    return Table(f"packet_{'scattered' if is_scattered else 'range'}", title, head, tuple(rows))


def _packet_plot(is_scattered: bool, found: Costs) -> Plot:
    without = (0.0, summarise(found[NO_RULES, 0][PACKET], scale=1e6))
    curves = tuple(
        Curve(
            way,
            (
                without,
                *(
                    (float(size), summarise(series[PACKET], scale=1e6))
                    for (who, size), series in sorted(found.items())
                    if who == way
                ),
            ),
        )
        for way in (*BACKENDS, RESTORE)
    )
    words = Pool(2, is_scattered).words
    key = f"rules_packet_{'scattered' if is_scattered else 'range'}"
    title = f"A packet of a uid that is in no pool ({words})"
    return Plot(key, title, "uids in the pool", "us", curves, is_log_x=True, is_log_y=is_scattered)


def _leak_table(leaks: Sequence[Leak]) -> Table:
    rows = tuple(
        (one.backend, one.uids, one.applied, one.tried, one.arrived, one.arrived_without_rules)
        for one in leaks
    )
    head = (
        "",
        "uids",
        "times applied",
        "packets tried",
        "arrived",
        "arrived before, without rules",
    )
    title = "Packets of a uid of the pool while its rules change, uids each by itself"
    return Table("leaks", title, head, rows)


def _targets(scattered: Costs, leaks: Sequence[Leak]) -> tuple[Target, ...]:
    base = scattered[NO_RULES, 0][PACKET]
    found = []
    for name in BACKENDS:
        sizes = sorted(size for way, size in scattered if way == name)
        least, most = (scattered[name, size][PACKET] for size in (sizes[0], sizes[-1]))
        what = f"a packet, {name}, {sizes[-1]:,} uids each by itself, against"
        found.append(Target(f"{what} no rules", 1.3, ratio(most, base), " x"))
        found.append(Target(f"{what} {sizes[0]:,}", 1.1, ratio(most, least), " x"))
    found.append(Target("packets leaked", 0, sum(one.arrived for one in leaks)))
    return tuple(found)
