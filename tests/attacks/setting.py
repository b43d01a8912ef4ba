"""What is attacked: a victim (a real guest), a peer on the wire, the node and its launcher."""

import ctypes
import errno
import fcntl
import os
import re
import resource
import shutil
import signal
import socket
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, Final

from attrs import frozen

from firewall.policy import FAMILIES, Family
from kvmsec.linux import namespaces
from kvmsec.linux.children import run_in_child, start_child
from kvmsec.linux.credentials import Credentials
from tests.cable import KIND, PEER, Net

SOMEBODY: Final = 245950
"""A uid that nobody has."""
LOG_GROUP: Final = 7
"""Where the rules send their lines: the kernel's log has none of another network namespace."""
BRIDGE: Final = "brattacks"
_ABSTRACT: Final = "hostile-attacks"
_SEGMENT: Final = 0x1EF5
_USUAL_PIPE_BYTES: Final = 1 << 16  # pipe(7)
_QUEUE: Final = "/victims-queue"
_DEVICES: Final = ("null", "zero", "full", "random", "urandom", "kvm")
_libc: Final = ctypes.CDLL(None, use_errno=True)


@frozen
class Setting:
    """One node with a victim that runs, and what orders to an attacker are filled with."""

    lab: Any
    net: Net
    victim: Any
    scratch: Path
    program: Path
    listeners: dict[Family, socket.socket]

    def facts(self, attacker: Any, place: str) -> dict[str, object]:
        """What an order may name in braces; `attacker` is the attacking instance, if it is one."""
        paths, name = self.lab.paths, self.victim.name
        files = paths.instance(name)
        pid = self.victim.pid
        return {
            "pid": pid,
            "address": Path(f"/proc/{pid}/maps").read_text().split("-", 1)[0],
            "other_uid": self._another_uid(attacker),
            "disk": self.lab.root / "victim.raw",
            "qmp": files.qmp_socket,
            "serial": files.serial_socket,
            "log": paths.instance_log(name),
            "output": files.output,
            "abstract": _ABSTRACT,
            "host_abstract": f"{_ABSTRACT}-of-host",
            "segment": hex(_SEGMENT),
            "queue": _QUEUE,
            "key": _key(self.lab),
            "cgroup": f"{self.lab.groups()[-1]}/cgroup.procs",
            "place": place,
            "devices": " ".join(f"/dev/{one}" for one in _DEVICES),
            "program": self.program,
            "set_uid": self.scratch / "set-uid",
            "scratch": self.scratch / "planted",
            "wire": "wire0",
            "bridge_number": socket.if_nametoindex(BRIDGE),
            "ipv4": PEER["ipv4"],
            "ipv6": PEER["ipv6"],
            "mapped": f"::ffff:{PEER['ipv4']}",
            "loopback4": "127.0.0.1",
            "loopback6": "::1",
            "many": 15000,
            **self._facts_of_launcher(attacker or self.victim),
        }

    def _another_uid(self, attacker: Any) -> int:
        is_shared = attacker is not None and attacker.uid == self.victim.uid
        return SOMEBODY if is_shared or not self.victim.uid else int(self.victim.uid)

    def _facts_of_launcher(self, instance: Any) -> dict[str, object]:
        """Every path that whoever starts, lists or stops that instance will use."""
        paths, name = self.lab.paths, instance.name
        files = paths.instance(name)
        lease = paths.uid_leases / str(instance.uid)
        return {
            "paths_of_record": f"{files.record} {files.directory}",
            "paths_of_sockets": f"{files.qmp_socket} {files.serial_socket}",
            "paths_of_logs": f"{paths.instance_log(name)} {paths.instance_output(name)}",
            "paths_of_jail": str(files.output),
            "paths_of_locks": f"{paths.instance_lock(name)} {paths.images_lock} {paths.run}/rules",
            "paths_of_leases": f"{lease} {lease.parent}/.locks/{lease.name} {paths.uid_state}",
            "paths_of_state": f"{paths.cluster} {paths.features} {paths.last_state(name)}",
            "lease": lease,
            "instance_lock": paths.instance_lock(name),
        }


