"""SYN cookies against a peer that speaks TCP by hand and colludes with the instance."""

import select
import socket
import struct
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from attrs import define, field

from firewall.backend import Backend
from kvmsec.linux.children import start_child
from kvmsec.linux.credentials import Credentials

pytestmark = [pytest.mark.root, pytest.mark.netfilter, pytest.mark.usefixtures("warm")]

# That both ways to nft hold the same rules is seen in test_rules.
each_filter = pytest.mark.parametrize("make", ["nftables", "iptables"], indirect=True)

PORT = 6000
SYN, ACK = 0x02, 0x10
SECRET = b"secret" * 100


@define
class RawPeer:
    """The peer's end of many connections at once (RFC 9293), with the windows that it likes."""

    socket: socket.socket
    # Local port -> the next number expected of the node.
    answered: dict[int, int] = field(factory=dict)
    data: int = 0

    def send(self, port: int, sequence: int, acknowledged: int, flags: int, window: int) -> None:
        header = struct.pack(
            "!HHIIBBHHH", port, PORT, sequence, acknowledged, 5 << 4, flags, window, 0, 0
        )
        addresses = socket.inet_aton("10.77.0.2") + socket.inet_aton("10.77.0.1")
        total = _checksum(addresses + struct.pack("!BBH", 0, 6, len(header)) + header)
        packet = header[:16] + struct.pack("!H", total) + header[18:]
        self.socket.sendto(packet, ("10.77.0.1", 0))

    def begin(self, ports: range) -> None:
        for port in ports:
            self.send(port, 1000, 0, SYN, 65535)

    def acknowledge(self, window: int) -> None:
        for port, expected in self.answered.items():
            self.send(port, 1001, expected, ACK, window)

    def listen(self, seconds: float) -> None:
        """Take in what the node sends for so long."""
        end = time.monotonic() + seconds
        while (left := end - time.monotonic()) > 0:
            if not select.select([self.socket], [], [], left)[0]:
                return
            self._take(self.socket.recv(65536))

    def _take(self, packet: bytes) -> None:
        segment = packet[(packet[0] & 15) * 4 :]
        source, port, sequence, _, offset, flags = struct.unpack_from("!HHIIBB", segment)
        if source == PORT and flags & (SYN | ACK) == SYN | ACK:
            self.answered[port] = sequence + 1
        elif source == PORT:
            self.data += len(segment) - (offset >> 4) * 4


def _checksum(data: bytes) -> int:
    total = sum(struct.unpack(f"!{len(data) // 2}H", data))
    total = (total >> 16) + (total & 0xFFFF)
    return ~(total + (total >> 16)) & 0xFFFF


@pytest.fixture
def raw_peer(net: Any) -> Iterator[RawPeer]:
    with net.at_peer():
        # The peer's own kernel knows nothing of these connections, and would reset them.
        net.sh("nft", "add table ip quiet")
        net.sh("nft", "add chain ip quiet output { type filter hook output priority 0; }")
        net.sh("nft", "add rule ip quiet output tcp flags rst drop")
        raw = socket.socket(socket.AF_INET, socket.SOCK_RAW, socket.IPPROTO_TCP)
    with raw:
        yield RawPeer(raw)


def serve(net: Any, uid: int, attack: Callable[[], None]) -> int:
    """Run a listener of the uid's with no backlog, which tells its secret; accepted connections."""
    ours, theirs = socket.socketpair()

    def work() -> int:
        listener = socket.socket()
        listener.bind(("0.0.0.0", PORT))
        listener.listen(0)
        theirs.send(b"?")
        theirs.recv(1)
        listener.settimeout(0.5)
        accepted = 0
        while True:
            try:
                connection = listener.accept()[0]
            except TimeoutError:
                return accepted
            accepted += 1
            connection.setblocking(False)
            connection.send(SECRET)
            connection.close()

    child = start_child(
        work, what="a listener", credentials=Credentials(uid, uid), keep=[theirs.fileno()]
    )
    assert ours.recv(1) == b"?"
    attack()
    ours.send(b"!")
    accepted: int = child.collect(20)
    return accepted


def by_zero_window(net: Any, peer: RawPeer, uid: int) -> int:
    """The secret is written while the window is shut, and the window opened after close()."""

    def attack() -> None:
        peer.begin(range(30000, 30012))
        peer.listen(0.3)
        peer.acknowledge(window=0)

    accepted = serve(net, uid, attack)
    peer.acknowledge(window=65535)
    peer.listen(1.0)  # Longer than two retransmissions of TCP (0.2 and 0.4 s).
    return accepted


@each_filter
def test_a_shut_window_gets_nothing_out(net: Any, raw_peer: RawPeer, backend: Backend) -> None:
    backend.apply(net.policy())
    accepted = by_zero_window(net, raw_peer, net.uid)
    assert raw_peer.data == 0
    # The legacy tables can't tell whose cookie an answer is: connections begin, and stay mute.
    assert (accepted > 0) == (backend.name == "iptables")


def test_a_plain_owner_rule_gives_it_all_out(net: Any, raw_peer: RawPeer) -> None:
    """Shows that the measurement above can fail."""
    owner = ("-m", "owner", "--uid-owner", str(net.uid))
    net.sh("iptables-legacy", "-A", "OUTPUT", *owner, "-j", "DROP")
    assert by_zero_window(net, raw_peer, net.uid) > 0
    assert raw_peer.data >= len(SECRET)


@each_filter
def test_a_service_of_the_host_keeps_its_cookies(
    net: Any, raw_peer: RawPeer, backend: Backend
) -> None:
    backend.apply(net.policy())

    def flood() -> None:
        raw_peer.begin(range(30000, 30012))
        raw_peer.listen(0.3)
        raw_peer.acknowledge(window=65535)

    accepted = serve(net, net.outsider, flood)
    raw_peer.listen(1.0)
    assert len(raw_peer.answered) > 2  # Cookies, for a backlog of one.
    assert accepted > 0
    assert raw_peer.data >= accepted * len(SECRET)
