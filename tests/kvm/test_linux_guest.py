"""The Linux guest boots under TCG and does what its protocol says."""

import hashlib
import json
import os
import select
import socket
import subprocess
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pytest

pytestmark = pytest.mark.kvm

SOURCE = Path(__file__).parents[2] / "vm-images" / "linux"
OUTPUT = SOURCE / ".build"
BUILD_DEADLINE_S = 300
DEADLINE_S = 60.0
SECTOR = 512


class Guest:
    """A QEMU with the Linux guest, its serial line and its monitor; every wait has a deadline."""

    def __init__(self, process: subprocess.Popen[bytes], line: socket.socket, qmp: socket.socket):
        self.process = process
        self._line = line
        self._qmp = qmp.makefile("rwb")
        self._heard = b""

    def hear_line(self) -> str:
        """The next line from the guest, without its end."""
        end = time.monotonic() + DEADLINE_S
        while b"\r\n" not in self._heard:
            self._line.settimeout(max(end - time.monotonic(), 0.001))
            chunk = self._line.recv(65536)
            assert chunk, f"the serial line was closed after {self._heard!r}"
            self._heard += chunk
        line, self._heard = self._heard.split(b"\r\n", 1)
        return line.decode(errors="replace")

    def ask(self, command: str) -> str:
        self._line.sendall(command.encode() + b"\n")
        return self.hear_line()

    def order(self, command: str) -> None:
        """A QMP command, seen answered."""
        self._qmp.write(json.dumps({"execute": command}).encode() + b"\n")
        self._qmp.flush()
        while "return" not in (answer := json.loads(self._qmp.readline())):
            assert "error" not in answer, answer

    def end(self) -> int:
        """QEMU's exit status, once it has ended by itself."""
        descriptor = os.pidfd_open(self.process.pid)
        try:
            assert select.select([descriptor], [], [], DEADLINE_S)[0], "QEMU is still running"
        finally:
            os.close(descriptor)
        return self.process.wait()


