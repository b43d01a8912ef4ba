"""libvirt, driven by `virsh` and by its Python binding; run by Debian's Python.

Its daemons and QEMUs are this process's descendants: it is their subreaper, for libvirt waits at
each stop until the process is gone, which a zombie that nobody collects never is.

usage: libvirt_domains.py ROM DISK
"""

import contextlib
import ctypes
import os
import shutil
import signal
import stat
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

from orders import serve

NAME = "bench"
URI = "qemu:///system"
VIRSH = ["virsh", "--quiet", "--connect", URI]
PR_SET_CHILD_SUBREAPER = 36  # prctl(2)
DEADLINE_S = 60


def main() -> None:
    # It ends when it is told nothing more, and then takes everything along.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    ctypes.CDLL(None).prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
    child = os.fork()
    if child == 0:
        drive(*sys.argv[1:])
        os._exit(0)
    collect(until=child)


def collect(until: int) -> None:
    """Take every zombie as it comes; all that is left ends with the driver."""
    while os.wait()[0] != until:
        pass
    for line in Path(f"/proc/self/task/{os.getpid()}/children").read_text().split():
        os.kill(int(line), signal.SIGTERM)
    with contextlib.suppress(ChildProcessError):
        while True:
            os.wait()


def drive(rom: str, disk: str) -> None:
    make_users()
    give_kvm_to_its_group()
    for place in ("/run/libvirt", "/var/lib/libvirt/qemu", "/var/log/libvirt/qemu", "/etc/libvirt"):
        Path(place).mkdir(parents=True, exist_ok=True)
    copy = Path(shutil.copy(rom, "/var/lib/libvirt/tiny.rom"))
    copy.chmod(0o644)  # Where its uid may read it, whatever is above the checkout.
    begin("virtlogd", Path("/run/libvirt/virtlogd-sock").exists)
    begin("libvirtd", lambda: subprocess.run([*VIRSH, "uri"], capture_output=True).returncode == 0)
    definition = Path("/run/libvirt/domain.xml")
    definition.write_text(domain(copy, Path(disk)))
    subprocess.run([*VIRSH, "define", str(definition)], check=True, stdout=subprocess.DEVNULL)
    import libvirt

    bound = libvirt.open(URI).lookupByName(NAME)
    serve(
        {
            "version": lambda: libvirt.getVersion(),
            "virsh start": lambda: timed(virsh("start")),
            "virsh stop": lambda: timed(virsh("destroy")),
            "binding start": lambda: timed(bound.create),
            "binding stop": lambda: timed(bound.destroy),
        }
    )


def make_users() -> None:
    """What the package's maintainer script makes; the accounts are the sandbox's."""
    subprocess.run(["groupadd", "--force", "--system", "libvirt-qemu"], check=True)
    subprocess.run(["groupadd", "--force", "--system", "kvm"], check=True)
    useradd = "useradd --system --no-create-home -g libvirt-qemu -G kvm libvirt-qemu"
    subprocess.run(useradd.split(), check=True)


def give_kvm_to_its_group() -> None:
    """/dev/kvm as udev sets it up, in this mount namespace alone."""
    real = Path("/dev/kvm")
    if not real.exists():
        return
    node = Path("/run/kvm-node")
    os.mknod(node, stat.S_IFCHR, real.stat().st_rdev)
    shutil.chown(node, "root", "kvm")
    node.chmod(0o660)
    subprocess.run(["mount", "--bind", str(node), str(real)], check=True)


def begin(program: str, is_ready: Callable[[], bool]) -> None:
    path = Path("/var/log/libvirt", f"{program}.log")
    with path.open("wb") as log:
        daemon = subprocess.Popen([program], stdin=subprocess.DEVNULL, stdout=log, stderr=log)
    deadline = time.monotonic() + DEADLINE_S
    while not is_ready():
        if daemon.poll() is not None or time.monotonic() > deadline:
            raise SystemExit(f"{program} does not serve: {path.read_text(errors='replace')}")
        time.sleep(0.1)


def domain(rom: Path, disk: Path) -> str:
    """The tiny guest, with nothing said about its confinement."""
    kind = "kvm" if Path("/dev/kvm").exists() else "qemu"
    return f"""
        <domain type='{kind}'>
          <name>{NAME}</name>
          <memory unit='MiB'>1</memory>
          <os>
            <type arch='x86_64' machine='pc'>hvm</type>
            <loader readonly='yes' type='rom'>{rom}</loader>
          </os>
          <devices>
            <controller type='usb' model='none'/>
            <memballoon model='none'/>
            <disk type='file' device='disk'>
              <driver name='qemu' type='raw'/>
              <source file='{disk}'/>
              <target dev='vda' bus='virtio'/>
            </disk>
          </devices>
        </domain>
        """


def virsh(verb: str) -> Callable[[], object]:
    argv = [*VIRSH, verb, NAME]
    return lambda: subprocess.run(argv, check=True, capture_output=True)


def timed(work: Callable[[], object]) -> float:
    begin = time.perf_counter()
    work()
    return time.perf_counter() - begin


if __name__ == "__main__":
    main()
