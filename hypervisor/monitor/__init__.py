"""The talk with a running QEMU (QMP): every wait has a deadline, every memory a bound.

Importing this loads qemu.qmp and asyncio's streams (0.2 s): only who talks to a monitor does so.
See QEMU's docs/interop/qmp-spec for the protocol.
"""

from hypervisor.monitor.connection import Monitor
from hypervisor.monitor.errors import (
    CommandForbidden,
    CommandRefused,
    Evidence,
    MonitorClosed,
    MonitorError,
    MonitorGarbled,
    MonitorTimedOut,
    MonitorUnreachable,
)
from hypervisor.monitor.events import Event

__all__ = (
    "CommandForbidden",
    "CommandRefused",
    "Event",
    "Evidence",
    "Monitor",
    "MonitorClosed",
    "MonitorError",
    "MonitorGarbled",
    "MonitorTimedOut",
    "MonitorUnreachable",
)
