"""A guest under a QEMU with nothing of kvmsec's around it; every wait has a deadline."""

import json
import os
import select
import socket
import subprocess
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from tests.kvm.serial_line import DEADLINE_S, Lines

QEMU = "qemu-system-x86_64"


class Guest(Lines):
    """Its process, its serial line and its monitor."""

    def __init__(self, process: subprocess.Popen[bytes], line: socket.socket, qmp: socket.socket):
        super().__init__(line)
        self.process = process
        self._qmp = qmp.makefile("rwb")

    def order(self, command: str) -> Any:
        """A QMP command's answer."""
        self._qmp.write(json.dumps({"execute": command}).encode() + b"\n")
        self._qmp.flush()
        while True:
            answer = json.loads(self._qmp.readline())
            assert "error" not in answer, answer
            if "return" in answer:
                return answer["return"]

    def end(self) -> int:
        """QEMU's exit status, once it has ended by itself."""
        assert self._ends_within(DEADLINE_S), "QEMU is still running"
        return self.process.wait()

    def cpu_ticks_during(self, seconds: float) -> int:
        """Processor time that all of QEMU's threads take meanwhile, in clock ticks."""
        before = self._cpu_ticks()
        assert not self._ends_within(seconds), "QEMU ended"
        return self._cpu_ticks() - before

    def _cpu_ticks(self) -> int:
        fields = Path(f"/proc/{self.process.pid}/stat").read_text().rpartition(")")[2].split()
        return int(fields[11]) + int(fields[12])  # utime and stime, proc_pid_stat(5)

    def _ends_within(self, seconds: float) -> bool:
        descriptor = os.pidfd_open(self.process.pid)
        try:
            return bool(select.select([descriptor], [], [], seconds)[0])
        finally:
            os.close(descriptor)


@contextmanager
def run_guest(
    *options: str, accelerator: str, machine: str = "pc", memory_mib: int = 4
) -> Iterator[Guest]:
    with ExitStack() as stack:
        line, line_inside = socket.socketpair()
        qmp, qmp_inside = socket.socketpair()
        for end in (line, line_inside, qmp, qmp_inside):
            stack.enter_context(end)
        qmp.settimeout(DEADLINE_S)
        argv = [
            *(QEMU, "-M", machine, "-accel", accelerator, "-m", str(memory_mib)),
            *("-nodefaults", "-no-user-config", "-display", "none"),
            *("-chardev", f"socket,id=line,fd={line_inside.fileno()}", "-serial", "chardev:line"),
            *("-chardev", f"socket,id=qmp,fd={qmp_inside.fileno()}", "-mon", "qmp,mode=control"),
            *options,
        ]
        inside = [line_inside.fileno(), qmp_inside.fileno()]
        process = subprocess.Popen(argv, stdin=subprocess.DEVNULL, pass_fds=inside)
        stack.callback(process.wait)
        stack.callback(process.kill)
        line_inside.close()
        qmp_inside.close()
        guest = Guest(process, line, qmp)
        guest.order("qmp_capabilities")
        yield guest
