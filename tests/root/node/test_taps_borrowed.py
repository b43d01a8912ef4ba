"""Taps of the admin's that an instance borrows: put back as they were, whatever its holder did."""

import asyncio
import ctypes
import fcntl
import os
import select
import socket
import struct
from collections.abc import Iterator
from typing import Any

import pytest

from kvmsec.linux import command, tun
from kvmsec.node import ipv6, taps
from kvmsec.node.ipv6 import Ipv6
from kvmsec.node.tap_errors import TapsNotPutBack, TapUnusable
from kvmsec.node.tap_records import OpenTap, TapRecord, TapRequest

pytestmark = pytest.mark.root

_TAP = "tapadmin"
_BRIDGE = "bradmin"


def _ip(*arguments: str) -> str:
    return command.run(("ip", *arguments), timeout_s=10).stdout.decode()


def _names() -> set[str]:
    return {name for _, name in socket.if_nameindex()}


@pytest.fixture(autouse=True)
def tap() -> Iterator[str]:
    """A persistent tap of uid 240002's, in a bridge, up, with IPv6 on."""
    _ip("link", "add", _BRIDGE, "type", "bridge")
    _ip("tuntap", "add", _TAP, "mode", "tap", "user", "240002", "group", "240003")
    _ip("link", "set", _TAP, "address", "02:00:00:00:00:0a", "mtu", "1450", "master", _BRIDGE)
    _ip("link", "set", _TAP, "up")
    yield _TAP
    for name in _names() - {"lo"}:
        _ip("link", "del", name)


def _open(name: str = _TAP, **more: Any) -> OpenTap:
    request = TapRequest(tap=name)
    return asyncio.run(taps.open_tap(request, tag="kvmsec_0badcafe", instance="guest", **more))


def _remove(*records: TapRecord) -> None:
    asyncio.run(taps.remove_taps(records))


def _state(name: str = _TAP) -> tuple[bool, list[str], Ipv6 | None]:
    """All that `ip` shows of an interface but what only says that somebody holds or held it."""
    shown = _ip("-d", "link", "show", name)
    flags = shown[shown.index("<") + 1 : shown.index(">")].split(",")
    words = shown[shown.index(">") + 1 :].split()
    volatile = {
        "qdisc",
        "state",
    }  # A queue is kept once an interface was up; carrier decides state.
    kept = [
        word
        for before, word in zip(["", *words], words, strict=False)
        if not {before, word} & volatile
    ]
    return "UP" in flags, kept, ipv6.read(name)


def test_a_borrowed_tap_is_used_and_put_back_as_it_was(tap: str) -> None:
    before = _state()
    assert before[-1] == Ipv6(False, 0)
    opened = _open()
    assert ipv6.read(tap) == Ipv6(True, 1)
    assert not opened.record.made
    opened.close()
    for _ in range(2):
        _remove(opened.record)
        assert _state() == before


def test_one_that_was_down_is_up_while_it_is_used(tap: str) -> None:
    _ip("link", "set", tap, "down")
    before = _state()
    opened = _open()
    assert "UP" in _ip("link", "show", tap).split(">")[0].split("<")[1].split(",")
    opened.close()
    _remove(opened.record)
    assert _state() == before


def _be_hostile(descriptor: int, *, persist: int) -> None:
    fcntl.ioctl(descriptor, 0x400454CC, 240009)  # TUNSETOWNER
    fcntl.ioctl(descriptor, 0x400454CE, 240009)  # TUNSETGROUP
    fcntl.ioctl(descriptor, 0x400454CB, persist)  # TUNSETPERSIST
    mac = struct.pack("16sH14s", b"", 1, b"\x02\x66\x66\x66\x66\x66")
    fcntl.ioctl(descriptor, 0x8924, mac)  # SIOCSIFHWADDR


def test_what_its_holder_changed_is_put_back() -> None:
    before = _state()
    opened = _open()
    _be_hostile(opened.descriptor, persist=1)
    opened.close()
    assert _state() != before
    _remove(opened.record)
    assert _state() == before


def test_one_that_its_holder_made_vanish_is_made_again_the_same(tap: str) -> None:
    before = _state()
    opened = _open()
    _be_hostile(opened.descriptor, persist=0)
    opened.close()
    assert tap not in _names()
    _remove(opened.record)
    assert _state() == before
    assert socket.if_nametoindex(tap) == opened.record.ifindex


def test_one_without_an_owner_becomes_roots_only_when_its_holder_gave_it_one(tap: str) -> None:
    _ip("link", "del", tap)
    _ip("tuntap", "add", tap, "mode", "tap")
    before = _state()
    opened = _open()
    opened.close()
    _remove(opened.record)
    assert _state() == before
    opened = _open()
    _be_hostile(opened.descriptor, persist=1)
    opened.close()
    _remove(opened.record)
    assert "user root group root" in _ip("-d", "link", "show", tap)


