"""The audit of a domain that libvirt itself has started.

Collected only where libvirt's packages are installed (see conftest.py): what its domains lack is a
fact about them and no behaviour of kvmsec's, and test_audit.py has a QEMU set up as theirs, so that
nothing goes unproved without them.
"""

import contextlib
import os
import shutil
import signal
import stat
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from hypervisor import tiny
from hypervisor.cgroup_mounts import mounted
from kvmsec.linux import command, namespaces
from tests.kvm.libvirt_programs import DAEMON, IS_INSTALLED, LOG_DAEMON
from tests.kvm.test_audit import LIBVIRT_UID, start
from tests.kvm.test_cli import Shell

pytestmark = pytest.mark.kvm

__all__ = ["start"]  # A fixture.

DEADLINE_S = 30.0
NAMES = ("shop", "bank")
# What docs/audit.md says of a domain that nobody has configured further.
EXPOSED = {
    *("uid-shared", "bounding-set", "namespace-net", "namespace-pid", "namespace-ipc"),
    *("root-tree", "writable-paths", "packet-rules", "cgroup-memory", "dumpable"),
}
SEALED = {
    *("uid", "capabilities", "no-new-privs", "sandbox", "namespace-mnt", "devices"),
    *("inet-sockets", "tcp-listeners", "unix-listeners", "disk-paths", "secrets"),
}


class Libvirt:
    """libvirt's daemons for QEMU, in this sandbox, where their directories are private."""

    def __init__(self, running: contextlib.ExitStack) -> None:
        assert DAEMON is not None and LOG_DAEMON is not None
        # They look for these; packages and systemd make them elsewhere.
        for place in ("/run/libvirt", "/var/lib/libvirt/qemu", "/var/log/libvirt/qemu"):
            Path(place).mkdir(parents=True, exist_ok=True)
        self._begin(running, LOG_DAEMON, Path("/run/libvirt/virtlogd-sock").exists)
        self._begin(running, DAEMON, self._answers)

    @staticmethod
    def _begin(running: contextlib.ExitStack, program: str, is_ready: Callable[[], bool]) -> None:
        path = Path("/var/log/libvirt", f"{Path(program).name}.log")
        with path.open("wb") as log:
            daemon = subprocess.Popen([program], stdin=subprocess.DEVNULL, stdout=log, stderr=log)
        running.callback(end, daemon)
        deadline = time.monotonic() + DEADLINE_S
        while not is_ready():
            said = path.read_text(errors="replace")
            assert daemon.poll() is None and time.monotonic() < deadline, said
            time.sleep(0.1)

    def _answers(self) -> bool:
        asked = subprocess.run(
            self._virsh("uri"), capture_output=True, timeout=DEADLINE_S, check=False
        )
        return asked.returncode == 0

    def run(self, *words: str) -> str:
        return command.run(self._virsh(*words), timeout_s=DEADLINE_S).stdout.decode()

    @staticmethod
    def _virsh(*words: str) -> list[str]:
        return ["virsh", "--quiet", "--connect", "qemu:///system", *words]


def end(daemon: subprocess.Popen[bytes]) -> None:
    daemon.terminate()
    try:
        daemon.wait(DEADLINE_S)
    except subprocess.TimeoutExpired:
        daemon.kill()
        daemon.wait()


def domain(name: str, accelerator: str, rom: Path) -> str:
    """The definition of a tiny guest, with nothing said about its confinement."""
    kind = "kvm" if accelerator == "kvm" else "qemu"
    return f"""
        <domain type='{kind}'>
          <name>{name}</name>
          <memory unit='MiB'>1</memory>
          <os>
            <type arch='x86_64' machine='pc'>hvm</type>
            <loader readonly='yes' type='rom'>{rom}</loader>
          </os>
          <devices>
            <controller type='usb' model='none'/>
            <memballoon model='none'/>
          </devices>
        </domain>
        """


@pytest.fixture
def libvirt() -> Iterator[Libvirt]:
    assert IS_INSTALLED, "asked for by its path: it needs libvirtd or virtqemud, virtlogd and virsh"
    with contextlib.ExitStack() as running:
        running.enter_context(groups_as_before())
        running.enter_context(kvm_of_its_group())
        yield Libvirt(running)


@contextlib.contextmanager
def kvm_of_its_group() -> Iterator[None]:
    """Have /dev/kvm as udev sets it up, root's and the group kvm's, on a host without udev too."""
    real = Path("/dev/kvm")
    if not real.exists():
        yield
        return
    node = Path("/run/kvm-node")
    os.mknod(node, stat.S_IFCHR, real.stat().st_rdev)
    shutil.chown(node, "root", "kvm")
    node.chmod(0o660)
    namespaces.mount(str(node), str(real), None, namespaces.MS_BIND)
    try:
        yield
    finally:
        namespaces.umount(str(real))
        node.unlink()


@contextlib.contextmanager
def groups_as_before() -> Iterator[None]:
    """Control groups are the host's: remove the empty parents that libvirt leaves of its own."""
    before = machine_groups()
    yield
    for group in sorted(machine_groups() - before, reverse=True):
        os.rmdir(group)


def machine_groups() -> set[str]:
    tops = (top for mount in mounted() for top in Path(mount.path).glob("machine*"))
    return {directory for top in tops for directory, _, _ in os.walk(top)}


@pytest.fixture
def pids(libvirt: Libvirt, accelerator_in_use: str) -> Iterator[dict[str, int]]:
    """The QEMUs of two running domains."""
    # Where its uid may read it, whatever is above the checkout.
    rom = Path(shutil.copy(tiny.rom_path(), "/var/lib/libvirt/tiny.rom"))
    rom.chmod(0o644)
    definition = Path("/run/libvirt/domain.xml")
    found = {}
    with contextlib.ExitStack() as ends:
        for name in NAMES:
            definition.write_text(domain(name, accelerator_in_use, rom))
            libvirt.run("define", str(definition))
            libvirt.run("start", name)
            found[name] = int(Path(f"/run/libvirt/qemu/{name}.pid").read_text())
            ends.callback(kill, os.pidfd_open(found[name]))
        yield found
        for name in NAMES:
            libvirt.run("destroy", name)


def kill(pidfd: int) -> None:
    with contextlib.suppress(ProcessLookupError):
        signal.pidfd_send_signal(pidfd, signal.SIGKILL)
    os.close(pidfd)


def test_a_domain_of_libvirt_stands_between_an_instance_and_a_bare_qemu(
    pids: dict[str, int], lab: Any, start: Callable[..., int]
) -> None:
    shell = Shell(lab.root, lab.accelerator)
    ours, bare = lab.start().pid, start("-display", "none")

    theirs, instance, by_hand = (
        shell.json("audit", "--pid", str(pid))[0] for pid in (pids["shop"], ours, bare)
    )
    lab.stop()

    found = {one["code"]: one for one in theirs["findings"]}
    exposed = {code for code, one in found.items() if one["exposure"]}
    assert theirs["unread"] == {}
    assert theirs["instance"] is None
    assert (theirs["uid"], theirs["name"]) == (LIBVIRT_UID, "shop")
    assert instance["score"] < theirs["score"] < by_hand["score"]
    assert exposed >= EXPOSED
    assert exposed.isdisjoint(SEALED)
    assert "1 other QEMU" in found["uid-shared"]["message"]
