"""The tiny guest's own life under a plain QEMU: nothing of kvmsec's but the ROM takes part."""

import os
import shutil
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from hypervisor import tiny
from tests.kvm.plain_guest import Guest, run_guest
from tests.kvm.serial_line import DEADLINE_S

pytestmark = pytest.mark.kvm

BUILD = Path(__file__).parents[2] / "vm-images" / "tiny" / "build"
KVM_BOOT_DEADLINE_S = 5.0
SECTOR = 512
CLOCK_TICKS_PER_S = os.sysconf("SC_CLK_TCK")


def rom_options() -> list[str]:
    return ["-bios", str(tiny.rom_path())]


def disk_options(path: Path, device: str, *extra: str) -> list[str]:
    drive = ",".join(["if=none", "id=d", "format=raw", f"file={path}", *extra])
    return ["-drive", drive, "-device", f"{device},drive=d"]


@pytest.fixture(scope="module")
def kvm_runs_the_guest() -> bool:
    """Whether /dev/kvm runs it: booting says so, the device's presence doesn't."""
    try:
        with run_guest(*rom_options(), accelerator="kvm") as guest:
            guest.hear_line(KVM_BOOT_DEADLINE_S)
    except (OSError, ValueError, AssertionError):
        return False
    return True


@pytest.fixture(params=["kvm", "tcg"])
def accelerator(request: pytest.FixtureRequest) -> str:
    if request.param == "kvm" and not request.getfixturevalue("kvm_runs_the_guest"):
        pytest.skip("this machine's /dev/kvm does not run the tiny guest")
    return str(request.param)


@pytest.fixture
def disk(tmp_path: Path) -> Path:
    """Ten sectors: the first 16 bytes of each are its name, the rest differs from byte to byte."""
    path = tmp_path / "disk.raw"
    path.write_bytes(b"".join(sector_contents(number) for number in range(10)))
    return path


@pytest.fixture
def bootable(tmp_path: Path) -> Path:
    if shutil.which("nasm") is None:
        pytest.skip("nasm is missing: apt-get install nasm")
    subprocess.run([BUILD, tmp_path], check=True, timeout=DEADLINE_S)
    return tmp_path / "tiny.img"


@pytest.fixture
def guest(accelerator: str) -> Iterator[Guest]:
    """The ROM without a disk, its banner heard."""
    with run_guest(*rom_options(), accelerator=accelerator) as running:
        assert running.hear_line().startswith(tiny.BANNER.decode())
        yield running


Start = Callable[..., Guest]


@pytest.fixture
def start(accelerator: str) -> Iterator[Start]:
    """Start the ROM with further options and hear its banner."""
    with ExitStack() as stack:

        def start_with(*options: str, machine: str = "pc", disk: str = "none") -> Guest:
            running = stack.enter_context(
                run_guest(*rom_options(), *options, accelerator=accelerator, machine=machine)
            )
            assert running.hear_line().endswith(f"disk={disk}")
            return running

        yield start_with


def sector_contents(number: int) -> bytes:
    name = f"SECTOR-{number:09d}".encode()
    return name + bytes((number * 31 + offset) % 256 for offset in range(16, SECTOR))


