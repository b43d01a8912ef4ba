"""An operation that is killed at one of its steps: what lies on the disks is all that is left."""

import os
from collections.abc import Callable
from typing import Any


class _Counted:
    """Counts moments, and ends the process at one of them as SIGKILL would."""

    def __init__(self, fatal: int) -> None:
        self.fatal = fatal
        self.passed = 0

    def __call__(self, moment: str) -> None:
        if self.passed == self.fatal:
            os._exit(9)
        self.passed += 1


def was_killed_at(moment: int, act: Callable[[Callable[[str], None]], Any]) -> bool:
    """Run `act` in a process that is killed at the moment of this number; False: it had fewer.

    `act` is given what it must call at each moment.
    """
    child = os.fork()
    if child == 0:
        status = 1
        try:
            act(_Counted(moment))
            status = 0
        finally:
            os._exit(status)
    _, status = os.waitpid(child, 0)
    code = os.waitstatus_to_exitcode(status)
    assert code in (0, 9), f"the operation failed by itself: {code}"
    return code == 9
