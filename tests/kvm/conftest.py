"""A kvmsec of the test's own: a root of files, a pool of real users, and guests that really run.

Whatever a test does, its host must look as before when its `lab` ends.
"""

import asyncio
import contextlib
import json
import os
import select
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from hypervisor import tiny
from hypervisor.cgroup_mounts import mounted
from kvmsec import InstanceDefinition, Node, definition_from
from kvmsec.cluster import operations
from kvmsec.linux import command, namespaces, processes
from kvmsec.node import sockets
from uidpool import provision
from uidpool.ranges import UidRanges
from uidpool.snapshot import Snapshot

POOL = UidRanges.parse("245000-245029")
DOMAIN = "guestkeeper"
DOMAIN_UID = 245900
DEADLINE_S = 30.0
KVM_BOOT_DEADLINE_S = 5.0
ENDING_S = 5.0

_ACCELERATOR = pytest.StashKey[str]()


# What the guest runs on ------------------------------------------------------------------------


@pytest.fixture(scope="session")
def accelerator_in_use(request: pytest.FixtureRequest) -> str:
    """`kvm` where the tiny guest boots under /dev/kvm, else `tcg`; the summary says which."""
    chosen = "kvm" if _kvm_runs_the_guest() else "tcg"
    request.config.stash[_ACCELERATOR] = chosen
    return chosen


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


def pytest_terminal_summary(
    terminalreporter: pytest.TerminalReporter, config: pytest.Config
) -> None:
    if config.stash.get(_ACCELERATOR, "kvm") == "tcg":
        terminalreporter.section("accelerator")
        terminalreporter.line(
            "The tiny guest did not boot under /dev/kvm: the tests of instances ran under TCG."
        )


# The serial line -------------------------------------------------------------------------------


class Line:
    """The serial line of a tiny guest, as `console` has it; see vm-images/tiny/README.md."""

    def __init__(self, path: Path) -> None:
        self._socket = sockets.connect(path)
        self._heard = b""
        self._agree()

    def _agree(self) -> None:
        """Have the guest's attention: what is said before its banner may be lost.

        Should only the end of the question arrive, `z` is no command and does nothing.
        """
        for length in range(1, 200):
            word = "z" * length
            self.say(f"e{word}\n".encode())
            with contextlib.suppress(TimeoutError):
                while self.hear_line(0.2) != f"ECHO {word}":
                    continue
                return
        raise AssertionError("the guest does not answer")

    def say(self, data: bytes) -> None:
        self._socket.settimeout(DEADLINE_S)
        self._socket.sendall(data)

    def hear_line(self, within_s: float = DEADLINE_S) -> str:
        """The next line, without its end. Raises TimeoutError."""
        end = time.monotonic() + within_s
        while b"\r\n" not in self._heard:
            self._socket.settimeout(max(end - time.monotonic(), 0.001))
            chunk = self._socket.recv(65536)
            assert chunk, f"the serial line was closed after {self._heard!r}"
            self._heard += chunk
        line, self._heard = self._heard.split(b"\r\n", 1)
        return line.decode("latin-1")

    def ask(self, command: bytes) -> str:
        self.say(command)
        return self.hear_line()

    def close(self) -> None:
        self._socket.close()

    def __enter__(self) -> "Line":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


# Other processes -------------------------------------------------------------------------------


