"""A guest's packets pass where its own uid's are refused, and taps end with their instance."""

import json
import os
import select
import signal
import socket
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from attrs import frozen

from kvmsec.linux import unix_sockets
from kvmsec.linux.children import run_in_child
from kvmsec.linux.credentials import Credentials
from kvmsec.linux.namespaces import CLONE_NEWNET, setns, unshare
from kvmsec.node.tap_errors import BridgeUnusable, TapError, TapUnusable

pytestmark = pytest.mark.kvm

LINUX = Path(__file__).parents[2] / "vm-images" / "linux"
BRIDGE, TAP = "brlab", "taplab"
NODE, PEER, GUEST = "10.78.0.1", "10.78.0.2", "10.78.0.10"
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


@pytest.fixture
def wire() -> Iterator[Wire]:
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
    peer.close()
    os.close(there)
    for name in ("wire0", BRIDGE):
        ip("link", "del", name)


@pytest.fixture
def tap(wire: Wire) -> Iterator[str]:
    """A tap that the admin made, and set up in a way of his own."""
    ip("tuntap", "add", TAP, "mode", "tap", "user", "246900")
    ip("link", "set", TAP, "address", "02:00:00:00:02:46", "mtu", "1400", "master", BRIDGE)
    yield TAP
    ip("link", "del", TAP)


def settings(name: str) -> dict[str, Any]:
    """What an admin sets of a tap."""
    (link,) = json.loads(ip("-j", "-d", "link", "show", name))
    return {
        **{key: link.get(key) for key in ("ifindex", "mtu", "master", "address")},
        **{key: link["linkinfo"]["info_data"].get(key) for key in ("user", "pi", "vnet_hdr")},
        **{"persist": link["linkinfo"]["info_data"]["persist"], "up": "UP" in link["flags"]},
        "ipv6": Path(f"/proc/sys/net/ipv6/conf/{name}/disable_ipv6").read_text() == "0\n",
    }


def has_ipv6(name: str) -> bool:
    return bool(settings(name)["ipv6"])


def taps_of(lab: Any) -> list[str]:
    names = lab.run(lambda node: node.info("web")).details["taps"]
    assert set(names) <= {name for _, name in socket.if_nameindex()}
    return list(names)


# A whole guest -----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def linux() -> dict[str, object]:
    """The keys of a machine that boots the Linux guest; its build is the other tests' affair."""
    images = LINUX / ".build"
    if not (images / "initrd.cpio.gz").exists():
        pytest.skip("run vm-images/linux/build first")
    return {
        **{"memory_mib": 128, "accelerator": "tcg", "firmware": None},
        **{"kernel": str(images / "vmlinuz"), "initrd": str(images / "initrd.cpio.gz")},
        "append": "console=ttyS0 quiet panic=-1",
    }


class Line:
    """The serial line of the Linux guest: see vm-images/linux/README.md."""

    def __init__(self, path: Path) -> None:
        self._socket = unix_sockets.connect(path)
        self._heard = b""
        while not self.hear().startswith("KVMSEC-LINUX up"):
            continue

    def hear(self) -> str:
        end = time.monotonic() + DEADLINE_S
        while b"\r\n" not in self._heard:
            self._socket.settimeout(max(end - time.monotonic(), 0.001))
            chunk = self._socket.recv(4096)
            assert chunk, f"the line was closed after {self._heard!r}"
            self._heard += chunk
        line, self._heard = self._heard.split(b"\r\n", 1)
        return line.decode(errors="replace")

    def ask(self, command: str) -> str:
        self._socket.sendall(command.encode() + b"\n")
        return self.hear()

    def close(self) -> None:
        self._socket.close()


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


def test_a_guest_reaches_its_network_while_its_uid_reaches_none(
    wire: Wire, make_lab: Callable[..., Any], linux: dict[str, object]
) -> None:
    lab = make_lab()
    info = lab.start(nics=[{"bridge": BRIDGE}], **linux)
    line = Line(lab.paths.instance("web").serial_socket)
    assert f"{GUEST}/24" in line.ask(f"ip {GUEST}/24")
    assert line.ask(f"ping {PEER}") == f"PING {PEER} answered"
    assert send_as(info.uid) == 1, "EPERM"
    assert send_as(246999) is None, "and nobody else is kept from sending"
    assert wire.heard() == (b"from the node", NODE), "the guest's uid sent nothing before"
    line.close()
    lab.stop()


# Taps --------------------------------------------------------------------------------------------


def test_a_tap_that_was_made_has_no_ipv6_and_goes_at_the_stop(
    wire: Wire, make_lab: Callable[..., Any]
) -> None:
    lab = make_lab()
    lab.start(nics=[{"bridge": BRIDGE}, {"bridge": BRIDGE}])
    names = taps_of(lab)
    assert len(names) == 2
    assert not any(has_ipv6(name) for name in names)
    lab.stop()
    assert not {name for _, name in socket.if_nameindex()} & set(names)


def test_a_borrowed_tap_is_put_back_as_it_was(tap: str, make_lab: Callable[..., Any]) -> None:
    lab = make_lab()
    before = settings(tap)
    lab.start(nics=[{"tap": tap}])
    assert not has_ipv6(tap)
    assert settings(tap) != before
    lab.stop()
    assert settings(tap) == before


def test_two_instances_never_share_a_tap(tap: str, make_lab: Callable[..., Any]) -> None:
    lab = make_lab()
    lab.start(nics=[{"tap": tap}])
    with pytest.raises(TapUnusable, match="is in use by another process"):
        lab.start("other", nics=[{"tap": tap}])
    assert not has_ipv6(tap)
    lab.stop()


@pytest.mark.parametrize("kind", ["made", "borrowed"])
def test_taps_outlive_no_qemu_that_was_killed(
    kind: str, tap: str, make_lab: Callable[..., Any]
) -> None:
    lab = make_lab()
    before = settings(tap)
    info = lab.start(nics=[{"bridge": BRIDGE} if kind == "made" else {"tap": tap}])
    names = taps_of(lab)
    pidfd = os.pidfd_open(info.pid)
    signal.pidfd_send_signal(pidfd, signal.SIGKILL)
    assert select.select([pidfd], [], [], DEADLINE_S)[0]
    os.close(pidfd)
    lab.reconcile()
    left = {name for _, name in socket.if_nameindex()} & set(names)
    assert left == (set() if kind == "made" else {tap})
    assert settings(tap) == before


@pytest.mark.parametrize(
    ("nic", "error"),
    [
        ({"bridge": "nobridge"}, BridgeUnusable),
        ({"tap": "notap"}, TapUnusable),
        ({"bridge": "lo"}, BridgeUnusable),
    ],
)
def test_a_network_that_is_none_is_told_and_nothing_left(
    nic: dict[str, str], error: type[TapError], wire: Wire, make_lab: Callable[..., Any]
) -> None:
    lab = make_lab()
    with pytest.raises(error, match=next(iter(nic.values()))):
        lab.start(nics=[{"bridge": BRIDGE}, nic])
    assert lab.leftovers() == {}
