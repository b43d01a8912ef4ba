"""A guest's packets pass where its own uid's are refused, and taps end with their instance."""

import json
import os
import select
import signal
import socket
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from kvmsec.node.tap_errors import BridgeUnusable, TapError, TapUnusable
from tests.kvm.wire import (
    BRIDGE,
    DEADLINE_S,
    GUEST,
    NODE,
    PEER,
    Line,
    Wire,
    ip,
    laid_wire,
    send_as,
)

pytestmark = pytest.mark.kvm

LINUX = Path(__file__).parents[2] / "vm-images" / "linux"
TAP = "taplab"


@pytest.fixture
def wire() -> Iterator[Wire]:
    with laid_wire() as laid:
        yield laid


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
