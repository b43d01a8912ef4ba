"""QEMU in a tree of nothing but its closure takes our command lines, as a uid without rights."""

import fcntl
import json
import os
import shutil
import socket
import struct
import subprocess
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path, PurePosixPath
from typing import Any, Literal

import pytest
from attrs import frozen

from hypervisor.closure import Closure, find_closure
from hypervisor.cmdline import Grants, ImageGrant, NicGrant, build
from hypervisor.errors import ClosureError
from hypervisor.features import Features, find_qemu, probe
from hypervisor.machine import Backing, Disk, Machine, Nic
from hypervisor.tiny import BANNER, rom_path
from kvmsec.linux import command
from kvmsec.linux.credentials import Credentials
from kvmsec.linux.errors import UntrustedPath

pytestmark = pytest.mark.kvm

Accelerator = Literal["kvm", "tcg"]
ACCELERATORS: tuple[Accelerator, ...] = ("kvm", "tcg") if Path("/dev/kvm").exists() else ("tcg",)
NOBODY = Credentials(230002, 230002)
DEADLINE_S = 20

# $1 is an empty directory, the rest what to execute in it; pairs of paths come on stdin. The tree
# is a mount of this process's own namespace and ends with it.
BUILD_TREE = """
set -e
boot="$2"
mount -t tmpfs -o mode=755 tree "$1"
cd "$1"
shift 2
mkdir dev output
cp -r "$boot" boot
chown {uid} output
while read -r source inside; do
    mkdir -p ".${{inside%/*}}"
    if [ -d "$source" ]; then mkdir -p ".$inside"; else touch ".$inside"; fi
    mount --bind "$source" ".$inside"
done
mknod -m 666 dev/null c 1 3
mknod -m 666 dev/urandom c 1 9
if [ -e /dev/kvm ]; then mknod -m 600 dev/kvm c 10 232; chown {uid} dev/kvm; fi
mount -t tmpfs -o size=64k,mode=755,uid={uid} output output
mount -o remount,ro tree .
exec chroot --userspec={uid}:{uid} --groups= . "$@" </dev/null
"""


@frozen
class Guest:
    """A QEMU that was started, and the two sockets that lead to it."""

    process: "subprocess.Popen[bytes]"
    qmp: socket.socket
    serial: socket.socket | None

    def ask(self, execute: str, **arguments: Any) -> Any:
        self.qmp.sendall(json.dumps({"execute": execute, "arguments": arguments}).encode() + b"\n")
        while True:
            answer = json.loads(self._line())
            if "event" not in answer and "QMP" not in answer:
                assert "return" in answer, answer
                return answer["return"]

    def _line(self) -> bytes:
        line = b""
        while not line.endswith(b"\n"):
            try:
                byte = self.qmp.recv(1)
            except ConnectionResetError:
                byte = b""
            if not byte:
                _, words = self.process.communicate(timeout=DEADLINE_S)
                pytest.fail(f"QEMU ended: {words.decode()}")
            line += byte
        return line


@pytest.fixture(scope="module")
def qemu() -> Path:
    return find_qemu(None, None)


@pytest.fixture(scope="module")
def features(qemu: Path) -> Features:
    return probe(qemu, credentials=NOBODY)


@pytest.fixture(scope="module")
def closures(qemu: Path) -> dict[str, Closure]:
    return {
        accelerator: find_closure(qemu, accelerator=accelerator, credentials=NOBODY)
        for accelerator in ACCELERATORS
    }


def kernel_image() -> bytes:
    """A bzImage of nothing, with what a loader reads of it (Documentation/arch/x86/boot.rst)."""
    image = bytearray(1 << 16)
    image[0x1F1] = 1  # setup_sects
    image[0x202:0x206] = b"HdrS"
    struct.pack_into("<H", image, 0x206, 0x020C)  # version of the boot protocol
    image[0x211] = 1  # loadflags: LOADED_HIGH
    struct.pack_into("<I", image, 0x22C, 0x7FFFFFFF)  # initrd_addr_max
    return bytes(image)


@pytest.fixture
def workplace(tmp_path: Path) -> Path:
    (tmp_path / "boot").mkdir()
    shutil.copy(rom_path(), tmp_path / "boot/firmware")
    (tmp_path / "boot/kernel").write_bytes(kernel_image())
    (tmp_path / "boot/initrd").write_bytes(bytes(512))
    (tmp_path / "tree").mkdir()
    for name in ("disk", "base", "tools"):
        (tmp_path / name).write_bytes(bytes(1 << 20))
    for name, below, kind in (("middle", "base", "raw"), ("top", "middle", "qcow2")):
        made = ("-f", "qcow2", "-b", str(tmp_path / below), "-F", kind, str(tmp_path / name))
        command.run(["qemu-img", "create", "-q", *made], timeout_s=DEADLINE_S)
    return tmp_path


