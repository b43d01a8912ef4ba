"""What packet rules cost, in milliseconds: `python benchmarks/rules.py`, as root.

Runs in network and mount namespaces of its own and touches nothing of the host's.
"""

import os
import socket
import statistics
import subprocess
import sys
import time
from collections.abc import Callable

from firewall.backend import Backend, BackendName, make_backend
from firewall.guard import Firewall
from firewall.policy import Policy
from kvmsec.linux.namespaces import CLONE_NEWNET, CLONE_NEWNS, MS_PRIVATE, MS_REC, mount, unshare

ONE_RANGE = Policy(((100_000, 199_999),))
OTHER_RANGE = Policy(((100_000, 199_998),))
SCATTERED = Policy(tuple((100_000 + 100 * n, 100_049 + 100 * n) for n in range(1000)))
PACKETS = 20_000


def main() -> int:
    if os.geteuid() != 0:
        print("rules.py: run it as root", file=sys.stderr)
        return 1
    unshare(CLONE_NEWNET | CLONE_NEWNS)
    mount(None, "/", None, MS_REC | MS_PRIVATE)
    mount("private", "/run", "tmpfs", 0)
    subprocess.run(["ip", "link", "set", "lo", "up"], check=True)
    report("a packet of another uid without rules, us", per_packet_us())
    for name in ("nftables", "iptables"):
        measure_backend(name)
    return 0


def measure_backend(name: BackendName) -> None:
    backend = make_backend(name, "kvmsec")
    print(f"\n{name}")
    report("first apply in a new namespace", once(lambda: backend.apply(ONE_RANGE)))
    measure_applies(backend)
    if name == "iptables":
        import iptc  # noqa: F401  (from here on the forked children need not import it)

        print("  with python-iptables imported before")
        measure_applies(backend)
    backend.apply(ONE_RANGE)
    report("a packet of another uid, one range, us", per_packet_us())
    firewall = Firewall(name)
    report("proof by packet", median(lambda: firewall.prove(100_500, 100_500, ONE_RANGE), 51))
    report("reading the drop counters", median(backend.dropped, 51))
    backend.apply(SCATTERED)
    report("a packet of another uid, 1,000 ranges, us", per_packet_us())
    report("proof by packet, 1,000 ranges", median(lambda: prove_scattered(firewall), 21))
    report("remove", once(backend.remove))


def prove_scattered(firewall: Firewall) -> None:
    firewall.prove(100_500, 100_500, SCATTERED)


def measure_applies(backend: Backend) -> None:
    report("apply 100,000 uids in one range, no rules before", fresh(backend, ONE_RANGE))
    report("apply 1,000 ranges, no rules before", fresh(backend, SCATTERED))
    backend.apply(ONE_RANGE)
    policies = [OTHER_RANGE, ONE_RANGE] * 3
    report("apply a changed range", median_of([lambda p=p: backend.apply(p) for p in policies]))
    report("apply what holds already", median(lambda: backend.apply(ONE_RANGE), 11))


def fresh(backend: Backend, policy: Policy) -> float:
    """The median of applying to no rules; removing them is not counted."""
    taken = []
    for _ in range(7):
        backend.remove()
        taken.append(once(lambda: backend.apply(policy)))
    return statistics.median(taken)


def per_packet_us() -> float:
    """A datagram of root's over loopback, to a socket that nobody reads."""
    kind = (socket.AF_INET, socket.SOCK_DGRAM)
    with socket.socket(*kind) as sender, socket.socket(*kind) as sink:
        sink.bind(("127.0.0.1", 0))
        address = sink.getsockname()
        start = time.perf_counter()
        for _ in range(PACKETS):
            sender.sendto(b"", address)
        return (time.perf_counter() - start) / PACKETS * 1e6


def once(function: Callable[[], object]) -> float:
    start = time.perf_counter()
    function()
    return (time.perf_counter() - start) * 1e3


def median(function: Callable[[], object], times: int) -> float:
    return statistics.median(once(function) for _ in range(times))


def median_of(functions: list[Callable[[], object]]) -> float:
    return statistics.median(once(function) for function in functions)


def report(what: str, value: float) -> None:
    print(f"  {what:<52} {value:9.2f}")


if __name__ == "__main__":
    sys.exit(main())
