"""What a jailed process holds: leaks are found whatever they are called, its own work is not."""

import os
import socket
import stat
import subprocess
from collections.abc import Callable, Collection, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pytest

from hypervisor import descriptors, process, tree
from hypervisor.closure import Closure
from hypervisor.jail import Cell, Jail
from hypervisor.newborn import Newborn, spawn
from kvmsec.linux import namespaces, syscalls
from kvmsec.linux.credentials import Credentials

pytestmark = pytest.mark.root

WHO = Credentials(239011, 239011)
DEADLINE_S = 10.0
Opener = Callable[[ExitStack, Path], int]


def opened(path: str, flags: int = os.O_RDONLY) -> Opener:
    def open_it(stack: ExitStack, _: Path) -> int:
        descriptor = os.open(path, flags | os.O_CLOEXEC)
        stack.callback(os.close, descriptor)
        return descriptor

    return open_it


def made(*arguments: int) -> Opener:
    def make(stack: ExitStack, _: Path) -> int:
        return stack.enter_context(socket.socket(*arguments)).fileno()

    return make


def pair(stack: ExitStack, _: Path) -> int:
    left, right = socket.socketpair()
    stack.enter_context(right)
    return stack.enter_context(left).fileno()


def pipe(stack: ExitStack, _: Path) -> int:
    reader, writer = os.pipe()
    stack.callback(os.close, writer)
    stack.callback(os.close, reader)
    return reader


def memory(stack: ExitStack, _: Path) -> int:
    descriptor = os.memfd_create("secret")
    stack.callback(os.close, descriptor)
    return descriptor


def process_descriptor(stack: ExitStack, _: Path) -> int:
    descriptor = os.pidfd_open(os.getpid())
    stack.callback(os.close, descriptor)
    return descriptor


def block_device(stack: ExitStack, place: Path) -> int:
    os.mknod(place / "disk", stat.S_IFBLK | 0o600, os.makedev(7, 0))
    descriptor = os.open(place / "disk", os.O_PATH | os.O_CLOEXEC)
    stack.callback(os.close, descriptor)
    return descriptor


def listener(stack: ExitStack, place: Path) -> int:
    other = stack.enter_context(socket.socket(socket.AF_UNIX))
    other.bind(str(place / "other.sock"))
    other.listen()
    return other.fileno()


LEAKS: dict[str, Opener] = {
    "a secret file": opened("/etc/shadow"),
    "the node's root": opened("/", os.O_RDONLY | os.O_DIRECTORY),
    "a device that has a namesake inside": opened("/dev/urandom"),
    "a file under /usr": opened("/usr/bin/env"),
    "a directory of libraries": opened("/usr/lib", os.O_RDONLY | os.O_DIRECTORY),
    "a process's memory": opened("/proc/self/mem"),
    "a namespace": opened("/proc/self/ns/mnt"),
    "a block device": block_device,
    "a socket pair": pair,
    "a listener": listener,
    "a TCP socket": made(socket.AF_INET, socket.SOCK_STREAM),
    "a UDP socket": made(socket.AF_INET, socket.SOCK_DGRAM),
    "an IPv6 socket": made(socket.AF_INET6, socket.SOCK_DGRAM),
    "a packet socket": made(socket.AF_PACKET, socket.SOCK_RAW),
    "a netlink socket": made(socket.AF_NETLINK, socket.SOCK_RAW),
    "a pipe of the launcher's": pipe,
    "memory of the launcher's": memory,
    "a process": process_descriptor,
}


@contextmanager
def holding(place: Path, grants: dict[int, int]) -> Iterator[Newborn]:
    """A program in its jail that got these."""
    for name in ("place", "output"):
        (place / name).mkdir()
    told = subprocess.run(["ldd", "/bin/sleep"], capture_output=True, text=True, check=True)
    files = ["/bin/sleep", *(word for word in told.stdout.split() if word.startswith("/"))]
    namespaces.mount("output", str(place / "output"), "tmpfs", 0, "size=16k")
    log = os.open(place / "output" / "log", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC)
    room = syscalls.detached_copy(str(place / "output"))
    binds = tuple((os.path.realpath(file), file) for file in files)
    built = tree.build_tree(Closure("", binds), str(place / "place"))
    jail = Jail(
        Cell(built),
        name="inside",
        credentials=WHO,
        output=room,
        log=log,
        system_calls=None,
        descriptors=grants,
    )
    child = spawn(jail, "/bin/sleep", ["sleep", "60"])
    try:
        child.release()
        child.executed()
        yield child
    finally:
        child.close()
        process.kill_and_wait(child.pidfd, DEADLINE_S)
        process.reap(child.pidfd)
        os.close(child.pidfd)
        for descriptor in (log, room, built):
            os.close(descriptor)
        namespaces.umount(str(place / "output"), namespaces.MNT_DETACH)


