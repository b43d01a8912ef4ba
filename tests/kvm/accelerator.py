"""What the tiny guest runs on here."""

import functools
import os
import select
import subprocess
import time

from hypervisor import tiny

KVM_BOOT_DEADLINE_S = 5.0


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
    with qemu:
        try:
            return _says(qemu, tiny.BANNER, KVM_BOOT_DEADLINE_S)
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
