"""Packet rules: what it takes to put them in place, what a packet pays, and whether one leaks.

The peers are the programs that an administrator writes the same two rules (LOG and DROP) with:
`iptables`, called once for each rule, and `iptables-restore`, once for all. Both address families,
everywhere.
"""

import asyncio
import contextlib
import os
import signal
import socket
import subprocess
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Final

from attrs import frozen

from benchmarks.effort import Effort
from benchmarks.loop import Sample, Series, Stopwatch, Work, interleave
from benchmarks.report import Cell, Curve, Plot, Report, Table, Target
from benchmarks.series import milliseconds, ratio, summarise
from firewall.backend import BACKENDS, BackendName, make_backend
from firewall.policy import Policy, UidPairs
from kvmsec.linux import namespaces

FIRST: Final = 1_000_000
TAG: Final = "kvmsec"
APPLY, CHANGE, AGAIN, VERIFY = "apply", "change", "again", "verify"
PACKET: Final = "packet"
NO_RULES: Final = "no rules"
ONE_BY_ONE, RESTORE = "iptables, once a rule", "iptables-restore"
FAMILIES: Final = ("iptables-legacy", "ip6tables-legacy")
SIZES: Final = (1, 10, 100, 1_000, 10_000, 100_000)
SLOW: Final = {"iptables": 10_000, ONE_BY_ONE: 1_000}
"""Ranges above which a way is left out of a full run: it takes minutes. A tenth of it otherwise."""


@frozen
class Pool:
    """So many uids, in one range or each in one of its own."""

    size: int
    is_scattered: bool

    @property
    def pairs(self) -> UidPairs:
        if self.is_scattered:
            return tuple((FIRST + 2 * n, FIRST + 2 * n) for n in range(self.size))
        return ((FIRST, FIRST + self.size - 1),)

    @property
    def ranges(self) -> int:
        return self.size if self.is_scattered else 1

    @property
    def words(self) -> str:
        return "each by itself" if self.is_scattered else "one range"


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
        scattered: _packets([Pool(size, scattered) for size in held], effort.pick(15, 5, 1))
        for scattered in (False, True)
    }
    return _report(applied, packets, [_leaked(name, effort) for name in BACKENDS])


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
    text = _restore_text(pool)

    async def work() -> Sample:
        watch = Stopwatch()
        _restore(text)
        applied_s = watch.lap()
        _flush()
        return {APPLY: applied_s}

    return work


def _restore_text(pool: Pool) -> bytes:
    lines = "\n".join(f"-A OUTPUT {' '.join(rule)}" for rule in _peer_rules(pool))
    return f"*filter\n:OUTPUT ACCEPT [0:0]\n{lines}\nCOMMIT\n".encode()


def _restore(text: bytes) -> None:
    for family in FAMILIES:
        _run([f"{family}-restore"], text)


def _one_by_one_work(pool: Pool) -> Work:
    rules = list(_peer_rules(pool))

    async def work() -> Sample:
        watch = Stopwatch()
        for family in FAMILIES:
            for rule in rules:
                _run([family, "-A", "OUTPUT", *rule])
        applied_s = watch.lap()
        _flush()
        return {APPLY: applied_s}

    return work


def _peer_rules(pool: Pool) -> Iterator[list[str]]:
    for first, last in pool.pairs:
        owner = ["-m", "owner", "--uid-owner", str(first) if first == last else f"{first}-{last}"]
        yield [*owner, "-j", "LOG"]
        yield [*owner, "-j", "DROP"]


def _flush() -> None:
    for family in FAMILIES:
        _run([family, "-F", "OUTPUT"])


def _run(argv: Sequence[str], text: bytes = b"") -> None:
    subprocess.run(argv, input=text, check=True, stdout=subprocess.DEVNULL)


# A packet ------------------------------------------------------------------------------------


def _packets(pools: Sequence[Pool], rounds: int) -> dict[tuple[str, int], Series]:
    """What a packet of root's takes with each set of rules, by its way and the pool's size.

    Each set is in force in a network namespace of its own, so that all can be asked in turn.
    """
    with contextlib.ExitStack() as opened:
        networks = {(NO_RULES, 0): opened.enter_context(_network(lambda: None))}
        for pool in pools:
            for name in BACKENDS:
                backend, policy = make_backend(name, TAG), Policy(pool.pairs)
                apply = partial(backend.apply, policy)
                networks[name, pool.size] = opened.enter_context(_network(apply))
            restore = partial(_restore, _restore_text(pool))
            networks[RESTORE, pool.size] = opened.enter_context(_network(restore))
        works = {
            f"{way} {size}": _packet_work(network) for (way, size), network in networks.items()
        }
        found = asyncio.run(interleave(rounds, works))
    return {(way, size): found[f"{way} {size}"] for way, size in networks}


@contextlib.contextmanager
def _network(apply: Callable[[], object]) -> Iterator[int]:
    """A new network namespace with rules in it, as a descriptor."""
    with _own_network():
        _run(["ip", "link", "set", "lo", "up"])
        apply()
        network = os.open("/proc/thread-self/ns/net", os.O_RDONLY | os.O_CLOEXEC)
    try:
        yield network
    finally:
        os.close(network)


