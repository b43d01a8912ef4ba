"""What the tiny guest runs on here."""

import functools
import os
import select
import subprocess
import time
from pathlib import Path

from hypervisor import tiny

KVM_BOOT_DEADLINE_S = 5.0
LINUX_BOOT_DEADLINE_S = 10.0


@functools.cache
def accelerator() -> str:
    """`kvm` where the tiny guest boots under /dev/kvm, else `tcg`."""
    return "kvm" if _kvm_runs_the_guest() else "tcg"


def _kvm_runs_the_guest() -> bool:
    machine = ["-M", "pc", "-accel", "kvm", "-m", "1", "-bios", str(tiny.rom_path())]
    options = ["-nodefaults", "-no-user-config", "-display", "none", "-serial", "stdio"]
    qemu = subprocess.Popen(
        ["qemu-system-x86_64", *machine, *options],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
    )
    return _speaks(qemu, tiny.BANNER, _deadline_s(KVM_BOOT_DEADLINE_S))


@functools.cache
def runs_64_bit_guests(images: Path) -> bool:
    """Whether the Linux guest (see vm-images/linux) boots under /dev/kvm here."""
    machine = ["-M", "microvm", "-accel", "kvm", "-cpu", "host", "-m", "128"]
    boot = ["-kernel", images / "vmlinuz", "-initrd", images / "initrd.cpio.gz"]
    options = ["-nodefaults", "-no-user-config", "-display", "none", "-serial", "stdio"]
    qemu = subprocess.Popen(
        ["qemu-system-x86_64", *machine, *boot, *options, "-append", "console=ttyS0 quiet"],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
    )
    return _speaks(qemu, b"KVMSEC-LINUX up", _deadline_s(LINUX_BOOT_DEADLINE_S))


def _deadline_s(usual_s: float) -> float:
    """A host whose own processor is emulated takes longer than any that is not."""
    return float(os.environ.get("KVMSEC_KVM_BOOT_DEADLINE_S", usual_s))


def _speaks(qemu: subprocess.Popen[bytes], words: bytes, within_s: float) -> bool:
    with qemu:
        try:
            return _says(qemu, words, within_s)
        finally:
            qemu.kill()


def _says(qemu: subprocess.Popen[bytes], words: bytes, within_s: float) -> bool:
    assert qemu.stdout is not None
    heard, end = b"", time.monotonic() + within_s
    while words not in heard:
        if not select.select([qemu.stdout], [], [], max(0.0, end - time.monotonic()))[0]:
            return False
        chunk = os.read(qemu.stdout.fileno(), 4096)
        if not chunk:
            return False
        heard += chunk
    return True
