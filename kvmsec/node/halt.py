"""Ending an instance that runs: asked first, then made to."""

import asyncio
import contextlib
import os

from hypervisor.monitor import Monitor, MonitorError
from kvmsec.agent import InstanceState
from kvmsec.linux import processes
from kvmsec.node import journal, records
from kvmsec.node.dismantle import dismantle
from kvmsec.node.host import Host
from kvmsec.node.records import InstanceRecord
from kvmsec.node.waiting import readable


async def halt(host: Host, record: InstanceRecord, timeout_s: float) -> str:
    """Power a guest down within `timeout_s` seconds (0: don't ask), end it, take it back.

    The caller holds the instance's lock. Returns how it ended, in words. Raises what `dismantle`
    raises; the instance is then still known, and another stop goes on from there.
    """
    log = host.paths.instance_log(record.name)
    with contextlib.suppress(OSError):  # A full disk must not keep an instance from ending.
        record = records.advance(host.paths, record, state=InstanceState.STOPPING)
    reason = await _end_gently(host, record, timeout_s)
    remains = await dismantle(host, record)
    if remains.quarantined:
        reason = f"{reason}; {remains.quarantined}"
    journal.note(log, f"stopped: {reason}")
    records.forget(host.paths, record.name)
    return reason


async def _end_gently(host: Host, record: InstanceRecord, timeout_s: float) -> str:
    """Have the guest power itself down; returns how far that went."""
    pidfd = processes.open_pidfd(record.process) if record.process else None
    if pidfd is None:
        return "it had ended already"
    try:
        if timeout_s <= 0:
            return "killed, as asked"
        loop = asyncio.get_running_loop()
        deadline = loop.time() + timeout_s
        problem = await _power_down(host, record, timeout_s)
        if problem is not None:
            return f"killed: {problem}"
        if await readable(pidfd, deadline - loop.time()):
            return "powered down"
        return f"killed: the guest did not power down within {timeout_s:g} s"
    finally:
        os.close(pidfd)


async def _power_down(host: Host, record: InstanceRecord, timeout_s: float) -> str | None:
    """Press the guest's power button; None, or why that was of no use.

    The monitor's own deadlines are a call's each, and a stop has one for all of them.
    """
    socket = host.paths.instance(record.name).qmp_socket
    try:
        async with asyncio.timeout(timeout_s), await Monitor.connect(socket) as monitor:
            if await monitor.status() != "running":
                return "the guest is paused and can't power down"
            await monitor.powerdown()
    except MonitorError as error:
        return error.message
    except TimeoutError:
        return f"QEMU's monitor did not answer within {timeout_s:g} s"
    return None
