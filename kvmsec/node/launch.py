"""Starting an instance: one ordered list of steps, from its definition to a running guest.

Each step notes in the instance's record what it is about to make, so that whatever line the
launcher dies at, `dismantle` can take everything back. A step that fails has the same done at
once.
"""

import os
import secrets
import shlex
import time
from collections.abc import Awaitable, Callable
from contextlib import ExitStack
from datetime import UTC, datetime
from inspect import isawaitable
from typing import Any, Final

from attrs import evolve, frozen

from hypervisor import cgroups, huge_pages, images, process
from hypervisor.closure import require_trusted_parts
from hypervisor.jail import Cell, Jail, kinds_made_before
from hypervisor.monitor import Monitor, MonitorClosed, MonitorUnreachable
from hypervisor.newborn import Newborn
from hypervisor.process import QemuGone
from kvmsec.agent import InstanceState
from kvmsec.errors import NotReady, StartFailed
from kvmsec.linux import processes, syscalls, unix_sockets
from kvmsec.linux.errors import Fault
from kvmsec.linux.locks import FileLock
from kvmsec.model.instance import InstanceDefinition
from kvmsec.model.security import Security, SecurityModel
from kvmsec.node import (
    boot_files,
    image_holdings,
    images_in_use,
    journal,
    limits,
    output,
    records,
    taps,
)
from kvmsec.node.dismantle import dismantle, remove_leftover
from kvmsec.node.engine import Engine, engine_for
from kvmsec.node.grants import Lent, place
from kvmsec.node.host import Host
from kvmsec.node.identities import Identity, identity_for
from kvmsec.node.records import InstanceRecord
from kvmsec.node.waiting import acquire, readable

OnStep = Callable[[str], None]
IMAGES_TIMEOUT_S: Final = 60.0
_OWN_END_TIMEOUT_S: Final = 2.0
_SIGNS_OF_ITS_END: Final = (MonitorClosed, MonitorUnreachable, QemuGone)


async def launch(
    host: Host,
    definition: InstanceDefinition,
    security: Security,
    on_step: OnStep,
    *,
    without_locks: frozenset[str] = frozenset(),
) -> InstanceRecord:
    """Start an instance that does not run; the caller holds its lock.

    `without_locks` is for tests alone, see `hypervisor.jail.LOCKS`.

    Returns the record of the running instance. Raises the error of the step that failed, and
    StartFailed with QEMU's own words once there was a QEMU; nothing is left then.
    """
    start = _Start(host, definition, security, without_locks)
    has_ended = False
    try:
        try:
            for step in STEPS:
                on_step(step.name)
                result = step.act(start)
                if isawaitable(result):
                    await result
            await start.let_go()
        except _SIGNS_OF_ITS_END:
            has_ended = await start.ends()  # Should this be interrupted, all is taken back as well.
            raise
    except BaseException as error:
        await start.let_go()
        failure = await _take_back(start, error, has_ended=has_ended)
        if failure is None:
            raise
        raise failure from error
    return start.record


async def _take_back(
    start: "_Start", error: BaseException, *, has_ended: bool
) -> StartFailed | None:
    """Undo a start; the error to raise instead, where there is more to say than `error` does.

    has_ended: `error` comes of QEMU's own end. How it ended then says more.
    """
    name = start.record.name
    log = start.host.paths.instance_log(name)
    journal.note(log, f"start {start.record.generation} failed: {error}")
    try:
        remains = await dismantle(start.host, start.record)
    except (Fault, OSError) as problem:
        journal.note(log, f"it could not be taken back: {problem}")
        hint = "the next command takes the rest back; see that its cause is gone"
        return StartFailed(
            name, f"{error}; not all of it could be taken back: {problem}", hint=hint
        )
    if remains.words:
        journal.note(log, f"QEMU said: {remains.words}")
    # What happened before there was a QEMU, and an interruption, stay what they are.
    if not start.is_told or not isinstance(error, Fault):
        return None
    if not has_ended or remains.ended is None:
        return StartFailed(name, error.message, output=remains.words, hint=error.hint)
    hint = f"`kvmsec instance log {name}` has its command line"
    if start.machine.hugepages is not None:
        hint += "; the node must have enough free huge pages: sysctl vm.nr_hugepages"
    return StartFailed(name, f"QEMU {remains.why}", output=remains.words, hint=hint)


