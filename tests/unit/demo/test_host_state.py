"""What the demo takes for left behind."""

import os
from pathlib import Path

from demo.host_state import _processes

NOWHERE = Path("/nowhere")


def test_a_process_that_runs_is_found_and_one_that_nobody_has_collected_is_not() -> None:
    told, tell = os.pipe()
    pid = os.fork()
    if pid == 0:
        os.close(tell)
        os.read(told, 1)
        os._exit(0)
    os.close(told)
    try:
        assert any(line.startswith(f"{pid} ") for line in _own())
    finally:
        os.close(tell)
        os.waitid(os.P_PID, pid, os.WEXITED | os.WNOWAIT)
    try:
        assert not any(line.startswith(f"{pid} ") for line in _own())
    finally:
        os.waitpid(pid, 0)


def _own() -> list[str]:
    return list(_processes(NOWHERE, "kvmsec_no_such_tag", {os.getuid()}))