class Rival:
    """A process that was forked off to act on a node, and may be killed at it."""

    def __init__(self, work: Callable[[], object]) -> None:
        reader, writer = os.pipe()
        self.pid = os.fork()
        if self.pid == 0:
            self._work(work, writer)
        os.close(writer)
        self._reader = reader
        self.pidfd = os.pidfd_open(self.pid)

    @staticmethod
    def _work(work: Callable[[], object], writer: int) -> None:
        try:
            try:
                answer: dict[str, object] = {"value": work()}
            except BaseException as error:
                answer = {"error": type(error).__name__, "message": str(error)}
            os.write(writer, json.dumps(answer, default=str).encode())
        finally:
            os._exit(0)

    def kill(self) -> None:
        os.kill(self.pid, signal.SIGKILL)

    def ends_within(self, seconds: float) -> bool:
        return bool(select.select([self.pidfd], [], [], seconds)[0])

    def outcome(self) -> dict[str, Any] | None:
        """What it returned or raised; None when it was killed."""
        with open(self._reader, "rb") as pipe:
            ready, _, _ = select.select([self.pidfd, pipe], [], [], 2 * DEADLINE_S)
            assert ready, "the other process does not end"
            if pipe not in ready and not select.select([pipe], [], [], 0)[0]:
                said = b""  # It was killed, and something that it started still holds the pipe.
            else:
                said = os.read(pipe.fileno(), 1 << 20)
        assert self.ends_within(DEADLINE_S)
        os.waitpid(self.pid, 0)
        os.close(self.pidfd)
        return json.loads(said) if said else None


# What must be as before ------------------------------------------------------------------------


def _tool(*argv: str) -> list[str]:
    return command.run(argv, timeout_s=30).stdout.decode().splitlines()


def packet_rules() -> list[str]:
    """Every packet rule and chain of anybody's here, without counters."""
    legacy = [*_tool("iptables-legacy-save"), *_tool("ip6tables-legacy-save")]
    return [
        *(line for line in legacy if line.startswith("-A") or " - [" in line),
        *_tool("nft", "-s", "-t", "list", "ruleset"),
    ]


def running() -> dict[int, str]:
    """Every process that has not ended, and the zombies that are ours to collect."""
    found = {}
    for pid in processes.pids():
        status = processes.read_status(pid)
        if status is None or (status.is_zombie and _parent(pid) != os.getpid()):
            continue
        found[pid] = f"{status.name} {status.state} {status.uids}"
    return found


def _parent(pid: int) -> int:
    with contextlib.suppress(OSError, IndexError):
        return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])
    return 0


def _ends_by(pid: int, end: float) -> bool:
    """Whether a process that is nobody's to collect here is gone by then (monotonic)."""
    if _parent(pid) == os.getpid():
        return False
    try:
        pidfd = os.pidfd_open(pid)
    except ProcessLookupError:
        return True
    with os.fdopen(pidfd):
        return bool(select.select([pidfd], [], [], max(0.0, end - time.monotonic()))[0])


def files_below(place: Path) -> list[str]:
    """Everything but directories that are kept."""
    return sorted(str(path) for path in place.rglob("*") if not path.is_dir())


def census() -> dict[str, Any]:
    """What of this host an instance could leave something in, users and resting uids aside."""
    return {
        "mounts": sorted(Path("/proc/self/mounts").read_text().splitlines()),
        "interfaces": sorted(name for _, name in socket.if_nameindex()),
        "packet rules": packet_rules(),
        "leases": files_below(Path("/run/kvmsec")),
        "quarantine": files_below(Path("/var/lib/kvmsec/uids/quarantine")),
        "shared memory": files_below(Path("/dev/shm")),
        "descriptors": _descriptors(),
    }


def _descriptors() -> list[str]:
    found = []
    for number in os.listdir("/proc/self/fd"):
        with contextlib.suppress(FileNotFoundError):
            target = os.readlink(f"/proc/self/fd/{number}")
            if not target.startswith("/proc/"):
                found.append(f"{number} {target}")
    return sorted(found)


