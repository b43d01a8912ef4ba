"""A borrowed tap of which something is gone for good: the rest is put back, and it is said."""

import asyncio
import os
import socket
from collections.abc import Iterator

import pytest

from kvmsec.linux import command, tun
from kvmsec.node import ipv6, taps
from kvmsec.node.ipv6 import Ipv6
from kvmsec.node.tap_errors import TapsNotPutBack
from kvmsec.node.tap_records import OpenTap, TapRecord, TapRequest

pytestmark = pytest.mark.root

_TAP = "tapgone"
_BRIDGE = "brgone"


def _ip(*arguments: str) -> str:
    return command.run(("ip", *arguments), timeout_s=10).stdout.decode()


@pytest.fixture(autouse=True)
def tap() -> Iterator[None]:
    """A persistent tap that is down, in a bridge, with settings of its own."""
    before = set(socket.if_nameindex())
    _ip("link", "add", _BRIDGE, "type", "bridge")
    _ip("tuntap", "add", _TAP, "mode", "tap")
    _ip("link", "set", _TAP, "mtu", "1450", "master", _BRIDGE)
    yield
    for _, name in set(socket.if_nameindex()) - before:
        _ip("link", "del", name)


def _borrow() -> OpenTap:
    return asyncio.run(taps.open_tap(TapRequest(tap=_TAP), tag="kvmsec_0badcafe", instance="web"))


def _remove(record: TapRecord) -> tuple[str, ...]:
    return asyncio.run(taps.remove_taps([record]))


def test_a_bridge_that_is_gone_keeps_nothing_else_from_being_put_back() -> None:
    before = ipv6.read(_TAP)
    opened = _borrow()
    _ip("link", "set", _TAP, "mtu", "1400")
    _ip("link", "del", _BRIDGE)
    opened.close()
    assert _remove(opened.record) == (f"{_TAP}: the bridge that it was in is gone",)
    shown = _ip("link", "show", _TAP)
    assert "mtu 1450" in shown
    assert "master" not in shown
    assert "UP" not in shown.split(">")[0].split("<")[1].split(",")
    assert ipv6.read(_TAP) == before


def test_a_tap_that_was_put_elsewhere_meanwhile_stays_there_when_its_bridge_is_gone() -> None:
    opened = _borrow()
    _ip("link", "del", _BRIDGE)
    _ip("link", "add", "brother", "type", "bridge")
    _ip("link", "set", _TAP, "master", "brother")
    opened.close()
    assert len(_remove(opened.record)) == 1
    assert "master brother" in _ip("link", "show", _TAP)


def test_a_bridge_that_became_something_else_does_not_keep_a_stop_from_finishing() -> None:
    opened = _borrow()
    index = socket.if_nametoindex(_BRIDGE)
    _ip("link", "del", _BRIDGE)
    other = tun.create("tapother", index=index)
    opened.close()
    (said,) = _remove(opened.record)
    os.close(other)
    assert said.startswith(f"{_TAP}: ") and "master" in said


def test_a_tap_that_was_renamed_is_the_admins_from_then_on() -> None:
    opened = _borrow()
    opened.close()
    _ip("link", "set", _TAP, "down")
    _ip("link", "set", _TAP, "name", "tapnewname")
    assert _remove(opened.record) == (f"{_TAP}: it is gone, and tapnewname has its index",)
    assert "tapnewname" in _ip("link", "show", "tapnewname")


def test_ipv6_settings_that_the_kernel_refuses_do_not_keep_a_stop_from_finishing(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    opened = _borrow()
    opened.close()

    def refuse(interface: str, settings: Ipv6) -> None:
        raise OSError(22, "Invalid argument")

    monkeypatch.setattr("kvmsec.node.taps.ipv6.write", refuse)
    (said,) = _remove(opened.record)
    assert "IPv6" in said and "Invalid argument" in said


def test_what_a_person_can_mend_is_still_an_error() -> None:
    opened = _borrow()
    with pytest.raises(TapsNotPutBack) as caught:
        _remove(opened.record)
    assert "end what uses" in (caught.value.hint or "")
    opened.close()
    assert _remove(opened.record) == ()
