"""Real QEMU as its final uid in the real jail: what the kernel says of it, point by point."""

import json
import os
import select
import socket
import stat
import subprocess
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
from attrs import define

from hypervisor import process, tiny, tree
from hypervisor.closure import Closure
from hypervisor.jail import BootFile, Cell, Jail
from hypervisor.newborn import Newborn, spawn
from hypervisor.seccomp import find_filter
from kvmsec.linux import namespaces, processes, syscalls, unix_sockets
from kvmsec.linux.credentials import Credentials

pytestmark = pytest.mark.kvm

QEMU = os.path.realpath("/usr/bin/qemu-system-x86_64")
MODULES = Path("/usr/lib/x86_64-linux-gnu/qemu")
DATA = ("/usr/share/qemu", "/usr/share/seabios")
SOMEBODY = Credentials(240001, 240002)
ROOT = Credentials(0, 0)
DEADLINE_S = 30.0
SANDBOX = "on,obsolete=deny,elevateprivileges=deny,spawn=deny,resourcecontrol=deny"
QMP, SERIAL, DISK = 3, 4, 5


@define
class Running:
    """A QEMU in its jail, stopped before the guest's first instruction, its monitor connected."""

    child: Newborn
    jail: Jail
    monitor: socket.socket
    line: socket.socket

    @property
    def pid(self) -> int:
        return self.child.process.pid

    def order(self, command: str) -> Any:
        self.monitor.sendall(json.dumps({"execute": command}).encode() + b"\n")
        stream = self.monitor.makefile("rb")
        while "return" not in (answer := json.loads(stream.readline())):
            assert "error" not in answer, answer
        return answer["return"]

    def read(self, name: str) -> str:
        return Path(f"/proc/{self.pid}/{name}").read_text()


def binds(accelerator: str) -> tuple[tuple[str, str], ...]:
    programs = [QEMU]
    if accelerator == "tcg":
        programs += [str(MODULES / f"accel-tcg-{kind}.so") for kind in ("x86_64", "i386")]
    wanted = dict.fromkeys([*(path for path in programs if os.path.exists(path)), *DATA])
    for program in programs:
        told = subprocess.run(["ldd", program], capture_output=True, text=True, check=False)
        wanted |= dict.fromkeys(word for word in told.stdout.split() if word.startswith("/"))
    return tuple((os.path.realpath(path), path) for path in wanted if os.path.exists(path))


def argv(accelerator: str) -> list[str]:
    return [
        *(QEMU, "-S", "-M", "pc", "-accel", accelerator, "-m", "4"),
        *("-nodefaults", "-no-user-config", "-display", "none", "-sandbox", SANDBOX),
        *("-bios", "/boot/firmware"),
        *("-chardev", f"socket,id=m,fd={QMP},server=on,wait=off", "-mon", "m,mode=control"),
        *("-chardev", f"socket,id=s,fd={SERIAL},server=on,wait=off,logfile=/output/serial.log"),
        *("-serial", "chardev:s", "-add-fd", f"fd={DISK},set=1"),
        *("-blockdev", "driver=file,filename=/dev/fdset/1,node-name=f,read-only=off,locking=off"),
        *("-blockdev", "driver=raw,file=f,node-name=d", "-device", "ide-hd,drive=d"),
    ]


@pytest.fixture(params=["kvm", "tcg"])
def accelerator(request: pytest.FixtureRequest) -> str:
    if request.param == "kvm" and not os.path.exists("/dev/kvm"):
        pytest.skip("this machine's /dev/kvm is missing")
    return str(request.param)


@pytest.fixture(params=[SOMEBODY, ROOT], ids=["somebody", "root"])
def who(request: pytest.FixtureRequest) -> Credentials:
    found: Credentials = request.param
    return found