def count_contents(count: int) -> bytes:
    return f"KVMSEC-W{count:08x}".encode() * (SECTOR // 16)


def sum_of(sector: bytes) -> str:
    words = (int.from_bytes(sector[at : at + 2], "little") for at in range(0, SECTOR, 2))
    return f"{sum(words) & 0xFFFF:08x}"


@pytest.mark.parametrize(
    ("machine", "power", "device", "kind"),
    [
        ("pc", "piix4", None, "none"),
        ("pc", "piix4", "ide-hd", "ide"),
        ("pc", "piix4", "ide-hd,bus=ide.0,unit=1", "ide"),
        ("pc", "piix4", "ide-cd", "none"),
        ("pc", "piix4", "virtio-blk-pci", "virtio"),
        ("pc", "piix4", "virtio-blk-pci,queue-size=64", "virtio"),
        ("q35", "ich9", None, "none"),
        ("q35", "ich9", "virtio-blk-pci", "virtio"),
    ],
)
def test_the_rom_boots_and_says_what_it_found(
    accelerator: str, disk: Path, machine: str, power: str, device: str | None, kind: str
) -> None:
    options = [*rom_options(), *(disk_options(disk, device) if device else [])]
    with run_guest(*options, accelerator=accelerator, machine=machine) as guest:
        banner = f"KVMSEC-TINY up protocol=1 boot=rom power={power} disk={kind}"
        assert guest.hear_line() == banner
        assert guest.ask(b"?") == banner
        guest.order("system_powerdown")
        assert guest.hear_line() == "POWEROFF"
        assert guest.end() == 0


@pytest.mark.parametrize(
    ("accelerator", "machine", "device", "kind"),
    [
        ("kvm", "pc", "virtio-blk-pci", "virtio"),
        ("tcg", "pc", "virtio-blk-pci", "virtio"),
        ("tcg", "pc", "ide-hd", "ide"),
        ("tcg", "q35", "ide-hd", "none"),
    ],
    indirect=["accelerator"],
)
def test_the_disk_boots_through_a_bios(
    accelerator: str, bootable: Path, machine: str, device: str, kind: str
) -> None:
    options = disk_options(bootable, device)
    with run_guest(*options, accelerator=accelerator, machine=machine) as guest:
        banner = guest.hear_line()
        assert banner.startswith("KVMSEC-TINY up protocol=1 boot=disk ")
        assert banner.endswith(f"disk={kind}")
        if kind != "none":
            mark = bootable.read_bytes()[SECTOR : 2 * SECTOR]
            assert guest.ask(b"r") == f"READ 1 KVMSEC-DISK-0001 sum={sum_of(mark)}"
            assert guest.ask(b"2") == "SECTOR 2"
            assert guest.ask(b"w") == "WROTE 2 00000001"
            assert bootable.read_bytes()[2 * SECTOR : 3 * SECTOR] == count_contents(1)
        guest.order("system_powerdown")
        assert guest.end() == 0


def test_a_line_is_echoed_and_the_next_command_is_heard(guest: Guest) -> None:
    assert guest.ask(b"ehello, guest\r\n") == "ECHO hello, guest"
    assert guest.ask(b"e\n") == "ECHO "
    assert guest.ask(b"e\xff\x00\x1b[2J\n") == "ECHO \xff\x00\x1b[2J"
    assert guest.ask(b"?").startswith("KVMSEC-TINY up")


def test_nothing_is_lost_of_what_is_sent_at_once(guest: Guest) -> None:
    text = bytes(33 + at % 90 for at in range(20_000))
    assert guest.ask(b"e" + text + b"\n") == "ECHO " + text.decode()
    guest.say(b"".join(b"e%d\n" % number for number in range(500)))
    assert [guest.hear_line() for _ in range(500)] == [f"ECHO {number}" for number in range(500)]


def test_a_byte_that_is_no_command_is_named(guest: Guest) -> None:
    assert guest.ask(b"0") == "UNKNOWN 00000030"
    assert guest.ask(b"\x00") == "UNKNOWN 00000000"
    assert guest.ask(b"\xff") == "UNKNOWN 000000ff"


@pytest.mark.parametrize("device", ["ide-hd", "virtio-blk-pci"])
def test_what_the_host_put_into_a_sector_is_read(start: Start, disk: Path, device: str) -> None:
    guest = start(*disk_options(disk, device), disk=device.split("-")[0])
    for number in (1, 9):
        assert guest.ask(b"%d" % number) == f"SECTOR {number}"
        contents = sector_contents(number)
        name = contents[:16].decode()
        assert guest.ask(b"r") == f"READ {number} {name} sum={sum_of(contents)}"


@pytest.mark.parametrize("device", ["ide-hd", "virtio-blk-pci"])
def test_what_the_guest_wrote_is_in_the_hosts_file(start: Start, disk: Path, device: str) -> None:
    guest = start(*disk_options(disk, device), disk=device.split("-")[0])
    for count, number in ((1, 3), (2, 3), (3, 9)):
        guest.ask(b"%d" % number)
        assert guest.ask(b"w") == f"WROTE {number} {count:08x}"
        written = disk.read_bytes()
        assert written[number * SECTOR :][:SECTOR] == count_contents(count)
        assert guest.ask(b"r").startswith(f"READ {number} KVMSEC-W{count:08x} ")
    for number in {*range(10)} - {3, 9}:
        assert disk.read_bytes()[number * SECTOR :][:SECTOR] == sector_contents(number)


@pytest.mark.parametrize("device", ["ide-hd", "virtio-blk-pci"])
def test_commands_wait_while_the_disk_is_busy(start: Start, disk: Path, device: str) -> None:
    slow = disk_options(disk, device, "throttling.iops-total=60")
    guest = start(*slow, disk=device.split("-")[0])
    guest.say(b"4" + b"w" * 20 + b"eafter\n")
    assert guest.hear_line() == "SECTOR 4"
    for count in range(1, 21):
        assert guest.hear_line() == f"WROTE 4 {count:08x}"
    assert guest.hear_line() == "ECHO after"


def test_a_missing_disk_is_said_and_nothing_else_suffers(guest: Guest) -> None:
    assert guest.ask(b"r") == "ERROR no disk"
    assert guest.ask(b"w") == "ERROR no disk"
    assert guest.ask(b"estill here\n") == "ECHO still here"


@pytest.mark.parametrize("device", ["ide-hd", "virtio-blk-pci"])
def test_a_sector_beyond_the_disk_is_an_error(start: Start, tmp_path: Path, device: str) -> None:
    small = tmp_path / "small.raw"
    small.write_bytes(sector_contents(0) + sector_contents(1))
    guest = start(*disk_options(small, device), disk=device.split("-")[0])
    guest.ask(b"8")
    assert guest.ask(b"r") == "ERROR disk failed"
    assert guest.ask(b"w") == "ERROR disk failed"
    assert guest.ask(b"1") == "SECTOR 1"
    assert guest.ask(b"r").startswith("READ 1 SECTOR-000000001 ")


def test_a_read_only_disk_refuses_a_write(start: Start, disk: Path) -> None:
    guest = start(*disk_options(disk, "virtio-blk-pci", "readonly=on"), disk="virtio")
    assert guest.ask(b"w") == "ERROR disk failed"
    assert guest.ask(b"r").startswith("READ 1 SECTOR-000000001 ")


@pytest.mark.parametrize("busy", [b"s", b"f", b"ehalf a li"], ids=["spins", "floods", "listens"])
def test_the_power_button_ends_a_guest_that_is_busy(guest: Guest, busy: bytes) -> None:
    """Nobody reads the line meanwhile, so the one that floods is stalled."""
    assert guest.ask(b"ewatch\n" + busy) == "ECHO watch"
    guest.order("system_powerdown")
    assert guest.end() == 0


def test_it_powers_off_when_asked_on_the_line(guest: Guest) -> None:
    assert guest.ask(b"p") == "POWEROFF"
    assert guest.end() == 0


def test_a_guest_that_hangs_hears_nothing_any_more(guest: Guest) -> None:
    assert guest.ask(b"h") == "HANG"
    guest.order("system_powerdown")
    guest.say(b"?")
    assert guest.is_silent(for_s=0.5)
    assert guest.order("query-status")["status"] == "running"


@pytest.mark.parametrize("machine", ["pc", "q35"])
def test_a_reset_starts_it_afresh(start: Start, disk: Path, machine: str) -> None:
    guest = start(*disk_options(disk, "virtio-blk-pci"), machine=machine, disk="virtio")
    assert guest.ask(b"w") == "WROTE 1 00000001"
    assert guest.ask(b"x") == "RESET"
    assert guest.hear_line().startswith("KVMSEC-TINY up")
    assert guest.ask(b"w") == "WROTE 1 00000001"
    guest.order("system_reset")
    assert guest.hear_line().startswith("KVMSEC-TINY up")
    assert guest.ask(b"r").startswith("READ 1 KVMSEC-W00000001 ")


def test_the_timer_ticks_only_while_it_is_on(guest: Guest) -> None:
    assert guest.ask(b"t") == "TICKS 00000000"
    guest.ask(b"T")
    end = time.monotonic() + DEADLINE_S
    while int(guest.ask(b"t").removeprefix("TICKS "), 16) < 5:
        assert time.monotonic() < end, "the timer does not tick"
    last = guest.ask(b"T")
    assert guest.is_silent(for_s=0.3)
    assert guest.ask(b"t") == last


def test_an_idle_guest_costs_no_processor_time(guest: Guest) -> None:
    guest.ask(b"eawake\n")
    assert guest.cpu_ticks_during(1.0) <= 0.05 * CLOCK_TICKS_PER_S


def test_a_spinning_guest_costs_processor_time_until_a_byte_comes(guest: Guest) -> None:
    assert guest.ask(b"s") == "SPIN"
    spent, end = 0, time.monotonic() + DEADLINE_S
    while spent < 0.3 * CLOCK_TICKS_PER_S:
        assert time.monotonic() < end, "it does not spin"
        spent += guest.cpu_ticks_during(0.2)
    guest.say(b"tst")
    for answer in ("SPUN ", "TICKS 00000000", "SPIN", "SPUN ", "TICKS 00000000"):
        assert guest.hear_line().startswith(answer)
    assert guest.cpu_ticks_during(1.0) <= 0.05 * CLOCK_TICKS_PER_S


def test_a_flood_ends_with_the_next_byte(guest: Guest) -> None:
    assert guest.ask(b"f") == "FLOOD 00000001"
    guest.say(b"edry\n")
    while (line := guest.hear_line()).startswith("FLOOD"):
        pass
    assert line == "ECHO dry"
