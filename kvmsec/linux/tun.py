"""Taps through /dev/net/tun (Documentation/networking/tuntap.rst, linux/if_tun.h).

Whoever holds a tap's descriptor may change much of it without any capability: whether it outlives
the descriptor, its owner, its MAC, its filters. `reset` and `own` put that back.
"""

import contextlib
import fcntl
import os
import struct
from typing import Final

_DEVICE: Final = "/dev/net/tun"
_TUNSETIFF: Final = 0x400454CA
_TUNSETPERSIST: Final = 0x400454CB
_TUNSETOWNER: Final = 0x400454CC
_TUNSETGROUP: Final = 0x400454CE
_TUNSETOFFLOAD: Final = 0x400454D0
_TUNSETTXFILTER: Final = 0x400454D1
_TUNSETSNDBUF: Final = 0x400454D4
_TUNDETACHFILTER: Final = 0x401054D6
_TUNSETVNETHDRSZ: Final = 0x400454D8
_TUNSETIFINDEX: Final = 0x400454DA
_TUNSETVNETLE: Final = 0x400454DC

IFF_TAP: Final = 0x0002
IFF_NO_PI: Final = 0x1000
IFF_VNET_HDR: Final = 0x4000
_IFF_TUN_EXCL: Final = 0x8000

FEATURES: Final = IFF_NO_PI | IFF_VNET_HDR
_VNET_HEADER_BYTES: Final = 10  # struct virtio_net_hdr, what a new tap has
_SEND_BUFFER_BYTES: Final = 2**31 - 1
_FRAME_BYTES: Final = 65536 + _VNET_HEADER_BYTES
_MOST_FRAMES: Final = 4096  # Several queues' worth (1000 frames): a busy bridge never ends.


def create(name: str, *, index: int | None = None) -> int:
    """Make a tap that vanishes with its last descriptor, and return that, close-on-exec.

    `index` asks for an interface index. It belongs to root from the start on: while nobody else
    can attach (there is one queue, and it is taken). Raises OSError, EBUSY if the name is taken.
    """
    descriptor = os.open(_DEVICE, os.O_RDWR | os.O_CLOEXEC)
    try:
        if index is not None:
            fcntl.ioctl(descriptor, _TUNSETIFINDEX, struct.pack("I", index))
        _set_interface(descriptor, name, FEATURES | _IFF_TUN_EXCL)
        own(descriptor, 0, 0)
    except BaseException:
        os.close(descriptor)
        raise
    return descriptor


def attach(name: str, features: int = FEATURES) -> int:
    """Take the only queue of a tap that exists, and return its descriptor, close-on-exec.

    Raises OSError: EBUSY when somebody holds it, EINVAL when it has several queues or is no tap.
    A name that doesn't exist makes a tap (TUNSETIFF has no way to say no), which vanishes when
    the descriptor is closed: compare the interface's index with the one that was meant.
    """
    descriptor = os.open(_DEVICE, os.O_RDWR | os.O_CLOEXEC)
    try:
        _set_interface(descriptor, name, features)
    except BaseException:
        os.close(descriptor)
        raise
    return descriptor


def _set_interface(descriptor: int, name: str, flags: int) -> None:
    request = struct.pack("16sH22x", name.encode(), IFF_TAP | flags)
    fcntl.ioctl(descriptor, _TUNSETIFF, request)


def own(descriptor: int, uid: int | None, gid: int | None) -> None:
    """Set who may attach to a tap besides root; None leaves it (there is no way back to nobody)."""
    if uid is not None:
        fcntl.ioctl(descriptor, _TUNSETOWNER, uid)
    if gid is not None:
        fcntl.ioctl(descriptor, _TUNSETGROUP, gid)


def persist(descriptor: int, is_persistent: bool) -> None:
    """Set whether a tap outlives its last descriptor."""
    fcntl.ioctl(descriptor, _TUNSETPERSIST, int(is_persistent))


def reset(descriptor: int) -> None:
    """Undo what a former holder may have left on the device: filters, offloads, buffer, header."""
    fcntl.ioctl(descriptor, _TUNDETACHFILTER, bytes(16))
    fcntl.ioctl(descriptor, _TUNSETTXFILTER, struct.pack("HH", 0, 0))
    fcntl.ioctl(descriptor, _TUNSETOFFLOAD, 0)
    fcntl.ioctl(descriptor, _TUNSETSNDBUF, struct.pack("i", _SEND_BUFFER_BYTES))
    fcntl.ioctl(descriptor, _TUNSETVNETHDRSZ, struct.pack("i", _VNET_HEADER_BYTES))
    fcntl.ioctl(descriptor, _TUNSETVNETLE, struct.pack("i", 0))


def discard_frames(descriptor: int) -> None:
    """Throw away what the node has queued for a tap's holder; reads never block from then on."""
    os.set_blocking(descriptor, False)
    with contextlib.suppress(BlockingIOError):
        for _ in range(_MOST_FRAMES):
            os.read(descriptor, _FRAME_BYTES)
