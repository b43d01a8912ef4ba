"""The switch that a lab's nodes are cabled to: a bridge in a network namespace of its own."""

import contextlib
import itertools
import os
from collections.abc import Iterator
from typing import Self

from kvmsec.linux import command
from kvmsec.linux.errors import CommandFailed
from kvmsec.linux.namespaces import CLONE_NEWNET, setns
from tests.cable import new_namespace

_EMPTY_CHAIN = """add table bridge loss
delete table bridge loss
add table bridge loss
add chain bridge loss forward { type filter hook forward priority 0; }
"""


class Switch:
    """Cables to nodes that can be cut, and lose packets. Nodes see nothing of its own rules."""

    def __init__(self) -> None:
        with new_namespace():
            self._namespace = os.open("/proc/self/ns/net", os.O_RDONLY | os.O_CLOEXEC)
        self._numbers = itertools.count(1)
        self._losses: dict[str, int] = {}
        # A port forwards at once: nothing is learned of a spanning tree first.
        bridge = "type bridge stp_state 0 forward_delay 0 mcast_snooping 0"
        self.run("ip", "link", "add", "switch", *bridge.split())
        self.run("ip", "link", "set", "switch", "up")

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        os.close(self._namespace)

    @contextlib.contextmanager
    def entered(self) -> Iterator[None]:
        """The caller, which has one thread, is in the switch's network namespace meanwhile."""
        home = os.open("/proc/self/ns/net", os.O_RDONLY | os.O_CLOEXEC)
        setns(self._namespace, CLONE_NEWNET)
        try:
            yield
        finally:
            setns(home, CLONE_NEWNET)
            os.close(home)

    def run(self, *argv: str, rules: str = "") -> str:
        """Run a tool of the system's at the switch; its output."""
        with self.entered():
            return command.run(argv, input=rules.encode(), timeout_s=30).stdout.decode()

    def plug_in(self, pid: int, mac: str) -> str:
        """Lay a cable to the node of that process, `eth0` there; returns its name here."""
        cable = f"cable{next(self._numbers)}"
        self.run(
            *("ip", "link", "add", cable, "type", "veth"),
            *("peer", "name", "eth0", "address", mac, "netns", str(pid)),
        )
        self.run("ip", "link", "set", cable, "master", "switch", "up")
        return cable

    def unplug(self, cable: str) -> None:
        """Take the cable of a node away; it may be gone with the node."""
        self.lose(cable, 0)
        with contextlib.suppress(CommandFailed):
            self.run("ip", "link", "delete", cable)

    def cut(self, cable: str) -> None:
        self.run("ip", "link", "set", cable, "down")

    def mend(self, cable: str) -> None:
        self.run("ip", "link", "set", cable, "up")

    def lose(self, cable: str, percent: int) -> None:
        """Lose so many of a hundred packets, each way; 0: none any more."""
        if self._losses.get(cable, 0) == percent:
            return
        self._losses[cable] = percent
        rules = "".join(
            f"add rule bridge loss forward {way} {cable} {_of_a_hundred(share)} drop\n"
            for cable, share in self._losses.items()
            if share
            for way in ("iifname", "oifname")
        )
        self.run("nft", "-f", "-", rules=_EMPTY_CHAIN + rules)


def _of_a_hundred(share: int) -> str:
    return "" if share == 100 else f"numgen random mod 100 < {share}"
