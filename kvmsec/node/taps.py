"""Taps of instances: made for a bridge, or borrowed from the admin; taken back at the end.

A tap of our own vanishes with its last descriptor, so that a launcher killed before QEMU has it
leaves none. Its holder can undo that (TUNSETPERSIST needs no capability), so each is looked for
at the end all the same. Its name says which root of kvmsec on this host it belongs to from its
first moment on, its alias (`ip link`) says whose it is to people.

pyroute2 is imported where it is needed: its import takes 150 ms, and most commands, stops among
them, find nothing that needs it.
"""

import errno
import hashlib
import os
import secrets
import socket
from collections.abc import Callable, Collection
from contextlib import ExitStack
from typing import TYPE_CHECKING, Any, Final

from kvmsec.linux import tun
from kvmsec.linux.processes import boot_id
from kvmsec.node import ipv6
from kvmsec.node.tap_devices import attach, create, index_of, is_tap, name_of, settings_of
from kvmsec.node.tap_errors import (
    BridgeUnusable,
    NodeDeviceMissing,
    TapError,
    TapsNotPutBack,
    TapUnusable,
)
from kvmsec.node.tap_records import OpenTap, TapRecord, TapRequest, TapSettings

if TYPE_CHECKING:
    from pyroute2 import AsyncIPRoute  # type: ignore[import-untyped]

__all__ = ["OpenTap", "TapRecord", "TapRequest", "leaked_taps", "open_tap", "remove_taps"]

_PREFIX: Final = "kvms"
_VHOST: Final = "/dev/vhost-net"
_TAP_TYPE: Final = 2  # IFLA_TUN_TYPE of a tap; a tun's is 1
_NAME_TRIES: Final = 16


def _forget(record: TapRecord) -> None:
    """For a caller that keeps no record before the tap is ready."""


async def open_tap(
    request: TapRequest,
    *,
    tag: str,
    instance: str,
    remember: Callable[[TapRecord], None] = _forget,
) -> OpenTap:
    """Make or borrow a tap for an instance of the root that goes by `tag`, with IPv6 off, and up.

    `remember` gets the record before anything is done that would outlive the caller: before a
    borrowed tap is changed, and before a new one joins its bridge. What was half made is undone.
    Raises TapError and OSError, and what `remember` raises.
    """
    from pyroute2 import AsyncIPRoute

    with ExitStack() as undo:
        vhost = _open_vhost() if request.vhost else None
        if vhost is not None:
            undo.callback(os.close, vhost)
        async with AsyncIPRoute() as netlink:
            if request.bridge is not None:
                alias = f"{_alias_of(tag)}{instance}"
                opened = await _make(netlink, request.bridge, tag, alias, remember)
            else:
                assert request.tap is not None
                opened = await _borrow(netlink, request.tap, remember)
        undo.pop_all()
    return OpenTap(opened[0], vhost, opened[1])


def _open_vhost() -> int:
    try:
        return os.open(_VHOST, os.O_RDWR | os.O_CLOEXEC)
    except OSError as error:
        hint = "load it with `modprobe vhost_net`, or take vhost out of the NIC"
        raise NodeDeviceMissing(_VHOST, error.strerror or str(error), hint=hint) from error


async def _make(
    netlink: "AsyncIPRoute",
    bridge: str,
    tag: str,
    alias: str,
    remember: Callable[[TapRecord], None],
) -> tuple[int, TapRecord]:
    link = await _find_bridge(netlink, bridge)
    name, descriptor = _create(tag)
    try:
        ipv6.turn_off(name)
        record = TapRecord(name, socket.if_nametoindex(name), made=True, bridge=bridge)
        remember(record)
        # One message, handled in this order. The bridge takes the lowest MAC and MTU of its ports
        # for its own: ours must be neither.
        await _set(
            netlink,
            record,
            address=_high_mac(),
            mtu=link.get("mtu"),
            ifalias=alias,
            master=link["index"],
            state="up",
        )
    except BaseException:
        os.close(descriptor)
        raise
    return descriptor, record


async def _find_bridge(netlink: "AsyncIPRoute", name: str) -> Any:
    link = await _find(netlink, name)
    if link is None:
        hint = f"make it with `ip link add {name} type bridge`, or name another with bridge="
        raise BridgeUnusable(name, "does not exist", hint=hint)
    if (kind := link.get(("linkinfo", "kind"))) != "bridge":
        hint = "name a Linux bridge; for any other kind, make a tap yourself and name it with tap="
        raise BridgeUnusable(name, f"is no bridge but {_article(kind)}", hint=hint)
    return link


def _article(kind: str | None) -> str:
    return f"an interface of kind {kind}" if kind else "a plain interface"