@contextmanager
def run_guest(images: Path, *options: str) -> Iterator[Guest]:
    with ExitStack() as stack:
        line, line_inside = socket.socketpair()
        qmp, qmp_inside = socket.socketpair()
        for end in (line, line_inside, qmp, qmp_inside):
            stack.enter_context(end)
        qmp.settimeout(DEADLINE_S)
        argv = [
            *("qemu-system-x86_64", "-M", "pc", "-accel", "tcg", "-m", "128"),
            *("-nodefaults", "-no-user-config", "-display", "none", "-no-reboot"),
            *("-kernel", str(images / "vmlinuz"), "-initrd", str(images / "initrd.cpio.gz")),
            *("-append", "console=ttyS0 quiet panic=-1"),
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


@pytest.fixture(scope="module")
def images() -> Path:
    """Where kernel and initramfs are. The first build downloads, which the sandbox cannot."""
    done = subprocess.run(
        [SOURCE / "build", OUTPUT], capture_output=True, timeout=BUILD_DEADLINE_S, check=False
    )
    if done.returncode != 0:
        pytest.skip(f"run vm-images/linux/build first: {done.stderr.decode(errors='replace')}")
    return OUTPUT


@pytest.fixture(scope="module")
def disk(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("linux") / "disk.raw"
    path.write_bytes(b"".join(b"SECTOR-%09d" % number * (SECTOR // 16) for number in range(8)))
    return path


@pytest.fixture(scope="module")
def guest(images: Path, disk: Path) -> Iterator[Guest]:
    """One guest for this file, with a disk and QEMU's own network, its banner heard."""
    options = [
        *("-drive", f"if=none,id=d,format=raw,file={disk}", "-device", "virtio-blk-pci,drive=d"),
        *("-netdev", "user,id=n,restrict=on", "-device", "virtio-net-pci,netdev=n,romfile="),
    ]
    with run_guest(images, *options) as running:
        assert running.hear_line().endswith(" disks=vda nics=eth0")
        yield running


def test_it_says_what_it_found(guest: Guest) -> None:
    words = guest.ask("?").split()
    assert words[:3] == ["KVMSEC-LINUX", "up", "protocol=1"]
    assert [word.partition("=")[0] for word in words[3:]] == ["kernel", "uptime", "disks", "nics"]


def test_it_echoes_a_line_as_it_is(guest: Guest) -> None:
    assert guest.ask("echo two  blanks, a * and a \\n") == "ECHO two  blanks, a * and a \\n"


def test_it_reads_what_the_host_has_even_after_a_change(guest: Guest, disk: Path) -> None:
    def expected(contents: bytes) -> str:
        return f"READ vda 3 {contents[:16].decode()} sha256={hashlib.sha256(contents).hexdigest()}"

    before = b"SECTOR-000000003" * (SECTOR // 16)
    assert guest.ask("disk read 3") == expected(before)
    after = b"CHANGED-00000003" * (SECTOR // 16)
    with disk.open("r+b") as file:
        file.seek(3 * SECTOR)
        file.write(after)
    assert guest.ask("disk read 3") == expected(after)


def test_what_it_wrote_is_in_the_hosts_file(guest: Guest, disk: Path) -> None:
    assert guest.ask("disk write 5 from the  guest").startswith("WROTE vda 5 sha256=")
    contents = disk.read_bytes()
    assert contents[5 * SECTOR : 6 * SECTOR] == b"from the  guest".ljust(SECTOR, b"\0")
    assert contents[6 * SECTOR : 7 * SECTOR] == b"SECTOR-000000006" * (SECTOR // 16)


def test_a_sector_that_is_not_there_is_an_error(guest: Guest) -> None:
    assert guest.ask("disk read 8") == "ERROR disk failed"
    assert guest.ask("disk write 8 x") == "ERROR disk failed"
    assert guest.ask("disk read x").startswith("ERROR disk use NAME")
    assert guest.ask("disk use vdz") == "ERROR no disk vdz"


def test_it_reaches_what_answers_and_says_what_does_not(guest: Guest) -> None:
    """QEMU's own network answers at 10.0.2.2 by itself; nothing leaves the process."""
    assert "10.0.2.15/24" in guest.ask("ip 10.0.2.15/24 10.0.2.2")
    assert "fd00::15/64" in guest.ask("ip fd00::15/64")
    assert guest.ask("ping 10.0.2.2") == "PING 10.0.2.2 answered"
    assert guest.ask("ping fd00::15") == "PING fd00::15 answered"
    assert guest.ask("ping 10.0.2.77") == "PING 10.0.2.77 silent"
    assert guest.ask("ip nonsense") == "ERROR bad address"


def test_it_runs_a_command_and_tells_its_status(guest: Guest) -> None:
    assert guest.ask("run echo one; exit 3") == "one"
    assert guest.hear_line() == "EXIT 3"
    assert guest.ask("nonsense") == "UNKNOWN nonsense"


def test_without_devices_it_boots_and_heeds_the_power_button(images: Path) -> None:
    with run_guest(images) as guest:
        assert guest.hear_line().endswith(" disks=none nics=none")
        assert guest.ask("disk read 0") == "ERROR no disk"
        assert guest.ask("ip") == "ERROR no network interface"
        guest.order("system_powerdown")
        assert guest.hear_line() == "POWEROFF"
        assert guest.end() == 0


def test_it_powers_off_when_asked_on_the_line(images: Path) -> None:
    with run_guest(images) as guest:
        assert guest.hear_line().startswith("KVMSEC-LINUX up")
        assert guest.ask("poweroff") == "POWEROFF"
        assert guest.end() == 0


def test_a_second_build_does_nothing(images: Path) -> None:
    names = ("vmlinuz", "initrd.cpio.gz")
    before = [(images / name).stat().st_mtime_ns for name in names]
    subprocess.run([SOURCE / "build", images], check=True, timeout=BUILD_DEADLINE_S)
    assert [(images / name).stat().st_mtime_ns for name in names] == before