def machines(place: Path) -> dict[str, Machine]:
    """A machine of every family and every device model that a definition can lead to."""
    disk, top = place / "disk", place / "top"
    chain = (Backing(place / "middle", "qcow2"), Backing(place / "base"))
    kernel, initrd = Path("/somewhere/kernel"), Path("/somewhere/initrd")
    return {
        "tiny": Machine(
            name="tiny", memory_mib=1, firmware=rom_path(), disks=(Disk(disk, device="ide"),)
        ),
        "pc": Machine(
            name="pc",
            vcpus=2,
            disks=(
                Disk(top, format="qcow2", backing=chain, serial="system"),
                Disk(place / "tools", device="cdrom"),
            ),
            nics=(Nic(bridge="br0"), Nic(tap="t0", model="e1000"), Nic(tap="t1", model="rtl8139")),
        ),
        "q35": Machine(
            name="q35",
            machine="q35",
            disks=(
                Disk(disk, cache="none", aio="native"),
                Disk(top, format="qcow2", backing=chain, device="scsi", readonly=True),
                Disk(place / "tools", device="cdrom"),
            ),
            nics=(Nic(bridge="br0"), Nic(tap="t0", model="e1000e")),
            kernel=kernel,
            initrd=initrd,
            append="console=ttyS0",
        ),
        "microvm": Machine(
            name="microvm",
            machine="microvm",
            disks=(Disk(disk, detect_zeroes="unmap"), Disk(place / "tools", readonly=True)),
            nics=(Nic(bridge="br0"),),
            kernel=kernel,
            initrd=initrd,
            append="console=ttyS0",
        ),
    }


def listener(path: Path) -> socket.socket:
    made = socket.socket(socket.AF_UNIX)
    made.bind(str(path))
    made.listen(1)
    return made


def new_tap() -> int:
    """A tap as a launcher opens it: TUNSETIFF with IFF_TAP, IFF_NO_PI, IFF_VNET_HDR (if_tun.h)."""
    tap = os.open("/dev/net/tun", os.O_RDWR | os.O_NONBLOCK)
    fcntl.ioctl(tap, 0x400454CA, struct.pack("16sH22x", b"", 0x0002 | 0x1000 | 0x4000))
    return tap


def grants_for(machine: Machine, stack: ExitStack, place: Path) -> tuple[Grants, list[int]]:
    """Open everything that the machine needs, as root; QEMU gets the same numbers."""
    opened: list[int] = []

    def keep(descriptor: int) -> int:
        stack.callback(os.close, descriptor)
        opened.append(descriptor)
        return descriptor

    def image(path: Path, is_written: bool, is_direct: bool) -> ImageGrant:
        mode = os.O_RDWR if is_written else os.O_RDONLY
        return ImageGrant(keep(os.open(path, mode | (os.O_DIRECT if is_direct else 0))))

    def in_jail(name: str) -> PurePosixPath | None:
        return None if getattr(machine, name) is None else PurePosixPath("/boot", name)

    grants = Grants(
        qmp=keep(listener(place / "qmp").detach()),
        serial=keep(listener(place / "serial").detach()),
        serial_log=PurePosixPath("/output/serial"),
        disks=tuple(
            (
                image(disk.path, disk.is_written, disk.is_direct),
                *(image(file.path, False, disk.is_direct) for file in disk.backing),
            )
            for disk in machine.disks
        ),
        nics=tuple(NicGrant(keep(new_tap())) for _ in machine.nics),
        firmware=in_jail("firmware"),
        kernel=in_jail("kernel"),
        initrd=in_jail("initrd"),
    )
    return grants, opened


@contextmanager
def started(
    machine: Machine, features: Features, closure: Closure, accelerator: Accelerator, place: Path
) -> Iterator[Guest]:
    with ExitStack() as stack:
        grants, opened = grants_for(machine, stack, place)
        argv = build(machine, features, grants, accelerator=accelerator)
        pairs = "".join(f"{source} {inside}\n" for source, inside in closure.binds)
        tree, boot = str(place / "tree"), str(place / "boot")
        process = subprocess.Popen(
            [
                *("unshare", "--mount", "--net", "--ipc", "sh", "-c"),
                *(BUILD_TREE.format(uid=NOBODY.uid), "build-tree", tree, boot),
                *(closure.program, *argv),
            ],
            stdin=subprocess.PIPE,
            stderr=subprocess.PIPE,
            env={"PATH": "/usr/sbin:/usr/bin:/sbin:/bin"},
            pass_fds=opened,
        )
        stack.enter_context(process)
        stack.callback(process.kill)
        assert process.stdin
        process.stdin.write(pairs.encode())
        process.stdin.close()
        process.stdin = None
        sockets = [stack.enter_context(socket.socket(socket.AF_UNIX)) for _ in range(2)]
        for each, name in zip(sockets, ("qmp", "serial"), strict=True):
            each.settimeout(DEADLINE_S)
            each.connect(str(place / name))
        # The listeners' own copies are closed here: QEMU's end must be the only one to wait on.
        yield Guest(process, *sockets)


