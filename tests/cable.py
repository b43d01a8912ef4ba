"""A node and a peer of a test's own: two network namespaces joined by a cable."""

import contextlib
import ctypes
import os
import select
import socket
import struct
import subprocess
from collections.abc import Callable, Iterator
from typing import Any

from attrs import frozen

from firewall.policy import Family, LogSettings, Policy
from kvmsec.linux.children import run_in_child
from kvmsec.linux.credentials import Credentials
from kvmsec.linux.namespaces import CLONE_NEWNET, setns, unshare

NODE: dict[Family, str] = {"ipv4": "10.77.0.1", "ipv6": "fd77::1"}
PEER: dict[Family, str] = {"ipv4": "10.77.0.2", "ipv6": "fd77::2"}
KIND: dict[Family, socket.AddressFamily] = {"ipv4": socket.AF_INET, "ipv6": socket.AF_INET6}


def _refuse(call: int, arguments: dict[int, int], error: int) -> None:
    def load(offset: int) -> bytes:
        return struct.pack("=HBBI", 0x20, 0, 0, offset)

    # seccomp_data: the number at 0, the arguments from 16 on, eight bytes each.
    checks = [(0, call), *((16 + 8 * place, value) for place, value in arguments.items())]
    program = b""
    for done, (offset, value) in enumerate(checks):
        to_allow = 2 * (len(checks) - done - 1) + 1
        program += load(offset) + struct.pack("=HBBI", 0x15, 0, to_allow, value)
    program += struct.pack("=HBBI", 0x06, 0, 0, 0x00050000 | error)
    program += struct.pack("=HBBI", 0x06, 0, 0, 0x7FFF0000)
    libc = ctypes.CDLL(None)
    code = ctypes.create_string_buffer(program)
    header = struct.pack("HxxxxxxP", len(program) // 8, ctypes.addressof(code))
    assert libc.prctl(38, 1, 0, 0, 0) == 0  # PR_SET_NO_NEW_PRIVS
    assert libc.prctl(22, 2, header) == 0  # PR_SET_SECCOMP, SECCOMP_MODE_FILTER


@frozen
class Host:
    """The network namespace that the test runs in, and what it is changed and looked at with."""

    # A uid of the pool, and one that is nobody's business.
    uid: int = 220001
    outsider: int = 225000

    def policy(self, *uids: tuple[int, int], tag: str = "kvmsec", **log: Any) -> Policy:
        return Policy(uids or ((220000, 220099),), LogSettings(**log), tag)

    def sh(self, *argv: str) -> str:
        """Run a command of the system's; its output."""
        done = subprocess.run(argv, capture_output=True, text=True, check=False)
        assert done.returncode == 0, f"{' '.join(argv)}: {done.stderr}"
        return done.stdout

    def as_uid(self, uid: int, function: Callable[[], Any], timeout_s: float = 20) -> Any:
        return run_in_child(
            function, what=f"uid {uid}", credentials=Credentials(uid, uid), timeout_s=timeout_s
        )

    def rules(self) -> str:
        """Everything that packet filters hold here but counters, elements and empty tables."""
        tools = ("iptables-legacy-save", "ip6tables-legacy-save")
        lines = [line for tool in tools for line in self.sh(tool).splitlines()]
        legacy = [line for line in lines if line.startswith("-A") or " - [" in line]
        return "\n".join([*legacy, self.sh("nft", "-s", "-t", "list", "ruleset")])

    def where_refused(
        self, call: int, arguments: dict[int, int], error: int, function: Callable[[], Any]
    ) -> Any:
        """Run the function in a child where the kernel answers a system call with an error.

        `call` is its number, `arguments` what it must have at which place (seccomp(2)).
        """

        def work() -> Any:
            _refuse(call, arguments, error)
            return function()

        return run_in_child(work, what="a refused system call", timeout_s=60)

    def send_to(self, uid: int, family: Family, address: str, data: bytes = b"x") -> int | None:
        """Send a datagram to port 5000 as the uid; the errno that it met, None if it went."""

        def work() -> int | None:
            with socket.socket(KIND[family], socket.SOCK_DGRAM) as sender:
                try:
                    sender.sendto(data, (address, 5000))
                except OSError as error:
                    return error.errno
            return None

        answer: int | None = self.as_uid(uid, work)
        return answer


@frozen
class Net(Host):
    """The node is where the test runs; the peer's sockets are made by entering its namespace."""

    node: int = -1
    peer: int = -1

    @contextlib.contextmanager
    def at_peer(self) -> Iterator[None]:
        setns(self.peer, CLONE_NEWNET)
        try:
            yield
        finally:
            setns(self.node, CLONE_NEWNET)

    def listen(self, family: Family, kind: socket.SocketKind) -> socket.socket:
        """A socket of the peer's on port 5000."""
        with self.at_peer():
            listener = socket.socket(KIND[family], kind)
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            listener.bind((PEER[family], 5000))
            if kind == socket.SOCK_STREAM:
                listener.listen(16)
            return listener

    def dial(self, family: Family, port: int) -> socket.socket:
        """A connection that the peer has begun to the node, not waited for."""
        with self.at_peer():
            dialler = socket.socket(KIND[family], socket.SOCK_STREAM)
        dialler.setblocking(False)
        dialler.connect_ex((NODE[family], port))
        return dialler

    def send(self, uid: int, family: Family, data: bytes = b"x") -> int | None:
        return self.send_to(uid, family, PEER[family], data)

    def peer_address(self, family: Family) -> tuple[str, int]:
        return (PEER[family], 5000)

    def received(self, sock: socket.socket, wait_s: float = 2.0) -> bytes | None:
        """The next datagram or chunk, None when none comes in time."""
        return sock.recv(65536) if select.select([sock], [], [], wait_s)[0] else None


@contextlib.contextmanager
def new_namespace() -> Iterator[None]:
    home = os.open("/proc/self/ns/net", os.O_RDONLY | os.O_CLOEXEC)
    unshare(CLONE_NEWNET)
    try:
        yield
    finally:
        setns(home, CLONE_NEWNET)
        os.close(home)


@contextlib.contextmanager
def cabled() -> Iterator[Net]:
    """A cable from the namespace that the caller is in to one of a peer's."""
    node = os.open("/proc/self/ns/net", os.O_RDONLY | os.O_CLOEXEC)
    with new_namespace():
        peer = os.open("/proc/self/ns/net", os.O_RDONLY | os.O_CLOEXEC)
    cable = Net(node=node, peer=peer)
    cable.sh("ip", "link", "add", "wire0", "type", "veth", "peer", "name", "wire1")
    cable.sh("ip", "link", "set", "wire1", "netns", f"/proc/{os.getpid()}/fd/{peer}")
    _address(cable, "wire0", NODE)
    with cable.at_peer():
        _address(cable, "wire1", PEER)
    try:
        yield cable
    finally:
        os.close(node)
        os.close(peer)


def _address(host: Host, interface: str, addresses: dict[Family, str]) -> None:
    host.sh("ip", "addr", "add", f"{addresses['ipv4']}/24", "dev", interface)
    host.sh("ip", "addr", "add", f"{addresses['ipv6']}/64", "dev", interface, "nodad")
    host.sh("ip", "link", "set", interface, "up")