def _create(tag: str) -> tuple[str, int]:
    for _ in range(_NAME_TRIES):
        name = f"{_name_start(tag)}{secrets.token_hex(3)[:5]}"
        if (descriptor := create(name)) is not None:
            return name, descriptor
    raise TapUnusable(name, "could not be made: every name that was tried is taken")


def _name_start(tag: str) -> str:
    """`kvms` and 6 hex digits for the root; 5 random ones fill the 15 bytes of a name."""
    return f"{_PREFIX}{hashlib.sha256(tag.encode()).hexdigest()[:6]}"


def _alias_of(tag: str) -> str:
    return f"kvmsec:{tag}:"


def _high_mac() -> str:
    """A random locally administered MAC that is above those of real cards."""
    return ":".join(f"{byte:02x}" for byte in (0xFE, *secrets.token_bytes(5)))


async def _borrow(
    netlink: "AsyncIPRoute", name: str, remember: Callable[[TapRecord], None]
) -> tuple[int, TapRecord]:
    link = await _find_tap(netlink, name)
    record = TapRecord(name, link["index"], made=False, former=settings_of(link))
    descriptor = attach(name, record.ifindex, tun.FEATURES)
    try:
        remember(record)
        tun.reset(descriptor)
        ipv6.turn_off(name)
        # To attach gave it a carrier: the node may have greeted its neighbours over it by then.
        tun.discard_frames(descriptor)
        await _set(netlink, record, state="up")
    except BaseException:
        os.close(descriptor)
        await _give_back(netlink, record)
        raise
    return descriptor, record


async def _find_tap(netlink: "AsyncIPRoute", name: str) -> Any:
    link = await _find(netlink, name)
    if link is None:
        hint = f"make it with `ip tuntap add {name} mode tap`, or name a bridge with bridge="
        raise TapUnusable(name, "does not exist", hint=hint)
    if not is_tap(link):
        hint = "name a tap with tap=, or a bridge with bridge="
        kind = link.get(("linkinfo", "kind"))
        what = "a tun, which carries no Ethernet" if kind == "tun" else _article(kind)
        raise TapUnusable(name, f"is no tap but {what}", hint=hint)
    if link.get(("linkinfo", "data", "tun_multi_queue")):
        hint = "make it again without multi_queue: anyone could attach to its other queues"
        raise TapUnusable(name, "has several queues", hint=hint)
    if addresses := ipv6.own_addresses(name):
        hint = "take them off it: IPv6 is turned off on a tap while an instance has it"
        raise TapUnusable(name, f"has IPv6 addresses ({', '.join(addresses)})", hint=hint)
    return link


async def remove_taps(records: Collection[TapRecord]) -> tuple[str, ...]:
    """Delete what was made and put back what was borrowed; safe to repeat.

    An interface is found again by index and name together, on the boot of its record: one that
    merely reused either is left alone. To be called once nobody needs the descriptors: a tap of
    our own goes even from under a holder, a borrowed one that is still held can't be put back.

    Returns, in words, what of the borrowed ones can't be put back by anybody, such as their place
    in a bridge that is gone: no later try would do better. Raises TapsNotPutBack, after trying all
    of them, for what one would.
    """
    due = [record for record in records if record.boot == boot_id() and _is_due(record)]
    if not due:
        return ()
    from pyroute2 import AsyncIPRoute, NetlinkError

    lost: list[str] = []
    problems = []
    async with AsyncIPRoute() as netlink:
        for record in due:
            try:
                if record.made:
                    await _delete(netlink, record)
                else:
                    lost += [f"{record.name}: {what}" for what in await _give_back(netlink, record)]
            except (TapError, OSError, NetlinkError) as error:
                problems.append(f"{record.name}: {error}")
    if problems:
        raise TapsNotPutBack(problems)
    return tuple(lost)


def _is_due(record: TapRecord) -> bool:
    """Whether there is something to do: a borrowed tap that is gone is to be made again."""
    found = index_of(record.name)
    return found == record.ifindex or (found is None and not record.made)


async def _delete(netlink: "AsyncIPRoute", record: TapRecord) -> None:
    link = await _find(netlink, record.name)
    if link is None or link["index"] != record.ifindex or not is_tap(link):
        return
    from pyroute2 import NetlinkError

    try:
        await netlink.link("del", index=record.ifindex)
    except NetlinkError as error:
        if error.code != errno.ENODEV:
            raise


