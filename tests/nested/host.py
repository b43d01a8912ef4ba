"""A whole Debian host, and an agent in it that runs what it is told: see vm-images/l1/agent.py."""

import base64
import io
import json
import shutil
import socket
import tarfile
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from attrs import define, field

from tests.nested.machine import HostFailed, Machine, booted
from tests.nested.stages import Stages

BOOT_DEADLINE_S = 300.0
MEMORY_MIB = 3072
_TAIL_CHARS = 4000


@define
class Answer:
    """How a command ended: its status, and what it said on stdout and stderr."""

    status: int
    out: bytes

    @property
    def text(self) -> str:
        return self.out.decode(errors="replace")

    def json(self) -> Any:
        return json.loads(self.out)


@define
class Host:
    """A host that is up; `release` is Debian's."""

    release: str
    machine: Machine
    _channel: socket.socket
    _heard: bytes = b""
    _orders: int = 0
    boot_id: str = ""
    asked: list[str] = field(factory=list)

    def run(
        self,
        *argv: str,
        status: int | None = 0,
        timeout_s: float = 120.0,
        environment: Mapping[str, str] | None = None,
    ) -> Answer:
        """Run a command in the host; `status` is what it must end with, None for any.

        `timeout_s` is the host's, whose processor may be emulated. Raises HostFailed.
        """
        self._orders += 1
        order = {"id": self._orders, "argv": argv, "timeout_s": timeout_s}
        order["environment"] = dict(environment or {})
        self._channel.sendall(json.dumps(order).encode() + b"\n")
        said = b""
        while True:
            answer = self._hear(timeout_s + 30, f"{' '.join(argv)}\n{_tail(said)}")
            if "boot" in answer:
                raise self.machine.failed(f"{' '.join(argv)}: the host has started anew meanwhile")
            if answer.get("id") != self._orders:
                continue
            said += base64.b64decode(answer.get("out", ""))
            if "status" in answer:
                break
        if answer["status"] is None or status not in (None, answer["status"]):
            how = "did not end in time" if answer["status"] is None else f"{answer['status']}"
            raise HostFailed(f"{' '.join(argv)}: status {how}\n{_tail(said)}")
        return Answer(answer["status"], said)

    def shell(self, script: str, **options: Any) -> Answer:
        return self.run("sh", "-euc", script, **options)

    def kvmsec(self, *arguments: str, **options: Any) -> Answer:
        return self.run("kvmsec", *arguments, **options)

    def listed(self, *arguments: str) -> Any:
        """What a listing or a check has, without what is said on stderr."""
        script = f"kvmsec {' '.join(arguments)} --json 2>/dev/null || [ $? = 3 ]"
        return self.shell(script).json()

    def await_boot(self) -> None:
        """Return once the agent of another boot than the last says that it is there."""
        while True:
            said = self._hear(BOOT_DEADLINE_S, "a boot")
            if said.get("boot", self.boot_id) != self.boot_id:
                self.boot_id = said["boot"]
                return

    def reboot(self) -> None:
        """Reset the machine, as a power cut does: nothing is told, nothing is stopped."""
        self.shell("sync; (sleep 1; echo b >/proc/sysrq-trigger) >/dev/null 2>&1 &")
        self.await_boot()

    def await_units(self) -> None:
        """Return once systemd has nothing more to start."""
        self.run("systemctl", "is-system-running", "--wait", status=None, timeout_s=BOOT_DEADLINE_S)

    def fetch(self, directory: str, into: Path) -> None:
        """Copy the files of one of the host's directories."""
        packed = self.run("tar", "-c", "-C", directory, ".", timeout_s=300).out
        into.mkdir(parents=True, exist_ok=True)
        with tarfile.open(fileobj=io.BytesIO(packed)) as archive:
            archive.extractall(into)

    def keep_logs(self, directory: Path) -> None:
        """Copy the journal, kvmsec's logs and the console to a directory."""
        self.shell(
            "rm -rf /tmp/logs; mkdir /tmp/logs; journalctl -b all --no-pager >/tmp/logs/journal; "
            "cp -r /var/log/kvmsec /tmp/logs/ 2>/dev/null || true"
        )
        self.fetch("/tmp/logs", directory)
        shutil.copy(self.machine.console, directory / "console.log")

    def _hear(self, within_s: float, what: str) -> dict[str, Any]:
        end = time.monotonic() + within_s
        while b"\n" not in self._heard:
            # In short turns, so that a host that ended is not waited for.
            if self.machine.process.poll() is not None or time.monotonic() > end:
                raise self.machine.failed(f"no answer within {within_s:g} s: {what}")
            self._channel.settimeout(min(1.0, max(0.01, end - time.monotonic())))
            try:
                self._heard += self._channel.recv(1 << 20)
            except TimeoutError:
                continue
        line, self._heard = self._heard.split(b"\n", 1)
        said: dict[str, Any] = json.loads(line)
        return said


def _tail(said: bytes) -> str:
    return said.decode(errors="replace")[-_TAIL_CHARS:]


@contextmanager
def debian(
    release: str, image: Path, disk: Path, directory: Path, stages: Stages
) -> Iterator[Host]:
    """A host of this release, with `disk` as /dev/vdb; nothing of what it changes is kept."""
    ours, theirs = socket.socketpair()
    options = [
        *("-kernel", str(image / "vmlinuz"), "-initrd", str(image / "initrd.img")),
        *("-append", "root=/dev/vda rw console=ttyS0 quiet panic=-1"),
        "-drive",
        f"file={image / 'root.ext4'},format=raw,if=virtio,snapshot=on,cache=unsafe",
        *("-drive", f"file={disk},format=raw,if=virtio,readonly=on"),
        *("-device", "virtio-serial-pci"),
        *("-chardev", f"socket,id=agent,fd={theirs.fileno()}"),
        *("-device", "virtserialport,chardev=agent,name=kvmsec.agent"),
    ]
    with (
        ours,
        booted(directory, options, memory_mib=MEMORY_MIB, pass_fds=[theirs.fileno()]) as machine,
    ):
        theirs.close()
        host = Host(release, machine, ours)
        with stages.measured(f"debian{release}: boot, until the agent answers"):
            host.await_boot()
        with stages.measured(f"debian{release}: boot, until all units are started"):
            host.await_units()
        yield host