class _Start:
    """What one start has made so far."""

    def __init__(
        self,
        host: Host,
        definition: InstanceDefinition,
        security: Security,
        without_locks: frozenset[str],
    ) -> None:
        self.host = host
        self.security = security
        self.without_locks = without_locks
        self.machine = definition.machine
        self.opened = ExitStack()
        self.lent = Lent()
        self.engine: Engine
        self.identity: Identity
        self.allotment: limits.Allotment
        self.made: cgroups.UnboundCgroup
        self.cgroup: cgroups.InstanceCgroup
        self.monitor: Monitor | None = None
        self.log = -1
        self.output = -1
        self.cell: Cell
        self.child: Newborn
        self.is_told = False
        """Whether the child knows what to become: from then on it is QEMU that fails."""
        self.files = host.paths.instance(self.machine.name)
        self.record = InstanceRecord(
            name=self.machine.name,
            generation=secrets.token_hex(8),
            state=InstanceState.STARTING,
            model=security.model,
            domain=security.domain,
            machine=self.machine,
            launcher=processes.myself(),
            created_at=datetime.now(UTC),
            autostart=definition.autostart,
        )

    async def ends(self) -> bool:
        """Whether QEMU, which seems to be about to, ends by itself."""
        return self.is_told and await readable(self.child.pidfd, _OWN_END_TIMEOUT_S)

    def note(self, **changes: Any) -> None:
        # Kept before it is written: on a full disk, what wasn't written is taken back all the same.
        self.record = evolve(self.record, **changes)
        records.save(self.host.paths, self.record)

    async def let_go(self) -> None:
        """Close the launcher's own hold on everything; what was granted is QEMU's alone then."""
        try:
            if self.monitor is not None:
                await self.monitor.close()
        finally:
            self.opened.close()

    # The steps, in their order -----------------------------------------------------------

    def begin(self) -> None:
        self.files.make()
        records.save(self.host.paths, self.record)

    async def take_identity(self) -> None:
        self.identity = await identity_for(self.host, self.security, self.record)
        self.note(uid=self.identity.uid, user=self.identity.user)

    async def open_images(self) -> None:
        if not self.machine.disks:
            return
        lock = FileLock(self.host.paths.images_lock)
        await acquire(lock, IMAGES_TIMEOUT_S)
        try:  # from the look at the others' records to the line in our own
            disks = images_in_use.open_disks(self.machine, self.identity.inspector, self.opened)
            everything = [image for chain in disks for image in chain]
            others = [one for one in records.every(self.host.paths) if one.name != self.record.name]
            elsewhere = image_holdings.elsewhere(self.host.paths)
            images_in_use.require_unused(everything, others, elsewhere)
            for image in everything:
                images.lock(image)
            self.note(images=images_in_use.uses_of(everything))
            image_holdings.publish(self.host.paths, self.record)
        finally:
            lock.discard()
        self.lent = evolve(self.lent, disks=disks)

    def open_boot_files(self) -> None:
        opened = boot_files.open_all(self.machine, self.opened)
        self.lent = evolve(self.lent, boot_files=opened)

    async def open_taps(self) -> None:
        opened = []
        for nic in self.machine.nics:
            request = taps.TapRequest(nic.tap, nic.bridge, nic.vhost)
            tap = await taps.open_tap(
                request,
                tag=self.host.paths.tag,
                instance=self.record.name,
                remember=lambda record: self.note(taps=(*self.record.taps, record)),
            )
            self.opened.callback(tap.close)
            opened.append(tap)
        self.lent = evolve(self.lent, taps=tuple(opened))

    def bind_sockets(self) -> None:
        qmp = self.opened.enter_context(unix_sockets.listen(self.files.qmp_socket))
        serial = None
        if self.machine.serial:
            serial = self.opened.enter_context(unix_sockets.listen(self.files.serial_socket))
        self.lent = evolve(self.lent, qmp=qmp, serial=serial)

    def mount_output(self) -> None:
        size_kib = self.host.config.limits.log_kib
        self.log = output.mount(self.files.output, self.identity.credentials, size_kib)
        self.opened.callback(os.close, self.log)
        self.output = syscalls.detached_copy(str(self.files.output))
        self.opened.callback(os.close, self.output)

    async def make_cgroup(self) -> None:
        config = self.host.config
        tag, name, parent = self.host.paths.tag, self.record.name, config.cgroup.parent
        await remove_leftover(self.host.hierarchy.leftover(tag, name, parent))
        self.allotment = limits.allot(
            config, self.machine, self.security.model, huge_pages.pools_mib()
        )
        controllers = self.allotment.groups.controllers
        self.made = self.host.hierarchy.make(tag, name, parent, controllers)
        # Written down with the uid: a group that no record names is found by its name.
        self.record = evolve(self.record, cgroups=self.made.paths)

    def ask_for_child(self) -> None:
        kinds = kinds_made_before(self.without_locks)
        self.child = self.host.nursery.birth(self.made.unified, kinds)
        self.opened.callback(self.child.close)

    def find_qemu(self) -> None:
        engine = engine_for(self.host, self.machine)
        self.engine = engine
        self.record = evolve(  # Written down with the uid, too.
            self.record,
            accelerator=engine.accelerator,
            qemu=str(engine.binary),
            qemu_version=engine.features.version_text,
        )

    def bound_cgroup(self) -> None:
        config = self.host.config
        memory_bytes = limits.memory_bytes(
            config, self.machine, self.engine.accelerator, self.lent.boot_files
        )
        self.cgroup = self.made.bound(evolve(self.allotment.groups, memory_bytes=memory_bytes))
        limits.require(self.cgroup.lacks, config.confinement.may_be_missing)

    def tell_cell(self) -> None:
        tree = self.host.trees.take(self.engine.closure)
        self.opened.callback(os.close, tree)
        self.cell = Cell(
            tree,
            cgroups=self.cgroup.tasks_files,
            limits=self.allotment.process,
            without_locks=self.without_locks,
        )
        self.child.enter(self.cell)

    async def tell_jail(self) -> None:
        await self._hear_of_child()
        extra = self.host.config.qemu.extra_arguments
        placed = place(self.engine, self.machine, self.lent, extra)
        jail = Jail(
            self.cell,
            name=self.record.name,
            credentials=self.identity.credentials,
            output=self.output,
            log=self.log,
            system_calls=self.engine.system_calls,
            boot_files=self.lent.boot_files,
            has_kvm=self.engine.accelerator == "kvm",
            may_share_keyring="session-keyring" in self.host.config.confinement.may_be_missing,
            has_native_aio=any(disk.aio == "native" for disk in self.machine.disks),
            file_bytes=limits.largest_file_bytes(self.host.config, self.machine, self.lent),
            descriptors=placed.descriptors,
        )
        self.child.become(jail, placed.argv[0], placed.argv)
        self.is_told = True
        self.record = evolve(self.record, argv=placed.argv)  # Written down with the process.

    async def prove_rules(self) -> None:
        if self.security.model is not SecurityModel.NONE:
            await self.host.rules.prove(self.identity.uid, self.identity.credentials.gid)

    def check_programs(self) -> None:
        require_trusted_parts(self.engine.closure)

    def release(self) -> None:
        self.note()
        image_holdings.publish(self.host.paths, self.record)
        self.child.release()

    async def _hear_of_child(self) -> None:
        timeout_s = self.host.config.qemu.ready_timeout_s
        if not await readable(self.child.line.fileno(), timeout_s):
            self.host.nursery.close()  # Or it would take no later order either.
            raise NotReady("the process that was to become QEMU was not there", timeout_s)
        self.child.hear()
        self.opened.callback(os.close, self.child.pidfd)
        # Known before it is written down, to be ended should that fail.
        self.record = evolve(self.record, process=self.child.process)

    async def become_qemu(self) -> None:
        self._tell_what_runs()
        timeout_s = self.host.config.qemu.ready_timeout_s
        deadline = time.monotonic() + timeout_s
        while not self.child.has_said_all():
            if not await readable(self.child.fileno(), deadline - time.monotonic()):
                raise NotReady("its jail did not stand, or QEMU was not executed", timeout_s)
        self.child.executed()
        # QEMU has its own: with ours closed, a QEMU that dies hangs up on who waits for it.
        self.lent.close_sockets()

    def _tell_what_runs(self) -> None:
        log = self.host.paths.instance_log(self.record.name)
        journal.note(log, f"start {self.record.generation}: {shlex.join(self.record.argv)}")
        if self.engine.system_calls is None:
            journal.note(log, "warning: it runs without kvmsec's filter of system calls")

    async def become_ready(self) -> None:
        timeout_s = self.host.config.qemu.ready_timeout_s
        self.monitor = await Monitor.connect(self.files.qmp_socket, timeout_s=timeout_s)

    def verify(self) -> None:
        self.child.leave_origin()
        # Its groups first: when it has left them because it ended, the second look says so.
        problems = self.cgroup.problems_of(self.child.process.pid)
        problems += process.confinement_problems(self.child)
        if problems:
            raise process.NotConfined(problems)

    async def run(self) -> None:
        assert self.monitor is not None
        await self.monitor.cont()
        self.note(state=InstanceState.RUNNING, started_at=datetime.now(UTC))