@pytest.fixture
def qemu(accelerator: str, who: Credentials, tmp_path: Path) -> Iterator[Running]:
    with ExitStack() as stack:
        for name in ("place", "output"):
            (tmp_path / name).mkdir()
        owned = f"size=256k,mode=0700,uid={who.uid},gid={who.gid}"
        flags = namespaces.MS_NOSUID | namespaces.MS_NODEV | namespaces.MS_NOEXEC
        namespaces.mount("output", str(tmp_path / "output"), "tmpfs", flags, owned)
        stack.callback(namespaces.umount, str(tmp_path / "output"), namespaces.MNT_DETACH)
        room = syscalls.detached_copy(str(tmp_path / "output"))
        stack.callback(os.close, room)
        built = tree.build_tree(Closure(QEMU, binds(accelerator)), str(tmp_path / "place"))
        stack.callback(os.close, built)
        disk = tmp_path / "disk"
        disk.write_bytes(b"D" * 65536)
        disk.chmod(0o600)

        def opened(path: Path, access: int) -> int:
            descriptor = os.open(path, access | os.O_CLOEXEC, 0o600)
            stack.callback(os.close, descriptor)
            return descriptor

        listeners = [
            stack.enter_context(unix_sockets.listen(tmp_path / name)) for name in ("qmp", "line")
        ]
        firmware = opened(Path(tiny.rom_path()), os.O_RDONLY)
        # What must not arrive: inheritable on purpose, as a careless library's would be.
        left, right = socket.socketpair()
        stack.enter_context(left)
        stack.enter_context(right)
        leaked = opened(Path("/etc/shadow"), os.O_RDONLY)
        for number in (left.fileno(), leaked):
            os.set_inheritable(number, True)
        jail = Jail(
            Cell(built),
            name="guest",
            credentials=who,
            output=room,
            log=opened(tmp_path / "output" / "log", os.O_RDWR | os.O_CREAT | os.O_APPEND),
            system_calls=find_filter(),
            boot_files=(BootFile(firmware, os.fstat(firmware).st_size, "firmware"),),
            has_kvm=accelerator == "kvm",
            descriptors={
                QMP: listeners[0].fileno(),
                SERIAL: listeners[1].fileno(),
                DISK: opened(disk, os.O_RDWR),
            },
        )
        child = spawn(jail, QEMU, argv(accelerator))
        stack.callback(os.close, child.pidfd)
        stack.callback(process.reap, child.pidfd)
        stack.callback(process.kill_and_wait, child.pidfd, DEADLINE_S)
        stack.callback(child.close)
        child.release()
        child.executed()
        for listener in listeners:
            listener.close()
        clients = [stack.enter_context(unix_sockets.connect(tmp_path / n)) for n in ("qmp", "line")]
        for client in clients:
            client.settimeout(DEADLINE_S)
        running = Running(child, jail, *clients)
        try:
            running.order("qmp_capabilities")
        except (OSError, ValueError) as error:
            raise AssertionError(os.pread(jail.log, 4096, 0).decode()) from error
        yield running


def test_it_is_confined_point_by_point(qemu: Running, who: Credentials, accelerator: str) -> None:
    assert process.confinement_problems(qemu.child) == []
    _is_who_it_should_be(qemu, who)
    _leads_a_life_of_its_own(qemu)
    _sees_a_tree_of_its_own(qemu, who, accelerator)
    _holds_what_was_granted(qemu)
    _has_an_empty_network(qemu)


def _is_who_it_should_be(qemu: Running, who: Credentials) -> None:
    status = processes.read_status(qemu.pid)
    assert status is not None
    assert (status.uids, status.gids) == ((who.uid,) * 4, (who.gid,) * 4)
    assert (status.groups, status.capabilities) == ((), (0,) * 5)
    assert (status.no_new_privs, status.seccomp) == (True, 2)
    # Every thread, for each has credentials and a filter of its own.
    for task in os.listdir(f"/proc/{qemu.pid}/task"):
        fields = dict(
            line.split(":", 1) for line in qemu.read(f"task/{task}/status").split("\n") if line
        )
        assert set(fields["Uid"].split()) == {str(who.uid)}
        assert set(fields["Gid"].split()) == {str(who.gid)}
        assert int(fields["CapEff"], 16) == int(fields["CapBnd"], 16) == 0
        assert (fields["NoNewPrivs"].strip(), fields["Seccomp"].strip()) == ("1", "2")
        assert fields.get("Seccomp_filters", "2").strip() == "2", "QEMU's and ours"


def _leads_a_life_of_its_own(qemu: Running) -> None:
    for kind in ("mnt", "net", "ipc", "uts", "pid", "cgroup"):
        theirs, ours = (os.readlink(f"/proc/{one}/ns/{kind}") for one in (qemu.pid, "self"))
        assert theirs != ours, kind
    status = qemu.read("status")
    assert "\nUmask:\t0077\n" in status
    assert "\nNSpid:\t" in status and status.partition("NSpid:")[2].split("\n")[0].endswith("\t1")
    core = next(line for line in qemu.read("limits").split("\n") if line.startswith("Max core"))
    assert core.split()[4:6] == ["1", "1"]
    assert qemu.read("environ") == "PATH=/usr/bin\0LC_ALL=C\0"
    assert qemu.read("stat").rpartition(")")[2].split()[4] == "0", "it has a terminal"
    assert os.getsid(qemu.pid) == qemu.pid
    assert os.readlink(f"/proc/{qemu.pid}/cwd") == "/"


