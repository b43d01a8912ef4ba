"""Taking an instance back: the one way out, for a stop, a failed start, a crash, a dead launcher.

A record names each thing before that thing is made, so that the same steps undo any part of a
start. Every step takes "it isn't there" for done: they can be repeated after any interruption.
"""

import contextlib
import os
import shutil
import signal
from typing import Final

from attrs import frozen

from hypervisor import cgroups, process
from hypervisor.cgroup_tree import EMPTYING_S
from hypervisor.process import Ended
from kvmsec.errors import KvmsecError
from kvmsec.linux import processes
from kvmsec.linux.children import start_child
from kvmsec.linux.errors import ChildFailed, ChildTimedOut, Fault
from kvmsec.model.security import SecurityModel
from kvmsec.node import image_holdings, journal, leasing, output, taps
from kvmsec.node.host import Host
from kvmsec.node.records import InstanceRecord
from kvmsec.node.waiting import collect, readable
from uidpool.claims import LeaseKey, Quarantined

KILL_TIMEOUT_S: Final = 10.0
_LAST_WAIT_S: Final = 1.0
_QUICK_KILL_S: Final = 0.015


class NotEnded(KvmsecError):
    """A QEMU outlived SIGKILL: it is stuck in the kernel."""

    def __init__(self, record: InstanceRecord) -> None:
        pid = record.process.pid if record.process else None
        super().__init__(
            f"{record.name}: process {pid} did not end within {KILL_TIMEOUT_S:g} s of SIGKILL",
            hint=f"see what it waits for in /proc/{pid}/stack (a dead disk?), and who traces a "
            f"thread of its (TracerPid in /proc/{pid}/task/*/status), then stop it again",
        )
        self.record = record


@frozen
class Remains:
    """What was learnt while an instance was taken back."""

    ended: Ended | None
    oom_kills: int
    words: str
    quarantined: str | None

    @property
    def why(self) -> str:
        """Why its process ended, as far as anybody was there to see it."""
        if self.oom_kills:
            return "killed by the kernel: out of memory"
        if self.ended is None:
            return "unknown: nothing was there to see it end"
        if self.ended.signal is signal.SIGSYS:
            return (
                "killed by SIGSYS: it made a system call that only a QEMU which somebody has taken "
                "over makes; the kernel's log names it (audit type 1326)"
            )
        if self.ended.signal is not None:
            return f"killed by {self.ended.signal.name}"
        if self.ended.status == 0:
            return "exited with status 0: its guest powered off, or somebody told QEMU to end"
        return f"exited with status {self.ended.status}"


async def dismantle(host: Host, record: InstanceRecord) -> Remains:
    """End what is left of an instance and take back everything that was made for it.

    The caller holds the instance's lock. What can't be cleaned is quarantined and said; the
    record goes last. Raises OSError and the errors of the rooms.
    """
    ended, oom_kills = None, 0
    if record.is_of_this_boot:  # A pid or a control group of another boot means nothing.
        ended = await _end_process(host, record)
        oom_kills = await _end_cgroup(record)
    words = _keep_words(host, record)
    try:
        for lost in await taps.remove_taps(record.taps):
            journal.note(host.paths.instance_log(record.name), f"not put back: {lost}")
    finally:  # A tap that can't be put back keeps the record, but nobody's uid.
        quarantined = await _release_uid(host, record)
    image_holdings.withdraw(host.paths, record)
    remove_files(host, record.name)
    await _settle_rules(host, record.name)
    return Remains(ended, oom_kills, words, quarantined)


async def _end_process(host: Host, record: InstanceRecord) -> Ended | None:
    """Kill QEMU through a descriptor of that very process; its PID namespace ends with it."""
    if record.process is None:
        return None
    pidfd = processes.open_pidfd(record.process)
    if pidfd is None:
        return None
    try:
        processes.kill(pidfd)
        if not await readable(pidfd, KILL_TIMEOUT_S):
            await _end_everything_else(host, record)
            if not await readable(pidfd, _LAST_WAIT_S):
                raise NotEnded(record)
        return process.reap(pidfd)
    finally:
        os.close(pidfd)


