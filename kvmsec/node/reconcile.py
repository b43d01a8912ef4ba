"""Putting right what killed processes, a reboot or a dying QEMU left on this node."""

from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime

from kvmsec.agent import InstanceState
from kvmsec.linux import processes
from kvmsec.linux.errors import Fault
from kvmsec.linux.locks import FileLock
from kvmsec.node import journal, records, taps
from kvmsec.node.dismantle import KILL_TIMEOUT_S, Remains, dismantle, remove_files
from kvmsec.node.host import Host
from kvmsec.node.records import InstanceRecord, LastState
from uidpool.claims import Lease


async def reconcile(host: Host) -> tuple[str, ...]:
    """Take back what has no living owner; returns what was done, a line each.

    An instance whose lock somebody holds is being worked on, and is left alone. What can't be put
    right is said too, and the rest goes on.
    """
    done: list[str] = []
    for name in records.names(host.paths):
        with _try_lock(host, name) as is_ours:
            if is_ours:
                done += await _settle(host, name)
    done += _release_orphaned_uids(host)
    done += await _remove_leaks(host)
    host.rules.settle()
    return tuple(done)


@contextmanager
def _try_lock(host: Host, name: str) -> Iterator[bool]:
    lock = FileLock(host.paths.instance_lock(name))
    try:
        yield lock.try_acquire()
    finally:
        lock.release()


async def _settle(host: Host, name: str) -> list[str]:
    """Bring one instance that nobody works on to a state that is true."""
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


def _release_orphaned_uids(host: Host) -> list[str]:
    """Release what was drawn by starts of this root that left no record, and by other boots."""
    known = {(record.name, record.generation) for record in records.every(host.paths)}
    done = []
    for lease in host.claims.leases():
        if lease.boot_id != processes.boot_id():
            done.append(_release(host, lease))
        elif lease.root == str(host.paths.root) and (lease.instance, lease.generation) not in known:
            with _try_lock(host, lease.instance) as is_ours:
                if is_ours:
                    done.append(_release(host, lease))
    return done


def _release(host: Host, lease: Lease) -> str:
    outcome = host.claims.release(lease.key)
    return f"uid {lease.uid}: was {lease.instance}'s, {outcome}"


async def _remove_leaks(host: Host) -> list[str]:
    everyone = list(records.every(host.paths))
    known = [tap for record in everyone for tap in record.taps]
    leaked = await taps.leaked_taps(known, tag=host.paths.tag)
    await taps.remove_taps(leaked)
    names = [record.name for record in everyone]
    groups = host.hierarchy.leaked(host.paths.tag, names, host.config.cgroup.parent).values()
    for group in groups:
        group.kill(KILL_TIMEOUT_S)
        group.remove()
    return [f"tap {tap.name}: removed" for tap in leaked] + [
        f"cgroup {path}: removed" for group in groups for path in group.paths
    ]
