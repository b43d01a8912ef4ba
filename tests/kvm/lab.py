"""A root of its own with a cluster in it, and what a test does to it."""

import asyncio
import contextlib
import json
import os
import shutil
import signal
import socket
import tempfile
import time
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path
from typing import Any

from hypervisor import tiny
from hypervisor.cgroup_mounts import mounted
from kvmsec import InstanceDefinition, Node, definition_from
from kvmsec.cluster import operations
from kvmsec.cluster.nodes import Alone
from kvmsec.linux import command, namespaces, relay
from tests.kvm.census import census, descriptors, ends_by, running
from tests.kvm.rival import Rival
from tests.kvm.serial_line import Line
from tests.root.hypervisor.jailed import spares_of, wait_until
from uidpool import provision
from uidpool.ranges import UidRanges
from uidpool.snapshot import Snapshot
from uidpool.steps import carry_out

POOL = UidRanges.parse("245000-245029")
DOMAIN = "guestkeeper"
DOMAIN_UID = 245900
DEADLINE_S = 30.0
ENDING_S = 5.0
PIDFD = "anon_inode:[pidfd]"  # As /proc/PID/fd has it.


class Lab:
    """A root of its own with a cluster in it, and what a test does to it and looks at it with."""

    pool = POOL
    domain = DOMAIN
    domain_uid = DOMAIN_UID

    def __init__(self, root: Path, accelerator: str) -> None:
        self.root = root
        self.accelerator = accelerator
        self.note_what_is_there()

    def note_what_is_there(self, node: Node | None = None) -> None:
        """Take what is there now for nobody's leftovers, with what a node keeps until it closes."""
        self._nursery = None
        if node is not None:
            self._nursery = node.host.nursery
            self._nursery.begin()
        self._before = running()
        self._interfaces = sorted(name for _, name in socket.if_nameindex())
        self._descriptors = descriptors()

    @property
    def paths(self) -> Any:
        return Node(self.root).host.paths

    @property
    def claims(self) -> Any:
        return Node(self.root).host.claims

    def definition(self, name: str = "web", **keys: Any) -> InstanceDefinition:
        """A tiny guest of 1 MiB."""
        document = {
            "memory_mib": 1,
            "firmware": str(tiny.rom_path()),
            "accelerator": self.accelerator,
            **keys,
        }
        return definition_from(document, name, source="the test")

    def run(self, work: Callable[[Node], Awaitable[Any]], **options: Any) -> Any:
        """Run a coroutine on a node of its own."""

        async def whole() -> Any:
            node = Node(self.root, **options)
            try:
                async with asyncio.timeout(3 * DEADLINE_S):
                    return await work(node)
            finally:
                await node.close()

        return asyncio.run(whole())

    def start(self, name: str = "web", **keys: Any) -> Any:
        return self.run(lambda node: node.start(self.definition(name, **keys)))

    def stop(self, name: str = "web", *, force: bool = True, **options: Any) -> Any:
        return self.run(lambda node: node.stop(name, force=force, **options))

    def instances(self) -> dict[str, Any]:
        return {one.name: one for one in self.run(lambda node: node.list())}

    def reconcile(self) -> tuple[str, ...]:
        """Reconcile, as if a minute had passed since anything was written."""
        for path in self._half_written():
            os.utime(path, (0, 0))
        done = self.run(lambda node: node.reconcile())
        return tuple(line for line in done if "half written" not in line)

    def _half_written(self) -> list[str]:
        shared = self.paths.image_holdings.glob(".*.*")
        return [str(path) for path in (*self.root.rglob(".*.*"), *shared)]

    def rival(self, work: Callable[[Node], Awaitable[Any]], **options: Any) -> Rival:
        """Run a coroutine on a node in another process."""
        return Rival(lambda: self.run(work, **options))

    def line(self, name: str = "web") -> Line:
        return Line(self.paths.instance(name).serial_socket)

    def disk(self, name: str = "disk.raw") -> Path:
        """A raw image that only root may open."""
        path = self.root / name
        path.touch(mode=0o600)
        os.truncate(path, 1 << 20)
        return path

    def configure(self, text: str) -> None:
        """Write kvmsec.toml."""
        self.paths.config.write_text(text)

    def init(self, **options: Any) -> None:
        pool = options.pop("uid_pool", self.pool)
        self.run(lambda node: operations.init(node.host.store, node, "lab", uid_pool=pool))

    def modify(self, **change: Any) -> Any:
        from kvmsec.cluster.changes import Change

        async def act(node: Node) -> Any:
            return (await operations.modify(node.host.store, Alone(node), Change(**change))).cluster

        return self.run(act)

    def destroy(self) -> None:
        self.run(lambda node: operations.destroy(node.host.store, node))

    def leases(self) -> list[Any]:
        """The uids that this root's instances hold."""
        return [one for one in self.claims.leases() if one.root == str(self.root)]

    def holdings(self) -> list[Any]:
        """What this root's instances are said to have open, to other roots."""
        found = [path.read_text() for path in self.paths.image_holdings.glob("[!.]*")]
        return [one for one in found if json.loads(one)["root"] == str(self.root)]

    def groups(self) -> list[str]:
        """The control groups of this root, in every hierarchy."""
        ours = (f"{mount.path}/kvmsec/{self.paths.tag}" for mount in mounted())
        return [directory for top in ours for directory, _, _ in os.walk(top)]

    def leftovers(self, *, is_node_open: bool = False) -> dict[str, object]:
        """What is still there of this root's instances: nothing, once they have all ended.

        is_node_open: a node of this process has started some, and isn't closed yet. Processes that
        are ending get ENDING_S for it, all together.
        """
        paths = self.paths
        relay.collect_ended(ENDING_S)
        spares = self._spares() if is_node_open else []
        descriptors_before = {*self._descriptors, *(f"{one.pidfd} {PIDFD}" for one in spares)}
        found = {
            "files": [*map(str, paths.instances.rglob("*")), *map(str, paths.locks.iterdir())],
            "half-written files": self._half_written(),
            "mounts": self._mounts(),
            "leases": self.leases(),
            "images in use": self.holdings(),
            "quarantine": self.claims.quarantined(),
            "interfaces": [
                name for _, name in socket.if_nameindex() if name not in self._interfaces
            ],
            "control groups": self.groups(),
            "descriptors": [
                one
                for one in descriptors()
                # A node keeps its trees until it is closed (tests/kvm/test_upgrades.py).
                if one not in descriptors_before and not (is_node_open and " mnt:[" in one)
            ],
            "processes": self._processes_left({one.pid for one in spares}),
        }  # fmt: skip
        return {what: left for what, left in found.items() if left}

    def _mounts(self) -> list[str]:
        lines = Path("/proc/self/mounts").read_text().splitlines()
        return [line for line in lines if line.split()[1].startswith(f"{self.root}/")]

    def _spares(self) -> list[Any]:
        """What a node that is noted has ready for its next start: one process, and no more."""
        if self._nursery is None:
            return []
        self._nursery.prepare()
        wait_until(lambda: len(spares_of(self._nursery)) == 1)
        return self._nursery._spares

    def _processes_left(self, spares: set[int]) -> list[str]:
        with contextlib.suppress(ChildProcessError):
            # A node that is closed collects nobody whose end it did not see to.
            while os.waitpid(-1, os.WNOHANG)[0]:
                continue
        end = time.monotonic() + ENDING_S
        new = [
            (pid, what) for pid, what in running().items() if pid not in {*self._before, *spares}
        ]
        return [f"{pid} {what}" for pid, what in new if not ends_by(pid, end)]

    def rules(self) -> str:
        """The uids that this root's packet rules hold now."""
        return str(self.run(lambda node: node.show_rules())["uids"])

    def close(self) -> None:
        """End what a failed test has left, so that it is no other test's."""
        trying = contextlib.suppress(Exception)
        with trying:
            for one in self.instances():
                with trying:
                    self.stop(one)
        for pid in running().keys() - self._before.keys():
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        with trying:
            for lease in self.leases():
                carry_out(self.claims.releasing(lease.key), self.claims.take)
            for quarantine in self.claims.quarantined():
                carry_out(self.claims.retrying(quarantine.uid), self.claims.take)
        for line in self._mounts():
            with trying:
                namespaces.umount(line.split()[1], namespaces.MNT_DETACH)
        # Control groups are the host's: they do not end with the sandbox.
        for group in reversed(self.groups()):
            with contextlib.suppress(OSError):
                os.rmdir(group)

    def remove(self) -> None:
        """Have the cluster no more, and then the root."""
        with contextlib.ExitStack() as afterwards:
            afterwards.callback(shutil.rmtree, self.root)
            if self.paths.cluster.exists():
                self.destroy()


