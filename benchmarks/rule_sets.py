"""Pools of uids, and the rules that an administrator writes for them with iptables."""

import subprocess
from collections.abc import Iterator, Sequence
from typing import Final

from attrs import frozen

from firewall.policy import UidPairs

FIRST: Final = 1_000_000
TAG: Final = "kvmsec"
FAMILIES: Final = ("iptables-legacy", "ip6tables-legacy")
RESTORE: Final = "iptables-restore"


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


def peer_rules(pool: Pool) -> Iterator[list[str]]:
    for first, last in pool.pairs:
        owner = ["-m", "owner", "--uid-owner", str(first) if first == last else f"{first}-{last}"]
        yield [*owner, "-j", "LOG"]
        yield [*owner, "-j", "DROP"]


def flush() -> None:
    for family in FAMILIES:
        run([family, "-F", "OUTPUT"])


def run(argv: Sequence[str], text: bytes = b"") -> None:
    subprocess.run(argv, input=text, check=True, stdout=subprocess.DEVNULL)


def restore_text(pool: Pool) -> bytes:
    lines = "\n".join(f"-A OUTPUT {' '.join(rule)}" for rule in peer_rules(pool))
    return f"*filter\n:OUTPUT ACCEPT [0:0]\n{lines}\nCOMMIT\n".encode()


def restore(text: bytes) -> None:
    for family in FAMILIES:
        run([f"{family}-restore"], text)