def _sees_a_tree_of_its_own(qemu: Running, who: Credentials, accelerator: str) -> None:
    for line in qemu.read("mountinfo").splitlines():
        words = line.split()
        flags = set(words[5].split(","))
        if words[4] == "/output":
            assert {"rw", "nosuid", "nodev", "noexec"} <= flags
        elif words[4] == "/dev":
            assert {"ro", "nosuid", "noexec"} <= flags
        else:
            assert {"ro", "nosuid", "nodev"} <= flags, line
        assert "shared:" not in line and "master:" not in line
    root = Path(f"/proc/{qemu.pid}/root")
    assert {"boot", "dev", "output", "usr"} <= set(os.listdir(root))
    assert set(os.listdir(root)) <= {"boot", "dev", "output", "usr", "lib", "lib64"}
    nodes = {"null", "zero", "full", "random", "urandom"}
    assert set(os.listdir(root / "dev")) == nodes | ({"kvm"} if accelerator == "kvm" else set())
    if accelerator == "kvm":
        node = (root / "dev" / "kvm").stat()
        assert (node.st_uid, node.st_gid) == (who.uid, who.gid)
        assert stat.S_IMODE(node.st_mode) == 0o600
    assert os.listdir(root / "boot") == ["firmware"]
    assert (root / "boot" / "firmware").read_bytes() == Path(tiny.rom_path()).read_bytes()
    made = (root / "output" / "serial.log").stat()
    assert (made.st_uid, stat.S_IMODE(made.st_mode)) == (who.uid, 0o600)


def _holds_what_was_granted(qemu: Running) -> None:
    held = {int(name): "" for name in os.listdir(f"/proc/{qemu.pid}/fd")}
    for number in held:
        held[number] = os.readlink(f"/proc/{qemu.pid}/fd/{number}")
    paths = {target for target in held.values() if target.startswith("/")}
    mine = {"/dev/null", "/dev/kvm", "/output/serial.log"}
    ours = {os.readlink(f"/proc/self/fd/{qemu.jail.log}")}
    ours.add(os.readlink(f"/proc/self/fd/{qemu.jail.descriptors[DISK]}"))
    assert ours <= paths <= mine | ours
    assert held[0] == "/dev/null"
    listening = [target for number, target in held.items() if number in (QMP, SERIAL)]
    sockets_held = [target for target in held.values() if target.startswith("socket:")]
    # The two listeners, and the two connections that came by them.
    assert set(listening) < set(sockets_held)
    assert len(set(sockets_held)) == 4


def _has_an_empty_network(qemu: Running) -> None:
    for table in ("tcp", "tcp6", "udp", "udp6", "raw", "raw6", "packet", "netlink"):
        path = Path(f"/proc/{qemu.pid}/net/{table}")
        rows = path.read_text().splitlines()[1:] if path.exists() else []
        # The kernel's own netlink sockets belong to port 0.
        assert [row for row in rows if table != "netlink" or row.split()[2] != "0"] == [], table
    interfaces = [line.split(":")[0].strip() for line in qemu.read("net/dev").splitlines()[2:]]
    assert "lo" in interfaces
    assert not any(name.startswith(("eth", "en", "veth", "tap", "br")) for name in interfaces)
    assert qemu.read("net/route").splitlines()[1:] == []


@pytest.mark.parametrize("who", [SOMEBODY], indirect=True)
def test_the_guest_runs_and_its_end_leaves_nothing(
    qemu: Running, accelerator: str, request: pytest.FixtureRequest
) -> None:
    if accelerator == "kvm" and request.getfixturevalue("accelerator_in_use") != "kvm":
        pytest.skip("this machine's /dev/kvm does not run the tiny guest")
    qemu.order("cont")
    heard = b""
    while b"\r\n" not in heard:
        heard += qemu.line.recv(4096)
    assert heard.startswith(tiny.BANNER.encode() if isinstance(tiny.BANNER, str) else tiny.BANNER)
    assert process.confinement_problems(qemu.child) == []
    inside = os.readlink(f"/proc/{qemu.pid}/ns/pid")
    assert process.kill_and_wait(qemu.child.pidfd, DEADLINE_S)
    ended = process.reap(qemu.child.pidfd)
    assert ended is not None and ended.signal is not None
    assert ended.signal.name == "SIGKILL"
    assert not processes.is_alive(qemu.child.process)
    left = []
    for pid in processes.pids():
        try:
            left += [pid] if os.readlink(f"/proc/{pid}/ns/pid") == inside else []
        except (FileNotFoundError, ProcessLookupError):
            continue
    assert left == []


@pytest.mark.parametrize("who", [SOMEBODY], indirect=True)
@pytest.mark.parametrize("accelerator", ["tcg"], indirect=True)
def test_a_quit_is_told_with_its_status(qemu: Running) -> None:
    qemu.order("quit")
    assert select.select([qemu.child.pidfd], [], [], DEADLINE_S)[0]
    assert process.reap(qemu.child.pidfd) == process.Ended(0, None)
