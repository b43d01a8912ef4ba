"""Taps made for a bridge: real ones, in the network namespace of the test run."""

import asyncio
import fcntl
import os
import select
import signal
import socket
import struct
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from kvmsec.linux import command, tun
from kvmsec.node import ipv6, taps
from kvmsec.node.ipv6 import Ipv6
from kvmsec.node.tap_errors import BridgeUnusable, NodeDeviceMissing, TapUnusable
from kvmsec.node.tap_records import OpenTap, TapRecord, TapRequest

pytestmark = pytest.mark.root

_TAG = "kvmsec_0badcafe"
_BRIDGE = "brkvmsec"
_SIOCSIFHWADDR = 0x8924


def _ip(*arguments: str) -> None:
    command.run(("ip", *arguments), timeout_s=10)


def _interfaces() -> dict[str, int]:
    return {name: index for index, name in socket.if_nameindex()}


@pytest.fixture(autouse=True)
def interfaces() -> Iterator[dict[str, int]]:
    """The interfaces before a test; it must leave the same."""
    before = _interfaces()
    yield before
    left = _interfaces().keys() - before.keys()
    for name in left:
        _ip("link", "del", name)
    assert not left


@pytest.fixture
def bridge(interfaces: dict[str, int]) -> Iterator[str]:
    """A bridge that is up and says nothing of its own accord."""
    _ip("link", "add", _BRIDGE, "type", "bridge", "mcast_snooping", "0")
    ipv6.turn_off(_BRIDGE)
    _ip("link", "set", _BRIDGE, "up")
    yield _BRIDGE
    _ip("link", "del", _BRIDGE)


def _open(request: TapRequest, **more: Any) -> OpenTap:
    return asyncio.run(taps.open_tap(request, tag=_TAG, instance="guest", **more))


def _show(name: str) -> str:
    return command.run(("ip", "-d", "link", "show", name), timeout_s=10).stdout.decode()


def _frame(payload: bytes, *, to: bytes = b"\xff" * 6) -> bytes:
    """An Ethernet frame of an experimental protocol, behind an empty virtio-net header."""
    return bytes(10) + to + b"\x02\x00\x00\x00\x00\x99" + b"\x88\xb5" + payload.ljust(46, b"\0")


def _receive(descriptor: int, timeout_s: float) -> bytes:
    if not select.select([descriptor], [], [], timeout_s)[0]:
        return b""
    return os.read(descriptor, 65536)


def test_a_tap_for_a_bridge_is_roots_up_in_the_bridge_and_without_ipv6(bridge: str) -> None:
    opened = _open(TapRequest(bridge=bridge))
    record = opened.record
    try:
        assert record.ifindex == _interfaces()[record.name]
        assert record.made
        assert record.bridge == bridge
        assert len(record.name) == 15
        shown = _show(record.name)
        assert f"master {bridge}" in shown
        assert ",UP," in shown
        assert f"alias kvmsec:{_TAG}:guest" in shown
        assert "link/ether fe:" in shown
        assert "tun type tap pi off vnet_hdr on persist off user root group root" in shown
        assert ipv6.read(record.name) == Ipv6(True, 1)
        assert os.get_inheritable(opened.descriptor) is False
    finally:
        opened.close()
    assert record.name not in _interfaces(), "it goes with its last descriptor"


def test_frames_flow_between_two_taps_of_a_bridge(bridge: str) -> None:
    first, second = _open(TapRequest(bridge=bridge)), _open(TapRequest(bridge=bridge))
    try:
        frame = _frame(b"hello")
        os.write(first.descriptor, frame)
        assert _receive(second.descriptor, 5) == frame
        os.write(second.descriptor, _frame(b"back", to=b"\x02\x00\x00\x00\x00\x99"))
        assert _receive(first.descriptor, 0.05) == b"", "the bridge learnt where that address is"
    finally:
        first.close()
        second.close()


def test_the_node_says_nothing_on_a_tap_by_itself(bridge: str) -> None:
    opened = _open(TapRequest(bridge=bridge))
    try:
        assert _receive(opened.descriptor, 0.5) == b""
    finally:
        opened.close()


def test_a_bridge_keeps_its_mac_and_its_mtu(bridge: str) -> None:
    _ip("tuntap", "add", "port0", "mode", "tap")
    _ip("link", "set", "port0", "mtu", "9000", "address", "02:00:00:00:00:07", "master", bridge)

    def seen() -> list[str]:
        words = _show(bridge).split()
        return [words[words.index(key) + 1] for key in ("mtu", "link/ether")]

    before = seen()
    assert before == ["9000", "02:00:00:00:00:07"]
    opened = _open(TapRequest(bridge=bridge))
    try:
        assert seen() == before
    finally:
        opened.close()
        _ip("link", "del", "port0")


def test_without_a_bridge_it_says_so_and_leaves_nothing() -> None:
    with pytest.raises(BridgeUnusable, match="does not exist") as caught:
        _open(TapRequest(bridge="nowhere"))
    assert "ip link add nowhere" in str(caught.value.hint)
    with pytest.raises(BridgeUnusable, match="is no bridge"):
        _open(TapRequest(bridge="lo"))


