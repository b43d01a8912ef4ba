"""The name of the control group that a doctor makes for a trial: it tells whose the group is.

No instance can have such a name, for its upper case. Control groups do not outlive a boot, so that
pid and start time are a process's whole identity here.
"""

import re
from typing import Final

from kvmsec.linux import processes
from kvmsec.linux.processes import ProcessId

_PREFIX: Final = "Doctor-"
_NAME: Final = re.compile(_PREFIX + r"(\d+)-(\d+)", re.ASCII)


def name_for(doctor: ProcessId) -> str:
    """What the trial group of a doctor's process is called in place of an instance."""
    return f"{_PREFIX}{doctor.pid}-{doctor.start_ticks}"


def is_trial(name: str) -> bool:
    """Whether a group has the name of a doctor's, and so is no instance's."""
    return name.startswith(_PREFIX)


def is_in_use(name: str) -> bool:
    """Whether the very process that made a trial group is there and has not ended."""
    found = _NAME.fullmatch(name)
    if found is None:
        return False
    pid, start_ticks = map(int, found.groups())
    return processes.is_alive(ProcessId(pid, start_ticks, processes.boot_id()))
