"""The agent of this node: what a daemon and the command line drive instances with."""

import asyncio
import os
import socket
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import aclosing, asynccontextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final
from weakref import WeakValueDictionary

from kvmsec.agent import Event, Finding, InstanceInfo, InstanceLog, InstanceState, UidState
from kvmsec.errors import AlreadyRunning, InstancesRun, NotRoot, UnknownInstance
from kvmsec.linux.errors import Fault
from kvmsec.linux.locks import FileLock
from kvmsec.model.instance import InstanceDefinition
from kvmsec.node import records
from kvmsec.node.host import Host
from kvmsec.node.listing import describe, describe_all, read_log
from kvmsec.node.turns import give_back
from kvmsec.node.waiting import acquire
from kvmsec.node.watches import Watches
from kvmsec.paths import Paths

if TYPE_CHECKING:
    from uidpool.accounts import Problem
    from uidpool.ranges import UidRanges

_LOCK_TIMEOUT_S: Final = 120.0


class LocalNode:
    """This node; all its files lie below `root`.

    For one event loop and a process with one thread (a start forks). `on_step` is told the name of
    each step of a start before it is taken. `without_locks` is for tests of the other locks alone,
    and nothing that reads a setting, an option or an order may pass it: what is named there
    (`hypervisor.jail.LOCKS`) no instance is confined by that this object starts.
    """

    def __init__(
        self,
        root: Path | str = "/",
        *,
        on_step: Callable[[str], None] = lambda step: None,
        without_locks: frozenset[str] = frozenset(),
    ) -> None:
        self.host = Host(Paths(root))
        self._on_step = on_step
        self._without_locks = without_locks
        # Each for as long as somebody has it or waits for it.
        self._turns: WeakValueDictionary[str, asyncio.Lock] = WeakValueDictionary()
        self._watches = Watches(self.host, self._turn)
        self.host.settled = self._watches.settled

    async def start(self, definition: InstanceDefinition) -> InstanceInfo:
        """Start an instance; returns once its guest runs.

        Raises AlreadyRunning, LockBusy while another command works on it, PoolExhausted before
        a disk is opened, and otherwise the error of the step that failed, with everything that
        had been made taken back.
        """
        self._require_root()
        self.host.nursery.begin()  # Before all that a start loads: it would have a copy of it.
        from kvmsec.node.admission import admit
        from kvmsec.node.launch import launch

        name = definition.name
        await self.reconcile()
        async with self._turn(name):
            await self._require_stopped(name)
            if self._watches.unwatch(name):
                self._watches.publish_end(name)
            security = admit(self.host, definition)
            self._watches.publish(name, InstanceState.STARTING)
            try:
                record = await launch(
                    self.host,
                    definition,
                    security,
                    self._on_step,
                    without_locks=self._without_locks,
                )
            except BaseException as error:
                self._watches.publish(name, InstanceState.STOPPED, str(error))
                raise
            finally:
                self.host.nursery.prepare()  # For the next start.
            records.forget(self.host.paths, name)
            self._watches.publish(name, InstanceState.RUNNING)
            self._watches.watch(record)
            return describe(self.host, record)

    async def _require_stopped(self, name: str) -> None:
        """Refuse a start of what runs; what ended or was interrupted is settled first."""
        from kvmsec.node.reconcile import is_true, settle_record

        record = records.load(self.host.paths, name)
        if record is None:
            return
        if is_true(record):
            raise AlreadyRunning(name)
        await settle_record(self.host, record)

    async def stop(
        self, name: str, *, timeout_s: float = 60.0, force: bool = False
    ) -> InstanceInfo:
        """End an instance; returns when its uid is clean and released.

        ACPI powerdown first; SIGKILL after `timeout_s` seconds, or at once with `force`. An
        instance that has ended already is fine. Raises UnknownInstance.
        """
        from kvmsec.node.halt import halt

        # An interrupted stop that `reconcile` finishes was of an instance that is known.
        was_here = self.host.paths.instance(name).directory.exists()
        await self.reconcile()
        async with self._turn(name):
            record = records.load(self.host.paths, name)
            if record is None:
                if self._watches.unwatch(name):
                    self._watches.publish_end(name)
                return self._ended_already(name, was_here)
            self._watches.publish(name, InstanceState.STOPPING)
            reason = await halt(self.host, record, 0.0 if force else timeout_s)
            self._watches.unwatch(name)
            self._watches.publish(name, InstanceState.STOPPED, reason)
            return InstanceInfo(name=name, state=InstanceState.STOPPED, reason=reason)

    def _ended_already(self, name: str, was_here: bool) -> InstanceInfo:
        is_known = records.forget(self.host.paths, name) or was_here
        if not is_known and not self.host.paths.definition(name).is_file():
            raise UnknownInstance(name)
        return InstanceInfo(name=name, state=InstanceState.STOPPED)

    async def reboot(self, name: str) -> None:
        """Reset the guest; its process, its uid and everything it was lent stay.

        Raises UnknownInstance when it doesn't run, and MonitorError.
        """
        from hypervisor.monitor import Monitor

        await self.reconcile()
        async with self._turn(name):
            if records.load(self.host.paths, name) is None:
                raise UnknownInstance(name)
            async with await Monitor.connect(self.host.paths.instance(name).qmp_socket) as monitor:
                await monitor.reset()

    async def list(self) -> tuple[InstanceInfo, ...]:
        """Every instance of this node, by name; reads only."""
        return tuple(describe_all(self.host))

    async def info(self, name: str) -> InstanceInfo:
        """One instance and its details; reads only. Raises UnknownInstance."""
        for found in describe_all(self.host, only=name):
            return found
        raise UnknownInstance(name)

    async def log(self, name: str) -> InstanceLog:
        """What kvmsec and the instance itself have said. Raises UnknownInstance."""
        return read_log(self.host, name)

    async def uid_states(self, *, with_free: bool = False) -> tuple[UidState, ...]:
        """The uids of the pool, and those that are held or kept back; reads only."""
        from kvmsec.node.uids import uid_states

        return uid_states(self.host, with_free=with_free)

    async def release_uid(self, uid: int) -> UidState:
        """Clean a quarantined uid. Raises UidNotClean with what is left, UidHeld, ClaimsError."""
        from kvmsec.node.uids import release_uid

        await self.reconcile()
        return await release_uid(self.host, uid)

    async def apply_rules(self) -> None:
        """Put this root's packet rules in place. Raises FirewallError."""
        await self.reconcile()
        await self.host.rules.apply()

    async def verify_rules(self) -> tuple[Finding, ...]:
        """Hold the packet rules against what they must be; each way in which they differ."""
        return self.host.rules.verify()

    async def show_rules(self) -> Mapping[str, Any]:
        """The rules in force, their counters and the last drops, as JSON has it."""
        return self.host.rules.firewall.show()

    async def remove_rules(self, *, force: bool = False) -> None:
        """Take this root's packet rules away. Raises InstancesRun unless `force`."""
        await self.reconcile()
        if not force:
            guarded = [one.name for one in records.every(self.host.paths) if one.uid]
            if guarded:
                raise InstancesRun(guarded)
        await self.host.rules.remove()

    async def doctor(self) -> tuple[Finding, ...]:
        """Whether this host is ready, check by check; reads only."""
        from kvmsec.node.doctor import examine

        return tuple(await examine(self.host))

    async def reconcile(self) -> tuple[str, ...]:
        """Put right what killed processes left; says what was done, a line each."""
        from kvmsec.cluster.nodes import Alone
        from kvmsec.cluster.operations import settle
        from kvmsec.node.reconcile import reconcile

        self._require_root()
        self.host.prepare()
        done = await reconcile(self.host, self._watches.alive())
        try:
            cluster, _ = self.host.store.load()
            # With several members it takes all of them to say that nobody holds a uid any more.
            if cluster is not None and cluster.draining and len(cluster.nodes) == 1:
                await settle(self.host.store, Alone(self))
        except (Fault, OSError) as error:
            return (*done, f"draining uids: left as they are: {error}")
        return done

    async def events(self) -> AsyncIterator[Event]:
        """What happens to this node's instances from the first `anext` on.

        Starts and stops through this object, and every end of a running instance. A listener that
        falls more than 256 events behind loses the oldest.
        """
        async with aclosing(self._watches.listen()) as heard:
            async for event in heard:
                yield event

    async def close(self) -> None:
        """Stop watching, and let go of what is kept for the next start; instances live on."""
        try:
            await self._watches.close()
        finally:
            self.host.close()

    def _require_root(self) -> None:
        if os.geteuid() != 0:
            raise NotRoot("acting on instances")

    # What a cluster asks of a node (kvmsec.cluster.nodes.ClusterNode) ----------------------

    @property
    def name(self) -> str:
        return socket.gethostname()

    async def check_pool(self, uids: "UidRanges") -> Sequence["Problem"]:
        """What keeps these uids from being in the pool on this node."""
        from kvmsec.node.uids import used_by_others
        from uidpool.accounts import AccountRules, check_pool

        rules = AccountRules(self.host.config.uids.freed_ranges)
        return (*check_pool(uids, rules), *used_by_others(self.host, uids))

    async def held_uids(self) -> Mapping[int, str]:
        """Each uid that an instance of this root holds, or that is quarantined: by whom, or why."""
        from kvmsec.node.uids import held_uids

        return held_uids(self.host)

    async def running_instances(self) -> Sequence[str]:
        """The names of the instances of this root that run, start or stop."""
        return records.names(self.host.paths)

    async def sync_rules(self) -> None:
        """Make the packet rules hold what the cluster's state and the records say, and no more.

        The list of candidates is brought up to the state before that.
        """
        from kvmsec.node.candidates import write_candidates

        self.host.prepare()
        write_candidates(self.host.paths, self.host.store)
        await self.host.rules.sync()

    async def forget_resting(self) -> None:
        """Forget which uids of this root rest; what is leased or quarantined is kept."""
        from kvmsec.node import leasing

        await leasing.forget_resting(self.host.claims)

    @asynccontextmanager
    async def _turn(self, name: str) -> AsyncIterator[None]:
        """The right to act on an instance: among this process's tasks, and among processes."""
        turn = self._turns.setdefault(name, asyncio.Lock())
        async with turn:
            lock = FileLock(self.host.paths.instance_lock(name))
            await acquire(lock, _LOCK_TIMEOUT_S)
            try:
                yield
            finally:
                give_back(self.host.paths, name, lock)
