"""Where an encounter takes place: a node with a victim, and hostile programs in QEMU's place."""

import os
import signal
import socket
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Any, Final, Self

from attrs import field, frozen

from kvmsec.linux.children import run_in_child
from kvmsec.linux.credentials import Credentials
from kvmsec.model.security import SecurityModel
from tests.attacks.attack import Encounter
from tests.attacks.attacker import Answer
from tests.attacks.setting import SOMEBODY, Setting

DEADLINE_S: Final = 20.0
_HWM: Final = "VmHWM:"


@frozen
class Stage:
    """One node, the programs of tests/kvm/hostile and their like, and what an instance is given."""

    setting: Setting
    programs: Path
    config: str
    security: dict[str, str]
    without: frozenset[str] = frozenset()

    @property
    def lab(self) -> Any:
        return self.setting.lab

    @property
    def is_pool(self) -> bool:
        """Whether uids are drawn, and so taken back."""
        return self.security["security_model"] == SecurityModel.POOL.value

    def carry_out(self, encounter: Encounter, *, is_control: bool = False) -> Answer:
        """What it came to; LEFT where anything of it is still there afterwards."""
        before = self.lab.leftovers()
        try:
            answer: Answer = (encounter.control if is_control else encounter.meet)(self)
        except Exception as error:
            # One row's failure, and no other's.
            answer = Answer("BROKEN", repr(error))
            for name in self.lab.instances().keys() - {self.setting.victim.name}:
                self.lab.stop(name)
        left = {
            what: [one for one in found if one not in before.get(what, ())]
            for what, found in self.lab.leftovers().items()
        }
        left = {what: found for what, found in left.items() if found}
        return Answer("LEFT", f"{left} of {answer}") if left else answer

    @contextmanager
    def configured(self, text: str) -> Iterator[None]:
        """The node's configuration with some lines more."""
        self.lab.configure(f"{self.config}{text}")
        try:
            yield
        finally:
            self.lab.configure(self.config)

    # Instances ------------------------------------------------------------------------------

    def definition(self, name: str, *, by: str | Path = "qemu", **machine: Any) -> Any:
        program = str(self.programs / by)
        return self.lab.definition(name, qemu=program, **machine, **self.security)

    def start(self, name: str, *, by: str | Path = "qemu", **machine: Any) -> Any:
        """Start a program that behaves as its instance's name says."""
        definition = self.definition(name, by=by, **machine)
        return self.lab.run(lambda node: node.start(definition), without_locks=self.without)

    def output_of(self, name: str) -> str:
        return str(self.lab.run(lambda node: node.log(name)).qemu)

    # Without anything around them ----------------------------------------------------------------

    @contextmanager
    def bare(
        self,
        behaviour: str,
        *,
        by: str = "qemu",
        uid: int = SOMEBODY,
        tap: int | None = None,
        output: IO[bytes] | int = subprocess.PIPE,
    ) -> Iterator["Bare"]:
        """The same program as a plain process; all that its uid runs ends with it."""
        channels = {what: _listener(self.setting.scratch / what) for what in ("qmp", "serial")}
        given = {f"socket,id={what}": one.fileno() for what, one in channels.items()}
        if tap is not None:
            given["tap"] = tap
        process = subprocess.Popen(
            [
                *("setpriv", f"--reuid={uid}", f"--regid={uid}", "--clear-groups", "--"),
                *("prlimit", f"--fsize={8 << 20}", "--"),
                *(self.programs / by, f"guest={behaviour}"),
                *(f"{what},fd={descriptor}" for what, descriptor in given.items()),
            ],
            pass_fds=tuple(given.values()),
            stdout=output,
            cwd="/",
        )
        for one in channels.values():
            one.close()  # Or who calls would be heard of by nobody, once the program has ended.
        try:
            yield Bare(process, self.setting.scratch)
        finally:
            process.kill()
            with process:
                end_all_of(uid)
            for what in channels:
                (self.setting.scratch / what).unlink()


@frozen
class Bare:
    """A hostile program without a jail, and how it is called."""

    process: "subprocess.Popen[bytes]"
    place: Path

    def call(self, channel: str) -> socket.socket:
        """A connection to its monitor (`qmp`) or serial line."""
        line = socket.socket(socket.AF_UNIX)
        line.settimeout(DEADLINE_S)
        line.connect(str(self.place / channel))
        return line

    def hear(self, words: str) -> None:
        """Wait for a line that has these words. Raises AssertionError."""
        assert self.process.stdout
        while line := self.process.stdout.readline():
            if words in line.decode():
                return
        raise AssertionError(f"it ended without {words}")


def _listener(path: Path) -> socket.socket:
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(str(path))
    path.chmod(0o777)
    listener.listen(8)
    return listener


def end_all_of(uid: int) -> None:
    """Kill every process of a uid at once, so that none can fork another (kill(2), pid -1)."""

    def kill() -> None:
        with suppress(ProcessLookupError):
            os.kill(-1, signal.SIGKILL)

    who = Credentials(uid, uid)
    run_in_child(kill, what="ending a uid", timeout_s=DEADLINE_S, credentials=who)


def is_ended(pid: int) -> bool:
    """Whether there is no such process, or one that nobody has collected yet."""
    try:
        status = Path(f"/proc/{pid}/stat").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return True
    return status.rsplit(")", 1)[1].split()[0] == "Z"


@frozen
class Memory:
    """How much this process had at once since it was entered, beyond what it had then."""

    _before_kib: list[int] = field(factory=list)

    def __enter__(self) -> Self:
        Path("/proc/self/clear_refs").write_text("5")  # proc_pid_clear_refs(5)
        self._before_kib.append(self._most_kib())
        return self

    def __exit__(self, *_: object) -> None:
        pass

    @staticmethod
    def _most_kib() -> int:
        return int(Path("/proc/self/status").read_text().split(_HWM)[1].split()[0])

    @property
    def grown_kib(self) -> int:
        return self._most_kib() - self._before_kib[-1]
