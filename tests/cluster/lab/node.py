"""One node of a lab: namespaces, a disk and a cable of its own, and what a test does to it."""

import contextlib
import json
import os
import shutil
import signal
import socket
import struct
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Final
from uuid import uuid4

from hypervisor.cgroup_mounts import mounted
from kvmsec.linux.readiness import is_readable
from tests.cluster.lab.init import MESSAGE_BYTES
from tests.cluster.lab.process import Finished, Process
from tests.cluster.lab.switch import Switch
from tests.cluster.lab.traces import remove_group

CHECKOUT: Final = Path(__file__).resolve().parents[3]
PROGRAM: Final = (sys.executable, "-c", "from kvmsec.cli.main import entry_point; entry_point()")
DEADLINE_S: Final = 60.0
_NAMESPACES: Final = ("--mount", "--net", "--ipc", "--uts", "--pid", "--mount-proc")
_UCRED: Final = struct.Struct("=iII")
ENVIRONMENT: Final = {
    "PATH": f"{sys.prefix}/bin:/usr/sbin:/usr/bin:/sbin:/bin",
    "LC_ALL": "C.UTF-8",
    "HOME": "/root",
}


class Node:
    """A node. It has a disk as long as the lab is there, and runs between `boot` and `kill`."""

    def __init__(self, name: str, address: str, disk: Path, group: str, switch: Switch) -> None:
        self.name = name
        self.address = address
        self.disk = disk
        self.group = group
        self._switch = switch
        self._starter: subprocess.Popen[bytes] | None = None
        # A host keeps its card over a boot, and others keep its address.
        self._mac = "02:00:" + ":".join(f"{int(byte):02x}" for byte in address.split("."))
        self._init: int | None = None
        """The pidfd of its first process."""
        self._cable: str | None = None
        self._processes: list[Process] = []

    def furnish(self, hosts: str) -> None:
        """Make the node's disk: /etc as the host has it, with the names of all nodes."""
        (self.disk / "var").mkdir(parents=True)
        for place, mode in (("var/lib", 0o755), ("var/log", 0o755), ("var/tmp", 0o1777)):
            (self.disk / place).mkdir()
            (self.disk / place).chmod(mode)
        shutil.copytree("/etc", self.disk / "etc", symlinks=True)
        (self.disk / "etc/hosts").write_text(hosts)
        (self.disk / "etc/hostname").write_text(f"{self.name}\n")
        (self.disk / "output").mkdir()
        self.configure("")

    def configure(self, text: str) -> None:
        """Write kvmsec.toml; the group of what the node starts is in it already."""
        settings = self.disk / "etc/kvmsec"
        settings.mkdir(mode=0o700, exist_ok=True)
        (settings / "kvmsec.toml").write_text(f'[cgroup]\nparent = "{self.group}"\n{text}')

    # Life and death ----------------------------------------------------------------------------

    def boot(self) -> None:
        """Start the node, with what its disk had before and an empty /run."""
        assert not self.is_up, f"{self.name} is up already"
        (self.disk / "boot_id").write_text(f"{uuid4()}\n")
        self._channel, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._channel.setsockopt(socket.SOL_SOCKET, socket.SO_PASSCRED, 1)
        init = (sys.executable, "-m", "tests.cluster.lab.init", str(theirs.fileno()))
        with theirs, open(self.disk / "output/init", "ab") as output:
            self._starter = subprocess.Popen(
                ("unshare", *_NAMESPACES, "--fork", "--kill-child", "--", *init),
                env=ENVIRONMENT,
                cwd=CHECKOUT,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                pass_fds=(theirs.fileno(),),
                start_new_session=True,
            )
        shown = [str(CHECKOUT), sys.prefix]
        self._send({"name": self.name, "disk": str(self.disk), "shown": shown}, ())
        answer, first = self._hear()
        self._init = os.pidfd_open(first)
        assert "error" not in answer, f"{self.name} does not boot: {answer['error']}"
        self._cable = self._switch.plug_in(first, self._mac)
        for argv in (
            ("ip", "link", "set", "lo", "up"),
            ("ip", "address", "add", f"{self.address}/24", "dev", "eth0"),
            ("ip", "link", "set", "eth0", "up"),
        ):
            self.run(*argv)

    @property
    def is_up(self) -> bool:
        return self._starter is not None

    def kill(self) -> None:
        """End the node at once, as a power cut would: every process of it gets SIGKILL."""
        if self._starter is None:
            return
        starter, self._starter = self._starter, None
        with contextlib.ExitStack() as ends:  # Each is called, whatever another raises.
            ends.callback(self._remove_groups)
            if self._cable is not None:
                ends.callback(self._switch.unplug, self._cable)
            for process in self._processes:
                ends.callback(process.forget)
            ends.callback(self._channel.close)
            # It takes the first process of the namespace along (--kill-child), and that is gone
            # when all others are (pid_namespaces(7)).
            ends.callback(starter.wait, 10)
            ends.callback(starter.kill)
            if self._init is not None:
                # Reaped by it, the node's processor time is in that of the test.
                ends.callback(_ends_by_itself, starter)
                ends.callback(_kill_first, self._init)
        self._processes.clear()
        self._cable = self._init = None

    def _remove_groups(self) -> None:
        """Take away what is left of its control groups: a host that is off has none either."""
        for mount in mounted():
            remove_group(f"{mount.path}/{self.group}")

    def reboot(self) -> None:
        self.kill()
        self.boot()

    # Faults ------------------------------------------------------------------------------------

    def pause(self) -> None:
        """Stop every process of the node (SIGSTOP); its kernel goes on answering."""
        self._ask("signal_all", number=signal.SIGSTOP)

    def resume(self) -> None:
        self._ask("signal_all", number=signal.SIGCONT)

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        self.pause()
        try:
            yield
        finally:
            if self.is_up:
                self.resume()

    def cut_cable(self) -> None:
        self._switch.cut(self._plugged_in())

    def mend_cable(self) -> None:
        self._switch.mend(self._plugged_in())

    def _plugged_in(self) -> str:
        assert self._cable is not None, f"{self.name} is down"
        return self._cable

    @contextlib.contextmanager
    def cut_off(self) -> Iterator[None]:
        """The node's cable is cut meanwhile."""
        self.cut_cable()
        try:
            yield
        finally:
            if self.is_up:
                self.mend_cable()

    @contextlib.contextmanager
    def losing(self, percent: int) -> Iterator[None]:
        """So many of a hundred packets to and from the node are lost meanwhile."""
        self._switch.lose(self._plugged_in(), percent)
        try:
            yield
        finally:
            if self._cable is not None:
                self._switch.lose(self._cable, 0)

    # Programs ----------------------------------------------------------------------------------

    def spawn(
        self, *argv: str, name: str | None = None, env: Mapping[str, str] | None = None
    ) -> Process:
        """Start a program in the node that is not waited for; its output goes to a file."""
        path = self.disk / "output" / f"{name or Path(argv[0]).name}-{len(self._processes)}"
        with open(path, "wb") as output, open("/dev/null", "rb") as nothing:
            streams = (nothing.fileno(), output.fileno(), output.fileno())
            process = self._start(argv, streams, env, path)
        self._processes.append(process)
        return process

    def run(
        self,
        *argv: str,
        timeout_s: float = DEADLINE_S,
        status: int | None = 0,
        input: bytes = b"",  # noqa: A002  (as subprocess has it)
        env: Mapping[str, str] | None = None,
    ) -> Finished:
        """Run a program in the node to its end, which must be with `status` (None: any).

        Raises TookTooLong past `timeout_s` seconds; it is killed then.
        """
        # Files, not pipes: what it leaves running may hold its output open.
        with contextlib.ExitStack() as files:
            given, out, err = (files.enter_context(tempfile.TemporaryFile()) for _ in range(3))
            given.write(input)
            given.seek(0)
            streams = (given.fileno(), out.fileno(), err.fileno())
            process = self._start(argv, streams, env, Path(os.devnull))
            ended = process.status(timeout_s)
            said = [_content(one.fileno()) for one in (out, err)]
        done = Finished(argv, ended, *said)
        assert status is None or done.status == status, f"on {self.name}: {done}"
        return done

    def kvmsec(self, *arguments: str, status: int | None = 0, **options: Any) -> Finished:
        """Run the command in the node; it must not fail with a traceback either way."""
        done = self.run(*PROGRAM, *arguments, status=status, **options)
        assert "Traceback" not in done.stderr, done
        return done

    def json(self, *arguments: str, **options: Any) -> Any:
        """What a command of kvmsec's prints for machines."""
        return json.loads(self.kvmsec(*arguments, "--json", **options).stdout)

    def path(self, inside: str | Path) -> Path:
        """Where a file of the node's disk lies for the test (below /etc, /var/lib, /var/log)."""
        return self.disk / str(inside).lstrip("/")

    def _start(
        self,
        argv: Sequence[str],
        streams: tuple[int, int, int],
        env: Mapping[str, str] | None,
        output: Path,
    ) -> Process:
        reader, writer = os.pipe2(os.O_CLOEXEC)
        try:
            answer = self._ask(
                "spawn", (*streams, writer), argv=argv, env={**ENVIRONMENT, **(env or {})}
            )
        except BaseException:
            os.close(reader)
            raise
        finally:
            os.close(writer)
        return Process(tuple(argv), answer["pid"], reader, output, self._signal)

    def _signal(self, pid: int, number: int, session: bool) -> None:
        self._ask("signal", pid=pid, number=number, session=session)

    # The talk with the node's first process --------------------------------------------------

    def _ask(self, do: str, descriptors: Sequence[int] = (), **values: Any) -> Any:
        assert self.is_up, f"{self.name} is down"
        self._send({"do": do, **values}, descriptors)
        answer, _ = self._hear()
        if "error" in answer:
            raise OSError(answer["errno"], f"on {self.name}: {answer['error']}")
        return answer

    def _send(self, order: Mapping[str, Any], descriptors: Sequence[int]) -> None:
        socket.send_fds(self._channel, [json.dumps(order).encode()], descriptors)

    def _hear(self) -> tuple[dict[str, Any], int]:
        assert is_readable(self._channel.fileno(), 30), f"{self.name}'s first process is silent"
        room = socket.CMSG_SPACE(_UCRED.size)
        message, ancillary, _, _ = self._channel.recvmsg(MESSAGE_BYTES, room)
        assert message, f"{self.name}'s first process has ended"
        [sender] = [_UCRED.unpack(data)[0] for _, kind, data in ancillary if kind == 2]
        return json.loads(message), sender


def _kill_first(pidfd: int) -> None:
    """End the first process of a node by its descriptor, and wait until all others are gone."""
    try:
        with contextlib.suppress(ProcessLookupError):
            signal.pidfd_send_signal(pidfd, signal.SIGKILL)
        assert is_readable(pidfd, 10), "a node outlives the SIGKILL of its first process"
    finally:
        os.close(pidfd)


def _ends_by_itself(starter: subprocess.Popen[bytes]) -> None:
    with contextlib.suppress(subprocess.TimeoutExpired):
        starter.wait(1)


def _content(descriptor: int) -> str:
    return os.pread(descriptor, os.fstat(descriptor).st_size, 0).decode(errors="replace")