@contextlib.contextmanager
def users() -> Iterator[None]:
    """The users of every test's pool, and the one that owns instances under `user`."""
    accounts = [Path("/etc", name) for name in ("passwd", "group", "shadow", "gshadow")]
    before = {path: path.read_bytes() for path in accounts}
    provision.apply(provision.plan(POOL, Snapshot.read()))
    line = f'u {DOMAIN} {DOMAIN_UID} "keeps guests" / /usr/sbin/nologin\n'
    command.run(["systemd-sysusers", "-"], input=line.encode(), timeout_s=30)
    try:
        yield
    finally:
        for path, content in before.items():
            path.write_bytes(content)


@contextlib.contextmanager
def labs(accelerator: str, features: Path) -> Iterator[Callable[..., Lab]]:
    """Makes roots, each with a cluster that has the pool; the host is as before afterwards.

    `features` is where is kept what was found out about QEMU.
    """
    # Imported here, it is not by each of the processes that are forked off.
    import pyroute2  # noqa: F401

    # Those of an earlier test: a relay that has ended is collected when the next one begins.
    relay.collect_ended(ENDING_S)
    before, made = census(), []

    def make(config: str = "", **options: Any) -> Lab:
        # Its name is this run's alone: control groups are shared with other sandboxes.
        lab = Lab(Path(tempfile.mkdtemp(prefix="kvmsec-", dir="/run")), accelerator)
        made.append(lab)
        lab.paths.make_directories()
        if config:
            lab.configure(config)
        shutil.copytree(features, lab.paths.features, dirs_exist_ok=True)
        lab.init(**options)
        return lab

    try:
        yield make
        left = {str(lab.root): found for lab in made if (found := lab.leftovers())}
    finally:
        with contextlib.ExitStack() as ends:  # Each is called, whatever another raises.
            for lab in made:
                ends.callback(lab.remove)
                shutil.copytree(lab.paths.features, features, dirs_exist_ok=True)
            for lab in made:
                ends.callback(lab.close)
    assert not left, left
    now = census()
    changed = {what: (was, now[what]) for what, was in before.items() if now[what] != was}
    assert not changed, changed