class Lab:
    """A root of its own with a cluster in it, and what a test does to it and looks at it with."""

    pool = POOL
    domain = DOMAIN
    domain_uid = DOMAIN_UID

    def __init__(self, root: Path, accelerator: str) -> None:
        self.root = root
        self.accelerator = accelerator
        self.note_what_is_there()

    def note_what_is_there(self) -> None:
        """Take what is there now for nobody's leftovers."""
        self._before = running()
        self._interfaces = sorted(name for _, name in socket.if_nameindex())
        self._descriptors = _descriptors()

    @property
    def paths(self) -> Any:
        return Node(self.root).host.paths

    @property
    def claims(self) -> Any:
        return Node(self.root).host.claims

    def definition(self, name: str = "web", **keys: Any) -> InstanceDefinition:
        """A tiny guest of 1 MiB."""
        document = {
            "memory_mib": 1,
            "firmware": str(tiny.rom_path()),
            "accelerator": self.accelerator,
            **keys,
        }
        return definition_from(document, name, source="the test")

    def run(self, work: Callable[[Node], Awaitable[Any]], **options: Any) -> Any:
        """Run a coroutine on a node of its own."""

        async def whole() -> Any:
            node = Node(self.root, **options)
            try:
                async with asyncio.timeout(3 * DEADLINE_S):
                    return await work(node)
            finally:
                await node.close()

        return asyncio.run(whole())

    def start(self, name: str = "web", **keys: Any) -> Any:
        return self.run(lambda node: node.start(self.definition(name, **keys)))

    def stop(self, name: str = "web", *, force: bool = True, **options: Any) -> Any:
        return self.run(lambda node: node.stop(name, force=force, **options))

    def instances(self) -> dict[str, Any]:
        return {one.name: one for one in self.run(lambda node: node.list())}

    def reconcile(self) -> tuple[str, ...]:
        """Reconcile, as if a minute had passed since anything was written."""
        for path in self._half_written():
            os.utime(path, (0, 0))
        done = self.run(lambda node: node.reconcile())
        return tuple(line for line in done if "half written" not in line)

    def _half_written(self) -> list[str]:
        return [str(path) for path in self.root.rglob(".*.*")]

    def rival(self, work: Callable[[Node], Awaitable[Any]], **options: Any) -> Rival:
        """Run a coroutine on a node in another process."""
        return Rival(lambda: self.run(work, **options))

    def line(self, name: str = "web") -> Line:
        return Line(self.paths.instance(name).serial_socket)

    def disk(self, name: str = "disk.raw") -> Path:
        """A raw image that only root may open."""
        path = self.root / name
        path.touch(mode=0o600)
        os.truncate(path, 1 << 20)
        return path

    def configure(self, text: str) -> None:
        """Write kvmsec.toml."""
        self.paths.config.write_text(text)

    def init(self, **options: Any) -> None:
        pool = options.pop("uid_pool", self.pool)
        self.run(lambda node: operations.init(node.host.store, node, "lab", uid_pool=pool))

    def modify(self, **change: Any) -> Any:
        from kvmsec.cluster.changes import Change

        return self.run(lambda node: operations.modify(node.host.store, [node], Change(**change)))

    def destroy(self) -> None:
        self.run(lambda node: operations.destroy(node.host.store, [node]))

    def leases(self) -> list[Any]:
        """The uids that this root's instances hold."""
        return [one for one in self.claims.leases() if one.root == str(self.root)]

    def groups(self) -> list[str]:
        """The control groups of this root, in every hierarchy."""
        ours = (f"{mount.path}/kvmsec/{self.paths.tag}" for mount in mounted())
        return [directory for top in ours for directory, _, _ in os.walk(top)]

    def leftovers(self) -> dict[str, object]:
        """What is still there of this root's instances: nothing, once they have all ended.

        Processes that are ending get ENDING_S for it, all together.
        """
        paths = self.paths
        found = {
            "files": [*map(str, paths.instances.rglob("*")), *map(str, paths.locks.iterdir())],
            "half-written files": self._half_written(),
            "mounts": self._mounts(),
            "leases": self.leases(),
            "quarantine": self.claims.quarantined(),
            "interfaces": [
                name for _, name in socket.if_nameindex() if name not in self._interfaces
            ],
            "control groups": self.groups(),
            "descriptors": [one for one in _descriptors() if one not in self._descriptors],
            "processes": self._processes_left(),
        }  # fmt: skip
        return {what: left for what, left in found.items() if left}

    def _mounts(self) -> list[str]:
        lines = Path("/proc/self/mounts").read_text().splitlines()
        return [line for line in lines if line.split()[1].startswith(f"{self.root}/")]

    def _processes_left(self) -> list[str]:
        with contextlib.suppress(ChildProcessError):
            # A node that is closed collects nobody whose end it did not see to.
            while os.waitpid(-1, os.WNOHANG)[0]:
                continue
        end = time.monotonic() + ENDING_S
        new = [(pid, what) for pid, what in running().items() if pid not in self._before]
        return [f"{pid} {what}" for pid, what in new if not _ends_by(pid, end)]

    def rules(self) -> str:
        """The uids that this root's packet rules hold now."""
        return str(self.run(lambda node: node.show_rules())["uids"])

    def close(self) -> None:
        """End what a failed test has left, so that it is no other test's."""
        trying = contextlib.suppress(Exception)
        with trying:
            for one in self.instances():
                with trying:
                    self.stop(one)
        for pid in running().keys() - self._before.keys():
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        with trying:
            for lease in self.leases():
                self.claims.release(lease.key)
            for quarantine in self.claims.quarantined():
                self.claims.retry(quarantine.uid)
        for line in self._mounts():
            with trying:
                namespaces.umount(line.split()[1], namespaces.MNT_DETACH)
        # Control groups are the host's: they do not end with the sandbox.
        for group in reversed(self.groups()):
            with contextlib.suppress(OSError):
                os.rmdir(group)

    def remove(self) -> None:
        """Have the cluster no more, and then the root."""
        with contextlib.ExitStack() as afterwards:
            afterwards.callback(shutil.rmtree, self.root)
            if self.paths.cluster.exists():
                self.destroy()