async def _give_back(netlink: "AsyncIPRoute", record: TapRecord) -> list[str]:
    """Put a borrowed tap back as it was; returns what can't be."""
    former = record.former
    if former is None:
        return []
    if index_of(record.name) is None:
        if (other := name_of(record.ifindex)) is not None:
            return [f"it is gone, and {other} has its index"]
        # Its holder made it vanish with the last descriptor: the same one, made again.
        descriptor = tun.create(record.name, index=record.ifindex)
        tun.persist(descriptor, True)
        os.close(descriptor)
    # To attach is the only way to set the features.
    descriptor = attach(record.name, record.ifindex, former.features)
    try:
        lost = await _put_back(netlink, record, former, descriptor)
    finally:
        os.close(descriptor)
    # Only now, without a carrier: nobody is left to be greeted.
    if former.ipv6 is not None:
        try:
            ipv6.write(record.name, former.ipv6)
        except OSError as error:
            lost.append(f"its IPv6 settings could not be set: {error.strerror}")
    return lost


async def _put_back(
    netlink: "AsyncIPRoute", record: TapRecord, former: TapSettings, descriptor: int
) -> list[str]:
    """Set a borrowed tap to what it was, as far as it differs and as far as it can be."""
    link = await _find(netlink, record.name)
    if link is None:
        raise TapUnusable(record.name, "is gone")
    now = settings_of(link)
    tun.persist(descriptor, True)
    lost = _reclaim(descriptor, former, now)
    changes: dict[str, Any] = {
        "address": former.mac if now.mac != former.mac else None,
        "mtu": former.mtu if now.mtu != former.mtu else None,
        "master": (former.master or 0) if now.master != former.master else None,
        "state": ("up" if former.is_up else "down") if now.is_up != former.is_up else None,
    }
    if changes["master"] and name_of(changes["master"]) is None:
        lost.append("the bridge that it was in is gone")
        del changes["master"]
    for what, value in changes.items():
        if value is None:
            continue
        try:
            # One at a time: what the kernel refuses must not hold up the others.
            await _set(netlink, record, **{what: value})
        except TapUnusable as error:
            lost.append(error.problem)
    return lost


def _reclaim(descriptor: int, former: TapSettings, now: TapSettings) -> list[str]:
    """Undo what only a holder can set.

    There is no way to make a tap nobody's again: one that was given an owner meanwhile is root's
    from then on.
    """
    try:
        tun.reset(descriptor)
        tun.own(
            descriptor,
            0 if former.owner is None and now.owner is not None else former.owner,
            0 if former.group is None and now.group is not None else former.group,
        )
    except OSError as error:
        return [f"its owner and filters could not be set: {error.strerror}"]
    return []


def has_taps(tag: str) -> bool:
    """Whether any interface of this host has a name that this root's taps have."""
    return any(name.startswith(_name_start(tag)) for _, name in socket.if_nameindex())


async def leaked_taps(known: Collection[TapRecord], *, tag: str) -> list[TapRecord]:
    """Taps that this root's instances left behind: no record knows them and nobody holds them.

    A tap that is just being made is held by its launcher. Where no interface has a name of this
    root's, the usual case, nothing is opened or imported. Raises OSError.
    """
    records = {(record.name, record.ifindex) for record in known}
    suspects = [
        (name, index)
        for index, name in socket.if_nameindex()
        if name.startswith(_name_start(tag)) and (name, index) not in records
    ]
    if not suspects:
        return []
    from pyroute2 import AsyncIPRoute

    found = []
    async with AsyncIPRoute() as netlink:
        for name, index in suspects:
            link = await _find(netlink, name)
            if link is None or not is_tap(link):
                continue
            if (link.get("ifalias") or "").startswith(_alias_of(tag)) and _is_free(name, index):
                found.append(TapRecord(name, index, made=True, bridge=name_of(link.get("master"))))
    return found


def _is_free(name: str, index: int) -> bool:
    """Whether nobody holds a tap: the only proof is to hold it oneself for a moment."""
    try:
        os.close(attach(name, index, tun.FEATURES))
    except TapError:
        return False
    return True


async def _find(netlink: "AsyncIPRoute", name: str) -> Any:
    """What the kernel says of an interface; None when there is none of this name."""
    from pyroute2 import NetlinkError

    try:
        return (await netlink.link("get", ifname=name))[0]
    except NetlinkError as error:
        if error.code != errno.ENODEV:
            raise TapUnusable(name, f"can't be looked at: {os.strerror(error.code)}") from error
        return None


async def _set(netlink: "AsyncIPRoute", record: TapRecord, **changes: Any) -> None:
    from pyroute2 import NetlinkError

    try:
        await netlink.link("set", index=record.ifindex, **changes)
    except NetlinkError as error:
        what = f"could not be set ({', '.join(changes)}): {os.strerror(error.code)}"
        raise TapUnusable(record.name, what) from error