class _FilterProgram(ctypes.Structure):
    _fields_ = (("length", ctypes.c_ushort), ("filter", ctypes.c_void_p))


def _drop_all_frames(descriptor: int) -> None:
    """Attach a classic BPF program, `ret #0`: the device drops what it is sent."""
    drop = ctypes.create_string_buffer(struct.pack("HBBI", 0x06, 0, 0, 0))
    program = _FilterProgram(1, ctypes.addressof(drop))
    fcntl.ioctl(descriptor, 0x401054D5, bytes(program))  # TUNATTACHFILTER


def _hears(descriptor: int) -> bool:
    """Whether a frame that the node sends over the tap reaches its holder, in 20 tries.

    The kernel drops frames until it has noticed, in its own time, that somebody was attached.
    """
    with socket.socket(socket.AF_PACKET, socket.SOCK_RAW) as sender:
        sender.bind((_TAP, 0))
        for _ in range(20):
            sender.send(b"\xff" * 6 + b"\x02\0\0\0\0\x99" + b"\x88\xb5" + bytes(46))
            while select.select([descriptor], [], [], 0.1)[0]:
                if b"\x88\xb5" in os.read(descriptor, 4096):
                    return True
    return False


def test_a_filter_that_its_holder_left_does_not_reach_the_next_one(tap: str) -> None:
    opened = _open()
    assert _hears(opened.descriptor)
    _drop_all_frames(opened.descriptor)
    assert not _hears(opened.descriptor)
    opened.close()
    _remove(opened.record)
    again = tun.attach(tap)
    assert _hears(again)
    os.close(again)


def test_the_node_has_said_nothing_by_the_time_an_instance_has_it() -> None:
    """It is up with IPv6 on before: a solicitation goes out as soon as it is attached."""
    opened = _open()
    assert not select.select([opened.descriptor], [], [], 1.5)[0]
    opened.close()
    _remove(opened.record)


def test_one_that_is_in_use_is_refused_and_left_alone(tap: str) -> None:
    before = _state()
    opened = _open()
    with pytest.raises(TapUnusable, match="in use by another process"):
        _open()
    with pytest.raises(TapsNotPutBack, match="in use"):
        _remove(opened.record)
    opened.close()
    _remove(opened.record)
    assert _state() == before


def test_what_is_no_tap_of_one_queue_is_refused(tap: str) -> None:
    _ip("tuntap", "add", "tunadmin", "mode", "tun")
    _ip("tuntap", "add", "tapmany", "mode", "tap", "multi_queue")
    refusals = {
        "tunadmin": "no tap but a tun",
        "lo": "no tap but a plain interface",
        _BRIDGE: "no tap but an interface of kind bridge",
        "tapmany": "several queues",
        "nowhere": "does not exist",
    }
    before = {name: _state(name) for name in refusals if name != "nowhere"}
    for name, words in refusals.items():
        with pytest.raises(TapUnusable, match=words) as caught:
            _open(name)
        assert caught.value.hint
    assert {name: _state(name) for name in before} == before
    assert "nowhere" not in _names()


def test_one_with_an_ipv6_address_is_refused_since_it_would_lose_it(tap: str) -> None:
    _ip("addr", "add", "2001:db8::1/64", "dev", tap, "nodad")
    with pytest.raises(TapUnusable, match="IPv6 addresses"):
        _open()
    assert "2001:db8::1" in _ip("addr", "show", tap)


def test_it_is_remembered_before_it_is_changed_and_undone_when_that_fails(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    before = _state()
    descriptors = set(os.listdir("/proc/self/fd"))
    seen = []

    def refuse(record: TapRecord) -> None:
        seen.append((record, ipv6.read(_TAP)))
        raise OSError(28, "No space left on device")

    with pytest.raises(OSError, match="No space left"):
        _open(remember=refuse)
    ((record, settings),) = seen
    assert settings == Ipv6(False, 0)
    assert record.former is not None
    assert (record.former.mtu, record.former.owner, record.former.is_up) == (1450, 240002, True)

    def fail(interface: str) -> None:
        ipv6.write(interface, Ipv6(True, 1))
        raise OSError(30, "Read-only file system")

    monkeypatch.setattr("kvmsec.node.taps.ipv6.turn_off", fail)
    with pytest.raises(OSError, match="Read-only"):
        _open()
    assert _state() == before
    assert set(os.listdir("/proc/self/fd")) == descriptors


def test_one_that_cannot_be_put_back_does_not_keep_the_others_from_it(tap: str) -> None:
    before = _state()
    _ip("tuntap", "add", "tapsecond", "mode", "tap")
    first, second = _open("tapsecond"), _open()
    second.close()
    with pytest.raises(TapsNotPutBack) as caught:
        _remove(first.record, second.record)
    assert len(caught.value.problems) == 1
    assert "tapsecond" in caught.value.problems[0]
    assert _state() == before
    first.close()