@pytest.fixture(scope="module")
def pool_users() -> Iterator[None]:
    """The users of every test's pool, and the one that owns instances under `user`."""
    accounts = [Path("/etc", name) for name in ("passwd", "group", "shadow", "gshadow")]
    before = {path: path.read_bytes() for path in accounts}
    provision.apply(provision.plan(POOL, Snapshot.read()))
    line = f'u {DOMAIN} {DOMAIN_UID} "keeps guests" / /usr/sbin/nologin\n'
    command.run(["systemd-sysusers", "-"], input=line.encode(), timeout_s=30)
    yield
    for path, content in before.items():
        path.write_bytes(content)


@pytest.fixture(scope="session")
def features(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What was found out about QEMU: asked once for all roots."""
    return tmp_path_factory.mktemp("features")


@pytest.fixture
def make_lab(pool_users: None, accelerator_in_use: str, features: Path) -> Iterator[Any]:
    """Makes roots, each with a cluster that has the pool; the host is as before afterwards."""
    # Imported here, it is not by each of the processes that are forked off.
    import pyroute2  # noqa: F401

    before, labs = census(), []

    def make(config: str = "", **options: Any) -> Lab:
        # Its name is this run's alone: control groups are shared with other sandboxes.
        lab = Lab(Path(tempfile.mkdtemp(prefix="kvmsec-", dir="/run")), accelerator_in_use)
        labs.append(lab)
        lab.paths.make_directories()
        if config:
            lab.configure(config)
        shutil.copytree(features, lab.paths.features, dirs_exist_ok=True)
        lab.init(**options)
        return lab

    yield make
    left = {str(lab.root): found for lab in labs if (found := lab.leftovers())}
    with contextlib.ExitStack() as ends:  # Each is called, whatever another raises.
        for lab in labs:
            ends.callback(lab.remove)
            shutil.copytree(lab.paths.features, features, dirs_exist_ok=True)
        for lab in labs:
            ends.callback(lab.close)
    assert not left
    assert census() == before


@pytest.fixture
def lab(make_lab: Callable[..., Lab]) -> Lab:
    return make_lab()