@pytest.mark.parametrize("accelerator", ACCELERATORS)
@pytest.mark.parametrize("name", ["tiny", "pc", "q35", "microvm"])
def test_qemu_takes_the_command_line_in_a_tree_of_its_closure(
    name: str,
    accelerator: Accelerator,
    features: Features,
    closures: dict[str, Closure],
    workplace: Path,
) -> None:
    machine = machines(workplace)[name]
    with started(machine, features, closures[accelerator], accelerator, workplace) as guest:
        guest.ask("qmp_capabilities")
        assert guest.ask("query-status")["status"] == "prelaunch"
        assert guest.ask("query-name") == {"name": machine.name}
        assert guest.ask("query-kvm")["enabled"] == (accelerator == "kvm")
        assert len(guest.ask("query-cpus-fast")) == machine.vcpus
        blocks = {block["qdev"]: block["inserted"] for block in guest.ask("query-block")}
        assert len(blocks) == len(machine.disks)
        written = [not block["ro"] for block in blocks.values()]
        assert sorted(written) == sorted(disk.is_written for disk in machine.disks)
        status = Path(f"/proc/{guest.process.pid}/status").read_text()
        assert f"Uid:\t{NOBODY.uid}\t{NOBODY.uid}\t{NOBODY.uid}\t{NOBODY.uid}" in status
        assert "Seccomp:\t2" in status
        guest.ask("quit")
        assert guest.process.wait(DEADLINE_S) == 0


@pytest.mark.parametrize("accelerator", ACCELERATORS)
def test_a_guest_runs_in_a_tree_of_the_closure(
    accelerator: Accelerator, features: Features, closures: dict[str, Closure], workplace: Path
) -> None:
    machine = machines(workplace)["tiny"]
    with started(machine, features, closures[accelerator], accelerator, workplace) as guest:
        guest.ask("qmp_capabilities")
        guest.ask("cont")
        assert guest.serial
        said = b""
        while b"\n" not in said.partition(BANNER)[2]:
            chunk = guest.serial.recv(4096)
            assert chunk, said
            said += chunk
        tree = Path(f"/proc/{guest.process.pid}/root")
        assert BANNER in (tree / "output/serial").read_bytes()


def test_a_closure_is_small_and_names_no_library_twice(closures: dict[str, Closure]) -> None:
    for accelerator, closure in closures.items():
        print(f"{accelerator}: {len(closure.binds)} entries")
        inside = [path for _, path in closure.binds]
        assert len(set(inside)) == len(inside)
        assert closure.program in inside
        assert not any(
            other != path and Path(other) in Path(path).parents
            for other in inside
            for path in inside
        )
        assert all(not Path(source).is_symlink() for source, _ in closure.binds)
        assert "/usr/lib/x86_64-linux-gnu" not in inside


def test_tcg_takes_more_than_kvm_where_it_is_a_module(closures: dict[str, Closure]) -> None:
    if "kvm" in closures:
        more = set(closures["tcg"].binds) - set(closures["kvm"].binds)
        assert all("tcg" in source for source, _ in more)
        assert set(closures["kvm"].binds) <= set(closures["tcg"].binds)


def test_a_closure_is_found_anew_when_a_part_of_it_changed(tmp_path: Path) -> None:
    program, cache = Path("/run/kvmsec-part/program"), tmp_path / "cache"
    program.parent.mkdir(mode=0o755, exist_ok=True)
    # A static program: it needs nothing, and is asked nothing.
    shutil.copy(static_program(), program)
    program.chmod(0o755)
    first = find_closure(program, accelerator="kvm", credentials=NOBODY, cache=cache)
    kept = {file: file.stat().st_mtime_ns for file in cache.iterdir()}
    assert find_closure(program, accelerator="kvm", credentials=NOBODY, cache=cache) == first
    assert {file: file.stat().st_mtime_ns for file in cache.iterdir()} == kept
    program.chmod(0o777)
    with pytest.raises(UntrustedPath):
        find_closure(program, accelerator="kvm", credentials=NOBODY, cache=cache)
    program.chmod(0o755)
    program.write_bytes(b"#!/bin/sh\n")
    with pytest.raises(ClosureError):
        find_closure(program, accelerator="kvm", credentials=NOBODY, cache=cache)


def static_program() -> Path:
    """The dynamic loader is itself a program that needs no other."""
    return Path(os.path.realpath("/lib64/ld-linux-x86-64.so.2"))