async def _end_everything_else(host: Host, record: InstanceRecord) -> None:
    """End what an instance has outside its PID namespace, should that keep it from ending.

    A process that is traced is not gone before its tracer has taken note or is gone itself
    (ptrace(2)), and whoever has the uid may trace.
    """
    await end_group(cgroups.InstanceCgroup(record.cgroups))
    if record.model is SecurityModel.POOL:
        for key in _leases_of(host, record):
            await leasing.end_everything(host.claims, key)


async def _end_cgroup(record: InstanceRecord) -> int:
    group = cgroups.InstanceCgroup(record.cgroups)
    kills = group.oom_kills()
    await remove_group(group)
    return kills


async def end_group(group: cgroups.InstanceCgroup) -> bool:
    """Kill everything in a control group; False when something outlives that for ten seconds.

    Mostly nothing is there any more. To wait for the end of what is there, or to outrun what
    forks, is a child's work. Raises OSError and ChildFailed.
    """
    if group.kill(_QUICK_KILL_S):
        return True
    child = start_child(
        lambda: group.kill(KILL_TIMEOUT_S), what=f"emptying the control group {group.paths[0]}"
    )
    try:
        return bool(await collect(child, KILL_TIMEOUT_S + _LAST_WAIT_S))
    except ChildTimedOut:
        return False


async def remove_group(group: cgroups.InstanceCgroup) -> None:
    """End what is in a control group and remove it. Raises CgroupBusy, OSError, ChildFailed."""
    if await end_group(group):
        group.remove()
    else:
        raise cgroups.CgroupBusy(group.paths[0], ())


async def remove_leftover(group: cgroups.InstanceCgroup) -> None:
    """Remove what is there before a start makes its own; what runs in it is left alone.

    What has just ended may still be leaving it: a child waits for that. What stays all the same
    the start meets, and says so.
    """
    if group.paths:
        child = start_child(group.remove, what=f"removing the control group {group.paths[0]}")
        with contextlib.suppress(ChildFailed, ChildTimedOut):
            await collect(child, len(group.paths) * EMPTYING_S + _LAST_WAIT_S)


def _keep_words(host: Host, record: InstanceRecord) -> str:
    directory = host.paths.instance(record.name).output
    if not output.is_mounted(directory):
        return ""
    target = host.paths.instance_output(record.name)
    with contextlib.suppress(OSError):  # A full disk must not keep an instance from ending.
        output.keep(directory, target)
    words = output.read(directory, output.QEMU_LOG, 4096).decode(errors="replace")
    output.unmount(directory)
    return words


async def _release_uid(host: Host, record: InstanceRecord) -> str | None:
    """Give the uid back; the reason when it had to be quarantined instead."""
    if record.model is not SecurityModel.POOL:
        return None
    for key in _leases_of(host, record):
        outcome = await leasing.release(host.claims, key)
        if isinstance(outcome, Quarantined):
            reason = f"uid {key.uid} is quarantined: {outcome.reason}"
            journal.note(host.paths.instance_log(record.name), reason)
            return reason
    return None


def _leases_of(host: Host, record: InstanceRecord) -> list[LeaseKey]:
    """What a start drew; looked up where its launcher died before it noted the uid."""
    if record.uid is not None:
        return [LeaseKey(record.uid, record.name, record.generation)]
    return [
        lease.key
        for lease in host.claims.leases()
        if (lease.instance, lease.generation) == (record.name, record.generation)
    ]


async def _settle_rules(host: Host, name: str) -> None:
    """Let go of a `user` model's uid; when that fails, rules that forbid too much do no harm."""
    try:
        await host.rules.settle()
    except (Fault, OSError) as error:
        problem = f"the packet rules still hold what they held before: {error}"
        journal.note(host.paths.instance_log(name), problem)


def remove_files(host: Host, name: str) -> None:
    """Remove the instance's directory, its record last: until then it can be found again."""
    place = host.paths.instance(name)
    output.unmount(place.output)
    for path in (place.qmp_socket, place.serial_socket):
        path.unlink(missing_ok=True)
    shutil.rmtree(place.output, ignore_errors=True)
    place.record.unlink(missing_ok=True)
    shutil.rmtree(place.directory, ignore_errors=True)