@contextmanager
def furnished(lab: Any, net: Net, program: Path, **security: str) -> Iterator[Setting]:
    """A victim with something in each of its namespaces and keyrings, and a peer that listens."""
    with ExitStack() as ends:
        scratch = Path(tempfile.mkdtemp(prefix="attacks-", dir="/var/tmp"))
        ends.callback(shutil.rmtree, scratch)
        scratch.chmod(0o755)
        for mode, name in ((0o6755, "set-uid"), (0o755, "qemu")):
            shutil.copy(program, scratch / name)
            (scratch / name).chmod(mode)
        lab.disk("victim.raw")
        victim = lab.start("victim", disks=[{"path": str(lab.root / "victim.raw")}], **security)
        ends.callback(lab.stop, "victim")
        ends.enter_context(_belongings(lab, victim))
        ends.enter_context(_abstract_socket(f"{_ABSTRACT}-of-host"))
        listeners = _prepare_network(net, ends)
        yield Setting(lab, net, victim, scratch, scratch / "qemu", listeners)


def _key(lab: Any) -> str:
    """Of this run alone: no namespace keeps root's keyring from another that runs at once."""
    return f"victims-key-{lab.root.name}"


@contextmanager
def _belongings(lab: Any, victim: Any) -> Iterator[None]:
    """A process of the victim's uid in its namespaces, with all that a process may share."""
    reader, writer = os.pipe()
    uid, key = victim.uid or 0, _key(lab)

    def have() -> None:
        for kind in ("net", "ipc"):
            with open(f"/proc/{victim.pid}/ns/{kind}") as entered:
                namespaces.setns(entered.fileno(), 0)
        os.setresgid(uid, uid, uid)
        os.setresuid(uid, uid, uid)
        with _abstract_socket(_ABSTRACT):
            made = (
                _libc.shmget(_SEGMENT, 4096, 0o1666),
                _libc.semget(_SEGMENT, 1, 0o1666),
                _libc.mq_open(_QUEUE.encode(), os.O_RDWR | os.O_CREAT, 0o666, None),
                # add_key, to the user's keyring (x86_64)
                _libc.syscall(248, b"user", key.encode(), b"secret", 6, -4),
            )
            os.write(writer, b"+" if min(made) >= 0 else b"-")
            os.close(writer)
            signal.pause()

    with start_child(have, what="the victim's belongings", keep=[writer]):
        os.close(writer)
        said = os.read(reader, 1)
        os.close(reader)
        assert said == b"+", "the victim could not be furnished"
        yield
    if uid in (0, lab.domain_uid):
        who = Credentials(uid, uid)
        assert run_in_child(
            lambda: _forget_key(key), what="the victim's key", timeout_s=20, credentials=who
        )


def _forget_key(description: str) -> bool:
    """In its user's keyring, which nobody empties but under `pool` (keyctl(2))."""
    key = int(_libc.syscall(250, 10, -4, b"user", description.encode(), 0))  # KEYCTL_SEARCH
    return key >= 0 and int(_libc.syscall(250, 9, key, -4)) == 0  # KEYCTL_UNLINK


@contextmanager
def _abstract_socket(name: str) -> Iterator[None]:
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(f"\0{name}")
        listener.listen(64)
        yield


def _prepare_network(net: Net, ends: ExitStack) -> dict[Family, socket.socket]:
    """Nothing but kvmsec may be what refuses: pings are anybody's, and multicast has a route.

    Returns the peer's listening sockets; the node itself listens on its loopback addresses.
    """
    Path("/proc/sys/net/ipv4/ping_group_range").write_text("0 2147483647")
    net.sh("ip", "route", "add", "224.0.0.0/4", "dev", "wire0")
    listeners = {}
    for family, loopback in zip(FAMILIES, ("127.0.0.1", "::1"), strict=True):
        listeners[family] = ends.enter_context(net.listen(family, socket.SOCK_STREAM))
        listeners[family].listen(64)
        listeners[family].setblocking(False)
        ends.enter_context(net.listen(family, socket.SOCK_DGRAM))
        here = ends.enter_context(socket.socket(KIND[family], socket.SOCK_STREAM))
        here.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        here.bind((loopback, 5000))
        here.listen(64)
    return listeners


