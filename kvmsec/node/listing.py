"""What is known of this node's instances: read from records and the kernel, nothing changed."""

from collections.abc import Iterable, Iterator
from pathlib import Path

import attrs

from kvmsec.agent import InstanceInfo, InstanceLog, InstanceState
from kvmsec.errors import KvmsecError, UnknownInstance
from kvmsec.linux import processes
from kvmsec.model.names import require_name
from kvmsec.node import journal, output, records
from kvmsec.node.host import Host
from kvmsec.node.records import InstanceRecord, RecordUnreadable


def describe_all(host: Host, *, only: str | None = None) -> list[InstanceInfo]:
    """Every instance that has a record, ended unasked or has a definition; sorted by name."""
    names = [only] if only else sorted({*records.names(host.paths), *_ended(host), *_defined(host)})
    return [found for name in names if (found := _describe_named(host, name)) is not None]


def _describe_named(host: Host, name: str) -> InstanceInfo | None:
    try:
        record = records.load(host.paths, name)
    except RecordUnreadable as error:
        return InstanceInfo(name=name, state=InstanceState.UNKNOWN, reason=error.message)
    if record is not None:
        return describe(host, record)
    last = records.recall(host.paths, name)
    if last is not None:
        details = {"last_words": last.last_words, "ended_at": last.at}
        return InstanceInfo(name=name, state=last.state, reason=last.reason, details=details)
    if host.paths.definition(name).is_file():
        return InstanceInfo(name=name, state=InstanceState.STOPPED)
    return None


def describe(host: Host, record: InstanceRecord) -> InstanceInfo:
    """An instance that has a record, as it is now."""
    from hypervisor import process  # psutil: a node without instances does not pay for it

    state, reason = _state_of(record)
    runs = record.process if record.process and processes.is_alive(record.process) else None
    use = process.use_of(runs) if runs else None
    return InstanceInfo(
        name=record.name,
        state=state,
        reason=reason,
        pid=runs.pid if runs else None,
        uid=record.uid,
        user=record.user,
        security_model=record.model.value,
        accelerator=record.accelerator,
        memory_mib=record.machine.memory_mib,
        vcpus=record.machine.vcpus,
        started_at=record.started_at if runs else None,
        autostart=record.autostart,
        resident_bytes=use.resident_bytes if use else None,
        cpu_s=use.cpu_s if use else None,
        details=_details(host, record),
    )


def read_log(host: Host, name: str) -> InstanceLog:
    """What was said of and by an instance: as it runs, or in its last run.

    Raises UnknownInstance when there is no trace of it.
    """
    kept = host.paths.instance_log(name)
    place = host.paths.instance(name)
    own = journal.read(kept.with_name(kept.name + ".1")) + journal.read(kept)
    if output.is_mounted(place.output):
        qemu = output.read(place.output, output.QEMU_LOG)
        serial = output.read(place.output, output.SERIAL_LOG)
    else:
        qemu, serial = output.recall(host.paths.instance_output(name))
    if not (own or qemu or serial) and _describe_named(host, name) is None:
        raise UnknownInstance(name)
    return InstanceLog(own, qemu.decode(errors="replace"), serial.decode(errors="replace"))


def _state_of(record: InstanceRecord) -> tuple[InstanceState, str | None]:
    """What the record says, unless the kernel says otherwise."""
    if not record.is_of_this_boot:
        return InstanceState.STOPPED, "host rebooted"
    if record.state is InstanceState.RUNNING and not (
        record.process and processes.is_alive(record.process)
    ):
        return InstanceState.CRASHED, "its process is gone; the next command cleans up"
    if record.state is InstanceState.STARTING and not processes.is_alive(record.launcher):
        return InstanceState.STARTING, "interrupted; the next command undoes it"
    return record.state, None


def _details(host: Host, record: InstanceRecord) -> dict[str, object]:
    place = host.paths.instance(record.name)
    return {
        "generation": record.generation,
        "security_domain": record.domain,
        "qemu": record.qemu,
        "qemu_version": record.qemu_version,
        "machine": attrs.asdict(record.machine),
        "images": [attrs.asdict(image) for image in record.images],
        "taps": [tap.name for tap in record.taps],
        "cgroups": list(record.cgroups),
        "qmp_socket": str(place.qmp_socket),
        "serial_socket": str(place.serial_socket) if record.machine.serial else None,
        "log": str(host.paths.instance_log(record.name)),
        "command_line": list(record.argv),
    }


def _ended(host: Host) -> Iterator[str]:
    yield from _names_in(host.paths.last_states.glob("*.json"))


def _defined(host: Host) -> Iterator[str]:
    yield from _names_in(host.paths.definitions.glob("*.toml"))


def _names_in(paths: Iterable[Path]) -> Iterator[str]:
    for path in paths:
        try:
            yield require_name("an instance", path.stem)
        except KvmsecError:
            continue
