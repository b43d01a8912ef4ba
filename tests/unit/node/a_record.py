"""The record of an instance under `pool` that a test need say no more of."""

from datetime import UTC, datetime
from typing import Any

from hypervisor.machine import Machine
from kvmsec.agent import InstanceState
from kvmsec.linux import processes
from kvmsec.model.security import SecurityModel
from kvmsec.node.records import InstanceRecord


def record_of(name: str, uid: int | None, **more: Any) -> InstanceRecord:
    """A start that this process has begun, unless told otherwise."""
    told: dict[str, Any] = {"generation": "0" * 16, "state": InstanceState.STARTING, **more}
    return InstanceRecord(
        name=name,
        model=SecurityModel.POOL,
        machine=Machine(name=name, memory_mib=1),
        launcher=processes.myself(),
        created_at=datetime.now(UTC),
        uid=uid,
        **told,
    )