@frozen
class Step:
    """One step of a start, and why it stands where it does."""

    name: str
    act: Callable[[_Start], Awaitable[None] | None]
    reason: str


STEPS: Final = (
    Step("record", _Start.begin, "what isn't written down can't be taken back"),
    Step("cgroup", _Start.make_cgroup, "the child is born in it, or joins it first of all"),
    Step("child", _Start.ask_for_child, "its fork is as long as all that is found out meanwhile"),
    Step("qemu", _Start.find_qemu, "what it can do and is made of decides all the rest"),
    Step("boot files", _Start.open_boot_files, "copied into the jail from these descriptors"),
    Step("bounds", _Start.bound_cgroup, "of its groups, before they hold more than the child"),
    Step("cell", _Start.tell_cell, "the child leaves the node while it is found out for whom"),
    Step("identity", _Start.take_identity, "an exhausted pool is told before a disk is opened"),
    Step("images", _Start.open_images, "headers are read as the instance's own uid"),
    Step("taps", _Start.open_taps, "up and without IPv6 before a guest is behind them"),
    Step("sockets", _Start.bind_sockets, "root's alone; QEMU gets them listening"),
    Step("output", _Start.mount_output, "the only place that the instance may fill"),
    Step("jail", _Start.tell_jail, "the child is told the rest of its jail, and waits in it"),
    Step("rules", _Start.prove_rules, "a packet as its uid is refused, while the jail is built"),
    Step("programs", _Start.check_programs, "nobody else may change what QEMU is made of"),
    Step("release", _Start.release, "the process is in the record before it may become QEMU"),
    Step("exec", _Start.become_qemu, "QEMU has its final uid before its first instruction"),
    Step("ready", _Start.become_ready, "the reply to qmp_capabilities, not the greeting"),
    Step("verify", _Start.verify, "what the kernel shows, before the guest's first instruction"),
    Step("run", _Start.run, "the guest starts; from here on the instance outlives its launcher"),
)
