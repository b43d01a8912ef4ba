"""One loop for all that is compared: what slows the machine down slows down each of them."""

import random
import time
from collections.abc import Awaitable, Callable, Mapping
from pathlib import Path

Sample = Mapping[str, float]
Work = Callable[[], Awaitable[Sample]]
Series = dict[str, list[float]]

_TICK_S = 0.01  # USER_HZ, which is 100 on every architecture that QEMU has KVM on (time(7)).


async def interleave(
    rounds: int, works: Mapping[str, Work], *, warm_up: int = 1
) -> dict[str, Series]:
    """Do each work once a round, and return what each measured, by its name and the sample's.

    The order is another one each round: who comes next finds the processor's caches as the one
    before left them. The samples of the `warm_up` rounds before are let go: they import, and fill
    caches.
    """
    names = list(works)
    shuffled = random.Random(len(names))  # The same orders each run.
    found: dict[str, Series] = {name: {} for name in names}
    for turn in range(warm_up + rounds):
        for name in shuffled.sample(names, len(names)):
            sample = await works[name]()
            if turn < warm_up:
                continue
            for what, value in sample.items():
                found[name].setdefault(what, []).append(value)
    return found


def host_cpu_s() -> float:
    """Seconds that all processors together have worked, since boot; in steps of 10 ms.

    What a hypervisor above took away, and waiting, is no work (proc_stat(5)).
    """
    fields = Path("/proc/stat").read_text().split(maxsplit=9)[1:9]
    user, nice, system, _idle, _iowait, irq, softirq, _steal = map(int, fields)
    return (user + nice + system + irq + softirq) * _TICK_S


class Stopwatch:
    """Seconds since it was made, or since the last lap."""

    def __init__(self) -> None:
        self._since = time.perf_counter()

    def lap(self) -> float:
        now = time.perf_counter()
        taken, self._since = now - self._since, now
        return taken
