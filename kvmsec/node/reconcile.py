"""Putting right what killed processes, a reboot or a dying QEMU left on this node."""

import contextlib
import os
from collections.abc import AsyncIterator, Collection
from contextlib import asynccontextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Final

from hypervisor.cgroup_delegation import relative
from hypervisor.cgroups import InstanceCgroup
from kvmsec.agent import InstanceState
from kvmsec.linux import processes
from kvmsec.linux.errors import Fault, LockBusy
from kvmsec.linux.files import remove_unfinished
from kvmsec.linux.locks import FileLock
from kvmsec.linux.processes import ProcessId
from kvmsec.node import image_holdings, journal, leasing, records, taps, trial_groups
from kvmsec.node.dismantle import Remains, dismantle, remove_files, remove_group
from kvmsec.node.host import Host
from kvmsec.node.records import InstanceRecord, LastState, RecordUnreadable, names_in
from kvmsec.node.turns import give_back, try_turn
from kvmsec.node.waiting import acquire
from uidpool.claims import Lease

_UNFINISHED_S: Final = 60.0
_ORPHAN_TIMEOUT_S: Final = 2.0


async def reconcile(host: Host, alive: Collection[ProcessId] = frozenset()) -> tuple[str, ...]:
    """Take back what has no living owner; returns what was done, a line each.

    `alive` are processes that are known to run just now, without a look at each in /proc.
    An instance whose lock somebody holds is being worked on, and is left alone. What can't be put
    right is said too, and the rest goes on.
    """
    done: list[str] = []
    running: list[InstanceRecord] = []
    for name in _worked_on(host):
        if (record := _running(host, name, alive)) is not None:
            running.append(record)
            continue
        async with _turn_if_left(host, name) as is_ours:
            if is_ours:
                done += await _settle(host, name)
    done += await _release_orphaned_uids(host, {one.uid for one in running if one.uid})
    done += await _remove_leaks(host, running)
    done += await _settle_rules(host)
    done += _remove_unfinished(host)
    return tuple(done)


def _running(host: Host, name: str, alive: Collection[ProcessId]) -> InstanceRecord | None:
    """The record of an instance that runs as it says: whoever works on it, it is to be left."""
    try:
        record = records.load(host.paths, name)
    except (Fault, OSError):
        return None
    if record is None or record.state is not InstanceState.RUNNING:
        return None
    return record if record.process in alive or is_true(record) else None


async def _settle_rules(host: Host) -> list[str]:
    try:
        await host.rules.settle()
    except (Fault, OSError) as error:
        return [f"packet rules: left as they are: {error}"]
    return []


def _remove_unfinished(host: Host) -> list[str]:
    """Remove what writers that were killed had begun; the store sees to its own."""
    paths = host.paths
    places = (
        paths.run,
        paths.last_states,
        paths.instance_logs,
        paths.features,
        paths.image_holdings,
    )
    left: list[Path] = []
    for place in places:
        with contextlib.suppress(OSError):
            left += remove_unfinished(place, older_than_s=_UNFINISHED_S)
    return [f"{path}: removed, it was half written" for path in left]


@asynccontextmanager
async def _turn_if_left(host: Host, name: str) -> AsyncIterator[bool]:
    """Whether nobody acts on an instance; if so, nobody will meanwhile.

    A child that a killed launcher had just forked holds its lock for some milliseconds more.
    """
    lock = FileLock(host.paths.instance_lock(name))
    is_ours = lock.try_acquire()
    if not is_ours and _is_orphaned(host, name):
        with contextlib.suppress(LockBusy):
            await acquire(lock, _ORPHAN_TIMEOUT_S)
            is_ours = True
    try:
        yield is_ours
    finally:
        give_back(host.paths, name, lock)


def _is_orphaned(host: Host, name: str) -> bool:
    """Whether an instance's start was left by a launcher that has ended."""
    try:
        record = records.load(host.paths, name)
    except RecordUnreadable:
        return False
    if record is None or record.state is not InstanceState.STARTING:
        return False
    return not processes.is_alive(record.launcher)


def _worked_on(host: Host) -> list[str]:
    """The instances that have a directory, and those of which a start left no more than a lock."""
    return sorted({*records.names(host.paths), *names_in(host.paths.locks)})


async def _settle(host: Host, name: str) -> list[str]:
    """Bring one instance that nobody works on to a state that is true."""
    if not host.paths.instance(name).directory.exists():
        return []
    try:
        record = records.load(host.paths, name)
        if record is None:
            remove_files(host, name)
            return [f"{name}: removed what a start had left before its record"]
        if is_true(record):
            return []
        return [f"{name}: {await settle_record(host, record)}"]
    except (Fault, OSError) as error:
        return [f"{name}: left as it is: {error}"]


def is_true(record: InstanceRecord) -> bool:
    """Whether a record that nobody works on says what is."""
    return (
        record.state is InstanceState.RUNNING
        and record.process is not None
        and processes.is_alive(record.process)
    )


async def settle_record(host: Host, record: InstanceRecord) -> str:
    """Take back an instance whose record is not true any more; says what it was.

    The caller holds the instance's lock.
    """
    remains = await dismantle(host, record)
    state, reason = _verdict(record, remains)
    if record.state is InstanceState.RUNNING:
        at = datetime.now(UTC)
        last = LastState(
            name=record.name, state=state, reason=reason, at=at, last_words=remains.words
        )
        with contextlib.suppress(OSError):  # On a full disk that is lost; what it was is said.
            records.remember(host.paths, last)
    line = f"{state}: {reason}"
    journal.note(host.paths.instance_log(record.name), line)
    return line