@contextlib.contextmanager
def _own_network(network: int | None = None) -> Iterator[None]:
    """Be in a network namespace, a new one unless told, and then where we were."""
    here = os.open("/proc/thread-self/ns/net", os.O_RDONLY | os.O_CLOEXEC)
    try:
        if network is None:
            namespaces.unshare(namespaces.CLONE_NEWNET)
        else:
            namespaces.setns(network, namespaces.CLONE_NEWNET)
        yield
    finally:
        namespaces.setns(here, namespaces.CLONE_NEWNET)
        os.close(here)


def _packet_work(network: int) -> Work:
    async def work() -> Sample:
        with _own_network(network):
            return {PACKET: packet_s()}

    return work


def packet_s(at_least_s: float = 0.05) -> float:
    """Seconds for a datagram of root's over loopback, to a socket that nobody reads."""
    kind = (socket.AF_INET, socket.SOCK_DGRAM)
    with socket.socket(*kind) as sender, socket.socket(*kind) as sink:
        sink.bind(("127.0.0.1", 0))
        address = sink.getsockname()
        sent, begin = 0, time.perf_counter()
        while (taken := time.perf_counter() - begin) < at_least_s:
            for _ in range(20):  # With thousands of rules one takes milliseconds.
                sender.sendto(b"", address)
            sent += 20
        return taken / sent


# Leaks ---------------------------------------------------------------------------------------


@frozen
class Leak:
    """What a uid of the pool sent while its rules were applied again and again."""

    backend: str
    uids: int
    applied: int
    tried: int
    arrived: int
    arrived_without_rules: int


def _leaked(name: BackendName, effort: Effort) -> Leak:
    backend = make_backend(name, TAG)
    size = effort.pick(1_000, 100, 100)
    pairs = Pool(size, True).pairs
    policies = [Policy(pairs), Policy((*pairs, (FIRST - 10, FIRST - 10)))]
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sink:
        sink.bind(("127.0.0.1", 0))
        with _sender(FIRST, sink) as tries:
            without_rules = _drained(sink, 0.2)
            backend.apply(policies[0])
            _drained(sink, 0.2)
            begin = tries()
            times = effort.pick(50, 10, 4)
            for turn in range(times):
                backend.apply(policies[turn % 2 == 0])
                tries()  # What it counts into would be full at some time, and it would wait.
            tried = tries() - begin
            arrived = _drained(sink, 0.1)
    backend.remove()
    return Leak(name, size, times, tried, arrived, without_rules)


@contextlib.contextmanager
def _sender(uid: int, sink: socket.socket) -> Iterator[Callable[[], int]]:
    """A process of that uid that sends as fast as it can; how often it has tried."""
    out, into = os.pipe()
    pid = os.fork()
    if pid == 0:
        os.setgroups([])
        os.setresgid(uid, uid, uid)
        os.setresuid(uid, uid, uid)
        _send_for_ever(sink.getsockname(), into)
    os.close(into)
    os.set_blocking(out, False)
    total = 0

    def tries() -> int:
        nonlocal total
        with contextlib.suppress(BlockingIOError):
            while counted := os.read(out, 1 << 16):
                total += 100 * len(counted)
        return total

    try:
        yield tries
    finally:
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
        os.close(out)


def _send_for_ever(address: tuple[str, int], counter: int) -> None:
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sender:
        while True:
            for _ in range(100):
                with contextlib.suppress(OSError):
                    sender.sendto(b"x", address)
            os.write(counter, b".")


def _drained(sink: socket.socket, seconds: float) -> int:
    """What arrives within that time, and what had arrived."""
    sink.settimeout(seconds)
    arrived, end = 0, time.monotonic() + seconds
    with contextlib.suppress(TimeoutError):
        while time.monotonic() < end:
            sink.recv(16)
            arrived += 1
    return arrived


# What is told --------------------------------------------------------------------------------


def _report(
    applied: Sequence[Applied],
    packets: dict[bool, dict[tuple[str, int], Series]],
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
    packets: dict[bool, dict[tuple[str, int], Series]],
) -> tuple[list[bool], list[dict[tuple[str, int], Series]]]:
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


def _packet_table(is_scattered: bool, found: dict[tuple[str, int], Series]) -> Table:
    base = found[NO_RULES, 0][PACKET]
    rows: list[tuple[Cell, ...]] = [
        (way, size, summarise(series[PACKET], scale=1e6), ratio(series[PACKET], base))
        for (way, size), series in sorted(found.items())
    ]
    words = Pool(2, is_scattered).words
    head = ("rules", "uids", "a packet, us", "x no rules")
    title = f"A packet of a uid that is in no pool ({words})"
    return Table(f"packet_{'scattered' if is_scattered else 'range'}", title, head, tuple(rows))


def _packet_plot(is_scattered: bool, found: dict[tuple[str, int], Series]) -> Plot:
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


def _targets(scattered: dict[tuple[str, int], Series], leaks: Sequence[Leak]) -> tuple[Target, ...]:
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
