"""The Linux guest boots under TCG and does what its protocol says."""

import hashlib
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.kvm.plain_guest import Guest, run_guest

pytestmark = pytest.mark.kvm

SOURCE = Path(__file__).parents[2] / "vm-images" / "linux"
OUTPUT = SOURCE / ".build"
BUILD_DEADLINE_S = 300
SECTOR = 512


@contextmanager
def run_linux(images: Path, *options: str) -> Iterator[Guest]:
    boot = ["-kernel", str(images / "vmlinuz"), "-initrd", str(images / "initrd.cpio.gz")]
    boot += ["-append", "console=ttyS0 quiet panic=-1", "-no-reboot"]
    with run_guest(*boot, *options, accelerator="tcg", memory_mib=128) as guest:
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
    with run_linux(images, *options) as running:
        assert running.hear_line().endswith(" disks=vda nics=eth0")
        yield running


def test_it_says_what_it_found(guest: Guest) -> None:
    words = guest.ask(b"?\n").split()
    assert words[:3] == ["KVMSEC-LINUX", "up", "protocol=1"]
    assert [word.partition("=")[0] for word in words[3:]] == ["kernel", "uptime", "disks", "nics"]


def test_it_echoes_a_line_as_it_is(guest: Guest) -> None:
    assert guest.ask(b"echo two  blanks, a * and a \\n\n") == "ECHO two  blanks, a * and a \\n"


def test_it_reads_what_the_host_has_even_after_a_change(guest: Guest, disk: Path) -> None:
    def expected(contents: bytes) -> str:
        return f"READ vda 3 {contents[:16].decode()} sha256={hashlib.sha256(contents).hexdigest()}"

    before = b"SECTOR-000000003" * (SECTOR // 16)
    assert guest.ask(b"disk read 3\n") == expected(before)
    after = b"CHANGED-00000003" * (SECTOR // 16)
    with disk.open("r+b") as file:
        file.seek(3 * SECTOR)
        file.write(after)
    assert guest.ask(b"disk read 3\n") == expected(after)


def test_what_it_wrote_is_in_the_hosts_file(guest: Guest, disk: Path) -> None:
    assert guest.ask(b"disk write 5 from the  guest\n").startswith("WROTE vda 5 sha256=")
    contents = disk.read_bytes()
    assert contents[5 * SECTOR : 6 * SECTOR] == b"from the  guest".ljust(SECTOR, b"\0")
    assert contents[6 * SECTOR : 7 * SECTOR] == b"SECTOR-000000006" * (SECTOR // 16)


def test_a_sector_that_is_not_there_is_an_error(guest: Guest) -> None:
    assert guest.ask(b"disk read 8\n") == "ERROR disk failed"
    assert guest.ask(b"disk write 8 x\n") == "ERROR disk failed"
    assert guest.ask(b"disk read x\n").startswith("ERROR disk use NAME")
    assert guest.ask(b"disk use vdz\n") == "ERROR no disk vdz"


def test_it_reaches_what_answers_and_says_what_does_not(guest: Guest) -> None:
    """QEMU's own network answers at 10.0.2.2 by itself; nothing leaves the process."""
    assert "10.0.2.15/24" in guest.ask(b"ip 10.0.2.15/24 10.0.2.2\n")
    assert "fd00::15/64" in guest.ask(b"ip fd00::15/64\n")
    assert guest.ask(b"ping 10.0.2.2\n") == "PING 10.0.2.2 answered"
    assert guest.ask(b"ping fd00::15\n") == "PING fd00::15 answered"
    assert guest.ask(b"ping 10.0.2.77\n") == "PING 10.0.2.77 silent"
    assert guest.ask(b"ip nonsense\n") == "ERROR bad address"


def test_it_runs_a_command_and_tells_its_status(guest: Guest) -> None:
    assert guest.ask(b"run echo one; exit 3\n") == "one"
    assert guest.hear_line() == "EXIT 3"
    assert guest.ask(b"nonsense\n") == "UNKNOWN nonsense"


def test_without_devices_it_boots_and_heeds_the_power_button(images: Path) -> None:
    with run_linux(images) as guest:
        assert guest.hear_line().endswith(" disks=none nics=none")
        assert guest.ask(b"disk read 0\n") == "ERROR no disk"
        assert guest.ask(b"ip\n") == "ERROR no network interface"
        guest.order("system_powerdown")
        assert guest.hear_line() == "POWEROFF"
        assert guest.end() == 0


def test_it_powers_off_when_asked_on_the_line(images: Path) -> None:
    with run_linux(images) as guest:
        assert guest.hear_line().startswith("KVMSEC-LINUX up")
        assert guest.ask(b"poweroff\n") == "POWEROFF"
        assert guest.end() == 0


def test_a_second_build_does_nothing(images: Path) -> None:
    names = ("vmlinuz", "initrd.cpio.gz")
    before = [(images / name).stat().st_mtime_ns for name in names]
    subprocess.run([SOURCE / "build", images], check=True, timeout=BUILD_DEADLINE_S)
    assert [(images / name).stat().st_mtime_ns for name in names] == before
