"""Taps of this node as devices: making and taking one, names and indexes, what netlink says."""

import errno
import os
import socket
from typing import Any, Final

from kvmsec.linux import tun
from kvmsec.node import ipv6
from kvmsec.node.tap_errors import NodeDeviceMissing, TapUnusable
from kvmsec.node.tap_records import TapSettings

_TAP_TYPE: Final = 2  # IFLA_TUN_TYPE of a tap; a tun's is 1


def create(name: str) -> int | None:
    """Make a tap that goes with its descriptor; None when the name is taken. Raises TapError."""
    try:
        return tun.create(name)
    except OSError as error:
        if error.errno != errno.EBUSY:
            raise _no_tun(error) from error
        return None


def attach(name: str, index: int, features: int) -> int:
    """Take the only queue of the tap that has this name and index. Raises TapError."""
    try:
        descriptor = tun.attach(name, features)
    except OSError as error:
        if error.errno != errno.EBUSY:
            raise _no_tun(error) from error
        hint = "stop the instance or program that has it, or name another tap"
        raise TapUnusable(name, "is in use by another process", hint=hint) from error
    if index_of(name) == index:
        return descriptor
    os.close(descriptor)
    raise TapUnusable(name, "was replaced by another at this very moment", hint="try again")


def _no_tun(error: OSError) -> NodeDeviceMissing:
    hint = "load it with `modprobe tun`; making a tap needs root (CAP_NET_ADMIN)"
    return NodeDeviceMissing("/dev/net/tun", error.strerror or str(error), hint=hint)


def index_of(name: str) -> int | None:
    try:
        return socket.if_nametoindex(name)
    except OSError:
        return None


def name_of(index: int | None) -> str | None:
    try:
        return socket.if_indextoname(index) if index else None
    except OSError:
        return None


def is_tap(link: Any) -> bool:
    is_tun = link.get(("linkinfo", "kind")) == "tun"
    return bool(is_tun and link.get(("linkinfo", "data", "tun_type")) == _TAP_TYPE)


def settings_of(link: Any) -> TapSettings:
    """What is to be put back one day, of the kernel's answer about an interface."""
    return TapSettings(
        owner=link.get(("linkinfo", "data", "tun_owner")),
        group=link.get(("linkinfo", "data", "tun_group")),
        features=(0 if link.get(("linkinfo", "data", "tun_pi")) else tun.IFF_NO_PI)
        | (tun.IFF_VNET_HDR if link.get(("linkinfo", "data", "tun_vnet_hdr")) else 0),
        mac=link.get("address"),
        mtu=link.get("mtu"),
        is_up=bool(link["flags"] & 1),  # IFF_UP, netdevice(7)
        master=link.get("master"),
        ipv6=ipv6.read(link.get("ifname")),
    )
