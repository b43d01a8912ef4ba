"""A bridge with a host at its other end, a Linux guest's serial line, packets of a uid's own."""

import os
import socket
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from attrs import frozen

from kvmsec.linux import unix_sockets
from kvmsec.linux.children import run_in_child
from kvmsec.linux.credentials import Credentials
from kvmsec.linux.namespaces import CLONE_NEWNET, setns, unshare
from tests.kvm.serial_line import Lines

BRIDGE = "brlab"
NODE, PEER, GUEST, OTHER_GUEST = "10.78.0.1", "10.78.0.2", "10.78.0.10", "10.78.0.11"
PORT = 5000
DEADLINE_S = 60.0


def ip(*arguments: str) -> str:
    done = subprocess.run(["ip", *arguments], capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"ip {' '.join(arguments)}: {done.stderr}"
    return done.stdout


@frozen
class Wire:
    """A bridge of the node's, and a host on the other end of a cable in it."""

    peer: socket.socket

    def heard(self) -> tuple[bytes, str] | None:
        """The next datagram at the peer and whom it is from, None when none comes."""
        try:
            data, (address, _) = self.peer.recvfrom(4096)
        except TimeoutError:
            return None
        return data, address


@contextmanager
def elsewhere() -> Iterator[None]:
    """In a new network namespace; it lives on as long as something in it does."""
    home = os.open("/proc/self/ns/net", os.O_RDONLY | os.O_CLOEXEC)
    unshare(CLONE_NEWNET)
    try:
        yield
    finally:
        setns(home, CLONE_NEWNET)
        os.close(home)


@contextmanager
def laid_wire() -> Iterator[Wire]:
    """A bridge in this network namespace, and a cable from it to a host in another."""
    with elsewhere():
        there = os.open("/proc/self/ns/net", os.O_RDONLY | os.O_CLOEXEC)
        peer = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
    home = os.open("/proc/self/ns/net", os.O_RDONLY | os.O_CLOEXEC)
    ip("link", "add", BRIDGE, "type", "bridge")
    ip("link", "add", "wire0", "master", BRIDGE, "up", "type", "veth", "peer", "name", "wire1")
    ip("link", "set", "wire1", "netns", f"/proc/{os.getpid()}/fd/{there}")
    ip("addr", "add", f"{NODE}/24", "dev", BRIDGE)
    ip("link", "set", BRIDGE, "up")
    setns(there, CLONE_NEWNET)
    ip("addr", "add", f"{PEER}/24", "dev", "wire1")
    ip("link", "set", "wire1", "up")
    setns(home, CLONE_NEWNET)
    os.close(home)
    peer.bind((PEER, PORT))
    peer.settimeout(1)
    yield Wire(peer)
    # Before its other end, which goes with the namespace, and takes this one along.
    for name in ("wire0", BRIDGE):
        ip("link", "del", name)
    peer.close()
    os.close(there)


class Line:
    """The serial line of the Linux guest: see vm-images/linux/README.md."""

    def __init__(self, path: Path) -> None:
        self._lines = Lines(unix_sockets.connect(path))
        while not self._lines.hear_line().startswith("KVMSEC-LINUX up"):
            continue

    def ask(self, command: str) -> str:
        return self._lines.ask(command.encode() + b"\n")

    def close(self) -> None:
        self._lines.close()


def send_as(uid: int) -> int | None:
    """Send the peer a datagram from the node as a uid; the errno that it met."""

    def send() -> int | None:
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sender:
            try:
                sender.sendto(b"from the node", (PEER, PORT))
            except OSError as error:
                return error.errno
        return None

    who = Credentials(uid, uid)
    answer: int | None = run_in_child(send, what="sending", timeout_s=20, credentials=who)
    return answer