@pytest.mark.parametrize("leak", LEAKS)
def test_a_leak_is_found_and_a_grant_is_none(leak: str, tmp_path: Path) -> None:
    with ExitStack() as stack:
        number = LEAKS[leak](stack, tmp_path)
        target = os.readlink(f"/proc/self/fd/{number}")
        identity = descriptors.identity_of(number)
        with holding(tmp_path, {5: number}) as child:
            pid = child.process.pid
            leaked = descriptors.foreign_descriptors(pid, child.granted - {identity})
            granted = descriptors.foreign_descriptors(pid, child.granted)
    assert leaked == [f"it holds a descriptor of {target}"]
    assert granted == []


SEEN_WITHOUT_COMPARING = sorted(
    set(LEAKS) - {"a pipe of the launcher's", "memory of the launcher's"}
)


@pytest.mark.parametrize("leak", SEEN_WITHOUT_COMPARING)
def test_a_leak_is_found_when_the_launcher_has_closed_its_own(leak: str, tmp_path: Path) -> None:
    with ExitStack() as stack:
        number = LEAKS[leak](stack, tmp_path)
        identity = descriptors.identity_of(number)
        with holding(tmp_path, {5: number}) as child:
            stack.close()
            granted = child.granted - {identity}
            assert len(descriptors.foreign_descriptors(child.process.pid, granted)) == 1


def test_a_connection_is_its_own_when_it_came_by_a_granted_listener_alone(tmp_path: Path) -> None:
    """An accepted socket belongs to the network namespace of who connected: ours."""
    with ExitStack() as stack:
        listeners, accepted = [], []
        for name in ("granted", "other"):
            listener = stack.enter_context(socket.socket(socket.AF_UNIX))
            listener.bind(str(tmp_path / name))
            listener.listen()
            client = stack.enter_context(socket.socket(socket.AF_UNIX))
            client.connect(str(tmp_path / name))
            listeners.append(listener.fileno())
            accepted.append(stack.enter_context(listener.accept()[0]))
        grants = {3: listeners[0], 4: accepted[0].fileno(), 5: accepted[1].fileno()}
        with holding(tmp_path, grants) as child:
            taken = [descriptors.identity_of(one.fileno()) for one in accepted]
            for one in accepted:
                one.close()
            found = descriptors.foreign_descriptors(child.process.pid, child.granted - set(taken))
    assert found == [f"it holds a descriptor of socket:[{taken[1][1]}]"]


@pytest.mark.parametrize("is_zombie", [False, True])
def test_a_process_that_is_gone_is_an_error(tmp_path: Path, is_zombie: bool) -> None:
    with holding(tmp_path, {}) as child:
        process.kill_and_wait(child.pidfd, DEADLINE_S)
        if not is_zombie:
            process.reap(child.pidfd)
        with pytest.raises((FileNotFoundError, ProcessLookupError)):
            descriptors.foreign_descriptors(child.process.pid, set())
        with pytest.raises(process.QemuGone):
            process.confinement_problems(child)


def test_one_that_ends_while_it_is_looked_at_is_gone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    look = process.foreign_descriptors
    with holding(tmp_path, {}) as child:

        def end_first(pid: int, granted: Collection[descriptors.FileIdentity]) -> list[str]:
            process.kill_and_wait(child.pidfd, DEADLINE_S)
            return look(pid, granted)

        monkeypatch.setattr(process, "foreign_descriptors", end_first)
        with pytest.raises(process.QemuGone):
            process.confinement_problems(child)


def test_a_plain_program_is_found_to_lack_the_filter(tmp_path: Path) -> None:
    with holding(tmp_path, {}) as child:
        assert process.confinement_problems(child) == ["seccomp mode 0, wanted 2"]
