"""A cluster of a lab's nodes, each served by its daemon; and how it is made whole again."""

import contextlib
import json
import shutil
import signal
import time
from collections.abc import Callable, Sequence
from typing import Any, Final

from hypervisor import tiny
from tests.cluster.lab.lab import Lab
from tests.cluster.lab.node import PROGRAM, Node
from tests.cluster.lab.process import Finished, Process

POOL: Final = "246000-246019"
SPARE: Final = "246020-246029"
"""Uids whose users every node has, and which no pool has unless a test puts them in."""
_FRONT: Final = ("useradd", "--system", "--user-group", "--shell", "/usr/sbin/nologin")
_SETTINGS: Final = """[remote]
firmware_folders = ["{}"]
[cluster]
copy_valid_s = 60  # The least: the master looks after its members four times in it.
"""
_READY_S: Final = 30.0
_CONVERGED_S: Final = 60.0


class Formation:
    """The nodes of `lab` in one cluster; `node1` is the master, the others are plain."""

    def __init__(self, lab: Lab, accelerator: str) -> None:
        self.lab = lab
        self.accelerator = accelerator
        self.daemons: dict[str, Process] = {}
        self._kept = lab.directory / "kept"

    @property
    def master(self) -> Node:
        return self.lab.first

    # Making it ---------------------------------------------------------------------------------

    def furnish(self) -> None:
        """The users of the front and of the pool, and what a remote order may name."""
        folder = tiny.rom_path().parent
        self.master.run(*_FRONT, "kvmsec-front")
        self.master.kvmsec("uids", "provision", f"{POOL},{SPARE}")
        for node in self.lab.nodes:
            node.configure(_SETTINGS.format(folder))
        for node in self.lab.others:  # The same everywhere, as from one image.
            for name in ("passwd", "group", "shadow", "gshadow"):
                shutil.copy2(self.master.path(f"/etc/{name}"), node.path(f"/etc/{name}"))

    def form(self) -> None:
        """Found the cluster on the first node, and bring in all others."""
        self.furnish()
        self.master.kvmsec("cluster", "init", "--name", "lab", "--uid-pool", POOL)
        self.serve(self.master)
        for node in self.lab.others:
            self.add(node)
        self.require_sound()

    def invite(self, node: Node) -> None:
        """Give a node its token, and have its daemon answer to it."""
        token = self.master.kvmsec("node", "invite", node.name).stdout.split()[0]
        node.kvmsec("node", "join", input=token.encode())
        self.serve(node)

    def add(self, node: Node) -> Finished:
        self.invite(node)
        return self.master.kvmsec("node", "add", node.name)

    # Daemons -----------------------------------------------------------------------------------

    def serve(self, node: Node) -> Process:
        """Start a node's daemon, anew if there is one, and wait until it answers this host."""
        if (running := self.daemons.pop(node.name, None)) is not None:
            running.end()
        daemon = node.spawn(*PROGRAM, "node", "serve", name="daemon")
        self.daemons[node.name] = daemon
        until(lambda: answers(node) or daemon.ends_within(0), _READY_S, lambda: daemon.said)
        assert not daemon.ends_within(0), daemon.said
        return daemon

    def stop(self, node: Node) -> None:
        """End a node's daemon as an admin does; it ends all that it started."""
        daemon = self.daemons.pop(node.name)
        daemon.signal(signal.SIGTERM)
        assert daemon.status(30) == 0, daemon.said

    def kill_daemon(self, node: Node) -> None:
        """SIGKILL the root part alone; what it started is left to itself."""
        daemon = self.daemons.pop(node.name)
        daemon.signal(signal.SIGKILL)
        daemon.status(10)

    # What is asked of it -----------------------------------------------------------------------

    def start(self, name: str, node: Node, *, by: Node | None = None, **options: Any) -> Finished:
        """Start a tiny guest on a node, as the master orders."""
        machine = ("--firmware", str(tiny.rom_path()), "--memory", "1")
        where = ("--node", node.name, "--accel", self.accelerator)
        return (by or self.master).kvmsec("instance", "start", name, *machine, *where, **options)

    def verify(self, node: Node | None = None) -> list[dict[str, Any]]:
        """The findings of `cluster verify`, but those that say that all is well."""
        done = (node or self.master).kvmsec("cluster", "verify", "--json", status=None)
        return [one for one in json.loads(done.stdout) if one["severity"] != "ok"]

    def errors(self) -> list[dict[str, Any]]:
        return [one for one in self.verify() if one["severity"] == "error"]

    def require_sound(self) -> None:
        """Wait until `cluster verify` finds no error: what was away comes back by itself."""
        found: list[Any] = []

        def is_sound() -> bool:
            found[:] = self.errors()
            return not found

        until(is_sound, _CONVERGED_S, lambda: f"{found}\n{self.words()}")

    def words(self) -> str:
        """What the daemons have said."""
        return "\n".join(f"== {name}\n{one.said}" for name, one in self.daemons.items())

    def pool_of(self, node: Node) -> str:
        """The pool as the rules of a node have it."""
        return str(node.json("firewall", "show")["uids"])

    def wait_for_pool(self, pool: str, *, asking: Node | None = None) -> None:
        """Until every node's rules have that pool: who was away comes back by itself."""
        left = [node for node in self.lab.nodes if node.is_up]
        node = asking or self.master
        assert node.json("cluster", "info")["uid_pool"] == pool

        def have_all() -> bool:
            left[:] = [node for node in left if self.pool_of(node) != pool]
            return not left

        until(have_all, _CONVERGED_S, lambda: f"{[one.name for one in left]}\n{self.words()}")

    def wait_until(self, is_so: Callable[[], bool]) -> None:
        until(is_so, _CONVERGED_S, self.words)

    # Making it whole again ---------------------------------------------------------------------

    def keep(self) -> None:
        """Keep what is on the nodes' disks now, for `restore`."""
        for node in self.lab.nodes:
            shutil.copytree(node.path("/var/lib/kvmsec"), self._kept / node.name, symlinks=True)

    def restore(self) -> None:
        """Boot every node anew with what was kept of its disk, as after a test that failed."""
        self.daemons.clear()
        for node in self.lab.nodes:
            node.kill()
            shutil.rmtree(node.path("/var/lib/kvmsec"))
            shutil.copytree(self._kept / node.name, node.path("/var/lib/kvmsec"), symlinks=True)
            node.boot()
            node.kvmsec("firewall", "apply")
        self.serve_all(self.lab.nodes)
        self.require_sound()

    def serve_all(self, nodes: Sequence[Node]) -> None:
        for node in nodes:
            self.serve(node)


def answers(node: Node) -> bool:
    """Whether a node's daemon takes connections of root's on its host."""
    ask = "import socket; socket.socket(socket.AF_UNIX).connect('/run/kvmsec/node.sock')"
    return node.run("python3", "-c", ask, status=None).status == 0


def until(
    is_so: Callable[[], bool], deadline_s: float, evidence: Callable[[], object] = lambda: ""
) -> None:
    """Wait for something that happens by itself."""
    end = time.monotonic() + deadline_s
    while not is_so():
        assert time.monotonic() < end, f"not within {deadline_s:g} s\n{evidence()}"
        time.sleep(0.1)


@contextlib.contextmanager
def instances_ended(formation: Formation) -> Any:
    """At the end no instance runs on any node."""
    try:
        yield
    finally:
        for node in formation.lab.nodes:
            if node.is_up:
                for name in node.run("ls", "/run/kvmsec/instances").stdout.split():
                    node.kvmsec("instance", "stop", name, "--force", status=None)
