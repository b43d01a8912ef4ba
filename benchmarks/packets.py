"""What a packet pays for rules that are not about it, and whether one slips through a change."""

import asyncio
import contextlib
import os
import signal
import socket
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Final

from attrs import frozen

from benchmarks.effort import Effort
from benchmarks.loop import Sample, Series, Work, interleave
from benchmarks.rule_sets import FIRST, RESTORE, TAG, Pool, restore, restore_text, run
from firewall.backend import BACKENDS, BackendName, make_backend
from firewall.policy import Policy
from kvmsec.linux import namespaces

PACKET: Final = "packet"
NO_RULES: Final = "no rules"
Costs = dict[tuple[str, int], Series]
"""What a packet of root's takes, by whose rules there are and for how many uids."""


def packet_costs(pools: Sequence[Pool], rounds: int) -> Costs:
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
            by_restore = partial(restore, restore_text(pool))
            networks[RESTORE, pool.size] = opened.enter_context(_network(by_restore))
        works = {
            f"{way} {size}": _packet_work(network) for (way, size), network in networks.items()
        }
        found = asyncio.run(interleave(rounds, works))
    return {(way, size): found[f"{way} {size}"] for way, size in networks}


@contextlib.contextmanager
def _network(apply: Callable[[], object]) -> Iterator[int]:
    """A new network namespace with rules in it, as a descriptor."""
    with _own_network():
        run(["ip", "link", "set", "lo", "up"])
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


def leaked(name: BackendName, effort: Effort) -> Leak:
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