def test_vhost_is_a_descriptor_where_the_node_has_it_and_an_error_where_not(
    bridge: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(taps, "_VHOST", "/dev/no-vhost-net")
    with pytest.raises(NodeDeviceMissing, match="/dev/no-vhost-net") as caught:
        _open(TapRequest(bridge=bridge, vhost=True))
    assert "modprobe vhost_net" in str(caught.value.hint)
    monkeypatch.setattr(taps, "_VHOST", "/dev/null")  # Stands for it: it is only opened.
    opened = _open(TapRequest(bridge=bridge, vhost=True))
    assert opened.vhost_descriptor is not None
    assert os.readlink(f"/proc/self/fd/{opened.vhost_descriptor}") == "/dev/null"
    opened.close()


def test_the_record_is_known_before_the_tap_joins_the_bridge(bridge: str) -> None:
    seen: list[tuple[TapRecord, str]] = []
    opened = _open(
        TapRequest(bridge=bridge),
        remember=lambda record: seen.append((record, _show(record.name))),
    )
    opened.close()
    ((record, shown),) = seen
    assert record == opened.record
    assert "master" not in shown
    assert ",UP," not in shown


def test_what_is_half_made_is_undone(bridge: str, monkeypatch: pytest.MonkeyPatch) -> None:
    descriptors = set(os.listdir("/proc/self/fd"))

    def refuse(record: TapRecord) -> None:
        raise OSError(28, "No space left on device")

    with pytest.raises(OSError, match="No space left"):
        _open(TapRequest(bridge=bridge), remember=refuse)
    monkeypatch.setattr(taps, "_high_mac", lambda: "01:00:00:00:00:00")
    with pytest.raises(TapUnusable, match="could not be set"):
        _open(TapRequest(bridge=bridge))
    assert set(os.listdir("/proc/self/fd")) == descriptors
    assert _interfaces().keys() == {"lo", bridge}


def _be_hostile(descriptor: int) -> None:
    """What the holder of a tap's descriptor may do to it without any capability."""
    fcntl.ioctl(descriptor, 0x400454CC, 240001)  # TUNSETOWNER
    fcntl.ioctl(descriptor, 0x400454CE, 240001)  # TUNSETGROUP
    fcntl.ioctl(descriptor, 0x400454CB, 1)  # TUNSETPERSIST
    mac = struct.pack("16sH14s", b"", 1, b"\x02\x66\x66\x66\x66\x66")
    fcntl.ioctl(descriptor, _SIOCSIFHWADDR, mac)


def test_a_tap_that_its_holder_made_persistent_is_deleted(bridge: str) -> None:
    opened = _open(TapRequest(bridge=bridge))
    _be_hostile(opened.descriptor)
    opened.close()
    shown = _show(opened.record.name)
    assert "persist on user 240001" in shown
    assert "link/ether 02:66" in shown
    for _ in range(2):
        asyncio.run(taps.remove_taps([opened.record]))
        assert opened.record.name not in _interfaces()


def test_a_tap_is_deleted_from_under_its_holder(bridge: str) -> None:
    opened = _open(TapRequest(bridge=bridge))
    asyncio.run(taps.remove_taps([opened.record]))
    assert opened.record.name not in _interfaces()
    opened.close()


def test_an_interface_that_reused_the_name_or_the_index_is_left_alone() -> None:
    descriptor = tun.create("tapother")
    index = _interfaces()["tapother"]
    asyncio.run(
        taps.remove_taps(
            [
                TapRecord("tapother", index + 1000, made=True),
                TapRecord("taphere", index, made=True),
                TapRecord("lo", 1, made=True),
            ]
        )
    )
    assert _interfaces().keys() >= {"tapother", "lo"}
    os.close(descriptor)


_LAUNCHER = f"""
import asyncio, os, signal
from kvmsec.node.taps import TapRequest, open_tap
asyncio.run(open_tap(TapRequest(bridge={_BRIDGE!r}), tag={_TAG!r}, instance="guest"))
print("open", flush=True)
signal.pause()
"""


def test_a_killed_launcher_leaves_no_tap(bridge: str) -> None:
    launcher = subprocess.Popen([sys.executable, "-c", _LAUNCHER], stdout=subprocess.PIPE)
    with launcher:
        assert launcher.stdout is not None
        assert launcher.stdout.readline() == b"open\n"
        (made,) = _interfaces().keys() - {"lo", bridge}
        assert made.startswith("kvms")
        assert asyncio.run(taps.leaked_taps([], tag=_TAG)) == [], "its launcher holds it"
        launcher.send_signal(signal.SIGKILL)
    assert _interfaces().keys() == {"lo", bridge}


def test_leaked_taps_are_this_roots_that_nobody_knows_or_holds(bridge: str) -> None:
    opened = [_open(TapRequest(bridge=bridge)) for _ in range(3)]
    for tap in opened:
        tun.persist(tap.descriptor, True)
    held, known, leaked = opened
    known.close()
    leaked.close()
    assert asyncio.run(taps.leaked_taps([], tag="kvmsec")) == [], "another root's are not ours"
    found = asyncio.run(taps.leaked_taps([known.record], tag=_TAG))
    assert found == [leaked.record]
    asyncio.run(taps.remove_taps(found))
    assert asyncio.run(taps.leaked_taps([known.record], tag=_TAG)) == []
    assert {held.record.name, known.record.name} <= _interfaces().keys()
    asyncio.run(taps.remove_taps([held.record, known.record]))
    held.close()


def test_an_admins_tap_with_a_name_like_ours_is_no_leak(bridge: str) -> None:
    name = _open_and_close_name(bridge)
    _ip("tuntap", "add", name, "mode", "tap")
    assert asyncio.run(taps.leaked_taps([], tag=_TAG)) == []
    _ip("link", "del", name)


def _open_and_close_name(bridge: str) -> str:
    opened = _open(TapRequest(bridge=bridge))
    opened.close()
    return opened.record.name


def test_ipv6_stays_off_when_the_default_is_on(bridge: str) -> None:
    assert Path("/proc/sys/net/ipv6/conf/default/disable_ipv6").read_text() == "0\n"
    opened = _open(TapRequest(bridge=bridge))
    addresses = Path("/proc/net/if_inet6").read_text()
    opened.close()
    assert opened.record.name not in addresses
