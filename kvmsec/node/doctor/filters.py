"""Packet filters, the rules in force, and what guests' own networks are made of."""

import fcntl
import os
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Final

from firewall.backend import BACKENDS, BackendName, make_backend
from firewall.errors import BackendUnavailable
from kvmsec.linux import namespaces, syscalls
from kvmsec.node.doctor.subject import Answer, Subject, error, ok, warning
from uidpool.snapshot import find_account

_TUN: Final = Path("/dev/net/tun")
_VHOST_NET: Final = Path("/dev/vhost-net")
_ADD_BRIDGE: Final = 0x89A0  # SIOCBRADDBR, linux/sockios.h
_INSTALL: Final = "apt install nftables libnftables1 iptables"


def check_backends(subject: Subject) -> Iterator[Answer]:
    """Which can serve this kernel, tried in a network namespace of the check's own."""
    setting = subject.config.firewall.backend if subject.config else "auto"
    syscalls.unshare(namespaces.CLONE_NEWNET)
    refusals: dict[BackendName, BackendUnavailable] = {}
    for name in BACKENDS:
        try:
            make_backend(name, subject.paths.tag).require_available()
        except BackendUnavailable as failure:
            refusals[name] = failure
    served = [name for name in BACKENDS if name not in refusals]
    if not served:
        reasons = "; ".join(f"{name}: {refusal.reason}" for name, refusal in refusals.items())
        yield error(f"no packet filter works, so no instance may start: {reasons}", _INSTALL)
    elif setting != "auto" and setting in refusals:
        hint = f"{refusals[setting].hint}; or set firewall.backend in {subject.paths.config}"
        yield error(f"the configuration wants {setting}: {refusals[setting].reason}", hint)
    else:
        serving = served[0] if setting == "auto" else setting
        yield ok(f"{serving} serves (set: {setting}); works here: {', '.join(served)}")
    if served:
        for name, refusal in refusals.items():
            yield ok(f"{name} does not work here: {refusal.reason}")


def check_rules(subject: Subject) -> Iterator[Answer]:
    """What the kernel holds against what it must hold, and a packet that must be refused."""
    if subject.config is None:
        yield warning("not compared: the configuration can't be read", "mend it first")
        return
    rules = subject.host.rules
    policy = rules.policy()
    if not policy.uids:
        yield ok("none are needed: there is no uid pool and no instance under `user`")
        return
    uid = policy.uids[0][0]
    account = find_account(uid)
    canary = (uid, account.gid) if account else None
    findings = rules.firewall.verify(policy, canary=canary)
    for finding in findings:
        yield error(finding.message, finding.hint)
    if not findings:
        count = sum(last - first + 1 for first, last in policy.uids)
        backend = rules.firewall.backend.name
        yield ok(f"in force for {count} uids by {backend}, proved by a packet as uid {uid}")


def check_tun(subject: Subject) -> Iterator[Answer]:
    yield _check_device(_TUN, "instances can have no network card", "modprobe tun")


def check_vhost_net(subject: Subject) -> Iterator[Answer]:
    yield _check_device(_VHOST_NET, "network cards can't have vhost", "modprobe vhost_net")


def _check_device(path: Path, without: str, hint: str) -> Answer:
    try:
        os.close(os.open(path, os.O_RDWR | os.O_CLOEXEC))
    except OSError as failure:
        return warning(f"{path}: {failure.strerror}; {without}", hint)
    return ok(f"{path} can be opened")


def check_bridge(subject: Subject) -> Iterator[Answer]:
    """A bridge is made in a network namespace of the check's own, and ends with it."""
    syscalls.unshare(namespaces.CLONE_NEWNET)
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as any_socket:
        try:
            fcntl.ioctl(any_socket, _ADD_BRIDGE, b"kvmsec-trial\0\0\0\0")
        except OSError as failure:
            found = f"none can be made ({failure.strerror}); `--nic bridge=` needs one"
            yield warning(found, "modprobe bridge")
            return
    yield ok("can be made")
