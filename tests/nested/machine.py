"""A QEMU that is a whole host: booted under a deadline, heard on its console, always ended."""

import functools
import subprocess
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path

from attrs import frozen

from tests.kvm.accelerator import runs_64_bit_guests

CHECKOUT = Path(__file__).resolve().parents[2]
BUILT = CHECKOUT / ".venv" / "l1"
_LINUX = CHECKOUT / "vm-images" / "linux" / ".build"
_TAIL_LINES = 40
_POLL_S = 0.02


class HostFailed(Exception):
    """A host that did not do in time what was waited for, with the end of its console."""


@frozen
class Machine:
    """A host that was started; `console` is the file with all that its serial line said."""

    process: subprocess.Popen[bytes]
    console: Path

    def said(self) -> str:
        return self.console.read_text(errors="replace")

    def failed(self, what: str) -> HostFailed:
        """What to raise when `what` is the matter: the console's tail tells why."""
        status = self.process.poll()
        ended = "" if status is None else f"; its QEMU ended with status {status}"
        lines = self.said().splitlines()[-_TAIL_LINES:]
        return HostFailed("\n".join([f"{what}{ended}; the console's end:", *lines]))

    def wait_for(self, words: str, within_s: float) -> str:
        """The line with these words, once the console has the whole of it. Raises HostFailed."""
        end = time.monotonic() + within_s
        while True:
            has_ended = self.process.poll() is not None
            for line in self.said().splitlines(keepends=True):
                if words in line and line.endswith("\n"):
                    return line.strip()
            if has_ended or time.monotonic() > end:
                raise self.failed(f"{words!r} was not said within {within_s:g} s")
            time.sleep(_POLL_S)


@functools.cache
def processor() -> tuple[str, ...]:
    """How a host gets processors with SVM or VT-x: the machine's own where they run, or TCG's."""
    if _nests() and runs_64_bit_guests(_LINUX):
        return ("-accel", "kvm", "-cpu", "host", "-smp", "2")
    # One alone: the kernel rewrites its own code as it runs (static keys), and a second emulated
    # processor can still run what was there before, which panics the kernel.
    return ("-accel", "tcg", "-cpu", "max", "-smp", "1")


def is_emulated() -> bool:
    return "kvm" not in processor()


def _nests() -> bool:
    modules = (Path("/sys/module", name, "parameters/nested") for name in ("kvm_amd", "kvm_intel"))
    return any(one.exists() and one.read_text().strip() in ("1", "Y") for one in modules)


@contextmanager
def booted(
    directory: Path, options: Sequence[str], *, memory_mib: int, pass_fds: Sequence[int] = ()
) -> Iterator[Machine]:
    """A host with these options of QEMU's; its process has ended when the block has."""
    console = directory / "console.log"
    console.touch()
    argv = [
        *("qemu-system-x86_64", *processor(), "-M", "q35", "-m", str(memory_mib)),
        *("-nodefaults", "-no-user-config", "-display", "none", "-serial", f"file:{console}"),
        *options,
    ]
    with ExitStack() as stack:
        process = subprocess.Popen(
            argv,
            stdin=subprocess.DEVNULL,
            stderr=stack.enter_context((directory / "qemu.log").open("wb")),
            pass_fds=pass_fds,
        )
        stack.callback(process.wait)
        stack.callback(process.kill)
        yield Machine(process, console)