@contextmanager
def logged_without_limit(net: Net, uid: int) -> Iterator[None]:
    """A rule that drops what a uid sends as kvmsec's do, and logs each packet of it."""
    table = "inet unlimited"
    net.sh("nft", f"add table {table}")
    try:
        net.sh("nft", f"add chain {table} output {{ type filter hook output priority 0; }}")
        logged = f'log prefix "unlimited: " group {LOG_GROUP}'
        net.sh("nft", f"add rule {table} output meta skuid {uid} {logged} drop")
        yield
    finally:
        net.sh("nft", f"delete table {table}")


@contextmanager
def given_to_a_control(setting: Setting) -> Iterator[list[int]]:
    """What a careless launcher would leave open for its child."""
    with ExitStack() as ends:
        sender = ends.enter_context(socket.socket(socket.AF_INET, socket.SOCK_DGRAM))
        sender.connect((PEER["ipv4"], 5000))
        unix = ends.enter_context(socket.socket(socket.AF_UNIX))
        outside = os.open("/var", os.O_RDONLY | os.O_DIRECTORY)
        ends.callback(os.close, outside)
        locked = os.open(setting.scratch / "locked", os.O_RDWR | os.O_CREAT, 0o666)
        ends.callback(os.close, locked)
        fcntl.flock(locked, fcntl.LOCK_EX)
        yield [sender.fileno(), unix.fileno(), outside, locked]


# What only somebody beside the attacker can see -------------------------------------------------


def is_hurt(setting: Setting, what: str) -> bool:
    """Whether the victim's uid can't get one more of what the kernel counts by uid.

    Memory it doesn't: the node is hurt by whoever was ended, and not by its own control group.
    """
    if what == "hog-memory":
        return _ended_for_memory(setting) != {"vm-attacker"}
    uid = setting.victim.uid or 0

    def ask() -> bool:
        if what == "inotify":
            return int(_libc.inotify_init()) < 0
        if what == "keys":
            return int(_libc.syscall(248, b"user", b"another", b"x", 1, -2)) < 0
        if what == "message-queues":
            result = int(_libc.mq_open(b"/another", os.O_RDWR | os.O_CREAT, 0o600, None))
            _libc.mq_unlink(b"/another")
            return result < 0
        if what == "pipes":
            reader, _ = os.pipe()
            return fcntl.fcntl(reader, fcntl.F_GETPIPE_SZ) < _USUAL_PIPE_BYTES
        if what == "signals":
            return _can_queue_none()
        if what == "inflight":
            return _can_pass_none()
        limit = (ctypes.c_ulong * 2)(1000, 1000)
        assert _libc.setrlimit(6, limit) == 0  # RLIMIT_NPROC
        try:
            if os.fork() == 0:
                os._exit(0)
        except BlockingIOError:
            return True
        os.wait()
        return False

    who = Credentials(uid, uid)
    return bool(run_in_child(ask, what=f"one more of {what}", timeout_s=20, credentials=who))


def _ended_for_memory(setting: Setting) -> set[str]:
    """The control groups (version 1) in which the kernel has ended something for its memory."""
    files = [Path(group, "memory.oom_control") for group in setting.lab.groups()]
    counts = {file.parent.name: file.read_text() for file in files if file.exists()}
    return {name for name, count in counts.items() if re.search("^oom_kill [1-9]", count, re.M)}


def _can_queue_none() -> bool:
    """Whether no signal more may wait, with the limit that each instance has."""
    resource.setrlimit(resource.RLIMIT_SIGPENDING, (1024, 1024))
    signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGRTMIN])
    return int(_libc.sigqueue(os.getpid(), signal.SIGRTMIN, None)) < 0


def _can_pass_none() -> bool:
    """Whether no descriptor more may be on its way, with the limit that a small instance has."""
    resource.setrlimit(resource.RLIMIT_NOFILE, (1024, 1024))
    one, other = socket.socketpair()
    with one, other:
        try:
            socket.send_fds(one, [b"x"], [other.fileno()])
        except OSError as error:
            assert error.errno == errno.ETOOMANYREFS
            return True
    return False


def is_taken(path: Path) -> bool:
    """Whether somebody else holds the flock(2) of a file."""
    with path.open() as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
    return False