def _verdict(record: InstanceRecord, remains: Remains) -> tuple[InstanceState, str]:
    if not record.is_of_this_boot:
        return InstanceState.STOPPED, "host rebooted"
    if record.state is InstanceState.STARTING:
        return InstanceState.STOPPED, "its start was interrupted and is undone"
    if record.state is InstanceState.STOPPING:
        return InstanceState.STOPPED, "its stop was interrupted and is finished"
    return InstanceState.CRASHED, remains.why


async def _release_orphaned_uids(host: Host, running: Collection[int]) -> list[str]:
    """Release what was drawn by starts of this root that left no record, and by other boots.

    The leases of the uids that are `running` are not even read.
    """
    done = []
    for lease in host.claims.leases(besides=running):
        if lease.boot_id != processes.boot_id():
            done.append(await _release(host, lease))
        elif lease.root == str(host.paths.root) and not _has_holder(host, lease):
            with try_turn(host.paths, lease.instance) as is_ours:
                # Looked at again: its start may have gone all the way meanwhile.
                if is_ours and not _has_holder(host, lease):
                    done.append(await _release(host, lease))
    return done


def _has_holder(host: Host, lease: Lease) -> bool:
    """Whether a record says that the start that drew this uid still has it, or may say so."""
    try:
        record = records.load(host.paths, lease.instance)
    except RecordUnreadable:
        return True
    return record is not None and record.generation == lease.generation


async def _release(host: Host, lease: Lease) -> str:
    try:
        outcome = str(await leasing.release(host.claims, lease.key))
    except Fault as error:
        outcome = f"left as it is: {error}"
    return f"uid {lease.uid}: was {lease.instance}'s, {outcome}"


async def _remove_leaks(host: Host, running: Collection[InstanceRecord]) -> list[str]:
    return [
        *await _remove_leaked_taps(host),
        *await _remove_leaked_groups(host, running),
        *_remove_stale_holdings(host, {one.generation for one in running if one.images}),
    ]


def _remove_stale_holdings(host: Host, running: Collection[str]) -> list[str]:
    """Say no more that images are open which a record that is gone would have named."""
    lock = FileLock(host.paths.images_lock)
    try:
        is_stale = bool(image_holdings.known_here(host.paths).difference(running))
        # Its file is there while somebody has it, and after one who was killed meanwhile.
        if not (is_stale or lock.path.exists()) or not lock.try_acquire():
            return []  # Whoever has the lock, to open images, looks at them just so.
        stale = image_holdings.remove_stale(host.paths, running)
    except (Fault, OSError) as error:
        return [f"images in use: left as they are: {error}"]
    finally:
        lock.discard()
    return [f"{path}: removed, its instance is gone" for path in stale]


async def _remove_leaked_taps(host: Host) -> list[str]:
    try:
        if not taps.has_taps(host.paths.tag):
            return []
        known = [tap for record in records.read_all(host.paths)[0] for tap in record.taps]
        leaked = await taps.leaked_taps(known, tag=host.paths.tag)
        await taps.remove_taps(leaked)
    except (Fault, OSError) as error:
        return [f"taps: left as they are: {error}"]
    return [f"tap {tap.name}: removed" for tap in leaked]


async def _remove_leaked_groups(host: Host, running: Collection[InstanceRecord]) -> list[str]:
    done = []
    names = records.names(host.paths)
    try:
        below = _counts_of_groups(host)
        if not all(below) or not below:  # Killed between a parent and the group in it?
            host.hierarchy.remove_empty_parents(host.paths.tag, host.config.cgroup.parent)
        if not _has_other_groups(host, running, sum(below)):
            return []
        leaked = host.hierarchy.leaked(host.paths.tag, names, host.config.cgroup.parent)
    except (Fault, OSError) as error:
        return [f"cgroups: left as they are: {error}"]
    for name, group in leaked.items():
        try:
            done += await _remove_leaked_group(host, name, group)
        except (Fault, OSError) as error:
            done.append(f"cgroup {group.paths[0]}: left as it is: {error}")
    return done


async def _remove_leaked_group(host: Host, name: str, group: InstanceCgroup) -> list[str]:
    if trial_groups.is_trial(name):
        return [] if trial_groups.is_in_use(name) else await _remove_group(group)
    with try_turn(host.paths, name) as is_ours:
        # Looked at again: a start may have made it since the names were listed.
        if is_ours and not host.paths.instance(name).directory.exists():
            return await _remove_group(group)
    return []


def _has_other_groups(host: Host, running: Collection[InstanceRecord], there: int) -> bool:
    """Whether there are groups that are not of one who runs: counted, not listed.

    Whoever runs is in its groups, so these are there; are there no more, there is no other.
    """
    tops = _tops(host)
    return there != sum(path.startswith(tops) for record in running for path in record.cgroups)


def _counts_of_groups(host: Host) -> list[int]:
    """How many groups this root has in each hierarchy where it has a parent for them.

    The kernel tells how many a group has below it: two links of a directory are its own.
    """
    found = []
    for top in _tops(host):
        with contextlib.suppress(FileNotFoundError):
            found.append(os.stat(top).st_nlink - 2)
    return found


def _tops(host: Host) -> tuple[str, ...]:
    below = relative(host.paths.tag, host.config.cgroup.parent)
    return tuple(f"{mount.path}/{below}/" for mount in host.hierarchy.mounts)


async def _remove_group(group: InstanceCgroup) -> list[str]:
    await remove_group(group)
    return [f"cgroup {path}: removed" for path in group.paths]
