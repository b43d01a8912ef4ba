"""Judgements about what a process can reach: namespaces, files, devices, the network (pure)."""

from collections.abc import Callable, Sequence
from typing import Final

from kvmsec.audit.facts import Facts, File
from kvmsec.audit.held import GRAVE
from kvmsec.audit.verdicts import Verdict, exposed, listed, note, sealed, unknown

_OTHERS_READ: Final = 0o004
_OTHERS_WRITE: Final = 0o002
_ONLY_LOOPBACK: Final = frozenset(("lo", "sit0", "tunl0", "ip6tnl0", "gre0", "gretap0", "erspan0"))


def namespace(kind: str) -> Callable[[Facts], Verdict]:
    """The judgement of one kind of namespace that a process should have of its own."""

    def judge(facts: Facts) -> Verdict:
        spaces = facts.namespaces
        if spaces is None:
            return unknown(facts, "namespaces")
        if kind in spaces.own:
            return sealed(f"it has a {kind} namespace of its own")
        if kind not in spaces.shared:
            return note(f"this kernel has no {kind} namespaces")
        return exposed(f"it shares the host's {kind} namespace")

    return judge


def user_namespace(facts: Facts) -> Verdict:
    spaces, who = facts.namespaces, facts.credentials
    if spaces is None or who is None:
        return unknown(facts, "namespaces", "credentials")
    if "user" in spaces.own:
        return sealed("it has a user namespace of its own: its capabilities count in there alone")
    if who.uid == 0 or any(who.capabilities[:3]) or who.capabilities[4]:
        return exposed("root, or a capability, in the host's user namespace counts on the host")
    return sealed("it shares the host's user namespace, where it has neither root nor capability")


def time_namespace(facts: Facts) -> Verdict:
    spaces = facts.namespaces
    if spaces is None:
        return unknown(facts, "namespaces")
    if "time" in spaces.shared:
        return note("it shares the host's time namespace: a clock's offset, and no boundary")
    return note("it shares no time namespace with the host")


def root_tree(facts: Facts) -> Verdict:
    tree = facts.tree
    if tree is None:
        return unknown(facts, "tree")
    if tree.kind == "host":
        return exposed("its root is the host's: every file of the host has a path for it")
    if tree.kind == "chroot":
        return exposed("its root is a directory of the host's mounts (chroot)", 0.5)
    if tree.kernel:
        return exposed(f"a tree of its own, with the kernel's files in {listed(tree.kernel)}", 0.3)
    return sealed("it has a root tree of its own, without /proc or /sys")


def writable_paths(facts: Facts) -> Verdict:
    tree = facts.tree
    if tree is None:
        return unknown(facts, "tree")
    if "/" in tree.writable:
        return exposed("it may write to all that is root's in its tree")
    if tree.writable:
        return exposed(f"it may write to {listed(tree.writable)}", 0.7)
    if tree.kind == "chroot" or tree.is_cut:
        return exposed("its tree was not searched to its end", 0.5)
    if tree.kind == "host":
        return exposed("of the host's tree, only the places that all may write to were tried", 0.5)
    if tree.sized:
        return sealed(f"it may write to {listed(tree.sized)} alone, a tmpfs of limited size")
    return sealed("it may write to no path")


def devices(facts: Facts) -> Verdict:
    tree, held = facts.tree, facts.descriptors
    if tree is None or held is None:
        return unknown(facts, "tree", "descriptors")
    reachable = list(dict.fromkeys((*held.devices, *tree.devices)))
    grave = [path for path in reachable if path.startswith(GRAVE)]
    if grave:
        return exposed(f"it may open {listed(grave)}")
    if reachable:
        return exposed(f"it may open {listed(reachable)}", 0.4)
    if tree.kind == "chroot" or tree.is_cut:
        return exposed("its tree was not searched to its end", 0.5)
    # Beyond /dev, device nodes of the host's would be its administrator's own doing.
    place = "in /dev " if tree.kind == "host" else ""
    return sealed(f"it may {place}open no device but null, random, tty, kvm and the like")


def packet_rules(facts: Facts) -> Verdict:
    found, who = facts.coverage, facts.credentials
    if facts.canary is not None:
        return _by_canary(facts)
    if "canary" in facts.unread:
        return unknown(facts, "canary")
    if found is None or who is None:
        return unknown(facts, "coverage", "credentials")
    if found.ipv4 and found.ipv6:
        return sealed(f"all that its uid sends is dropped, IPv4 and IPv6 ({listed(found.rules)})")
    missing = " and ".join(
        name for name, is_closed in (("IPv4", found.ipv4), ("IPv6", found.ipv6)) if not is_closed
    )
    uids = listed([str(uid) for uid in who.uids])
    sender = f"uid {uids} sends" if len(who.uids) == 1 else f"each of the uids {uids} sends"
    message = f"no packet rule drops what {sender} over {missing}"
    if _is_cut_off(facts):
        return exposed(f"{message}; its network namespace has no interface but lo", 0.3)
    return exposed(message, 1.0 if not (found.ipv4 or found.ipv6) else 0.6)


def _is_cut_off(facts: Facts) -> bool:
    """Whether its own network namespace leads nowhere."""
    interfaces = facts.namespaces.interfaces if facts.namespaces else None
    return interfaces is not None and set(interfaces) <= _ONLY_LOOPBACK


def _by_canary(facts: Facts) -> Verdict:
    canary = facts.canary
    assert canary is not None
    if canary.sent:
        part = 0.3 if _is_cut_off(facts) else 1.0
        return exposed(f"tried as its uid: {listed(canary.sent)}", part)
    if not canary.refused:
        return exposed("tried as its uid: this host has neither IPv4 nor IPv6 to try")
    return sealed(f"tried as its uid and refused: {len(canary.refused)} packets")


def inet_sockets(facts: Facts) -> Verdict:
    held = facts.sockets
    if held is None:
        return unknown(facts, "sockets")
    if held.of_host:
        return exposed(f"it holds sockets in the host's network: {listed(held.of_host)}")
    if held.unplaced:
        message = f"it holds {held.unplaced} sockets of neither its own nor the host's network"
        return exposed(f"{message} (vsock, or another namespace)", 0.5)
    return sealed("it holds no socket of the host's network but unix sockets")


def tcp_listeners(facts: Facts) -> Verdict:
    held = facts.sockets
    if held is None:
        return unknown(facts, "sockets")
    if not held.tcp_listeners:
        return sealed("it listens on no TCP port")
    asked = facts.arguments.exposed if facts.arguments else ()
    by = f" ({listed(asked)})" if asked else ""
    message = f"it listens on {listed(held.tcp_listeners)}{by}"
    is_local = all(" 127." in one or " [::1]" in one for one in held.tcp_listeners)
    return exposed(message, 0.6 if is_local else 1.0)


def unix_listeners(facts: Facts) -> Verdict:
    held = facts.sockets
    if held is None:
        return unknown(facts, "sockets")
    open_ones = [one.path for one in held.unix_listeners if one.is_open]
    if open_ones:
        return exposed(f"every user of the host may connect to {listed(open_ones)}")
    lost = [one.path for one in held.unix_listeners if one.is_open is None]
    if lost:
        return Verdict(1, "unknown", f"the file of {listed(lost)} was not found")
    if not held.unix_listeners:
        return sealed("it listens on no unix socket")
    return sealed(f"{len(held.unix_listeners)} unix sockets that not everybody may connect to")


def disk_paths(facts: Facts) -> Verdict:
    held = facts.descriptors
    if held is None:
        return unknown(facts, "descriptors")
    written = [file for file in held.files if file.is_written and file.is_reachable]
    if wide := _with_mode(written, _OTHERS_WRITE):
        return exposed(f"every user of the host may write to {listed(wide)}")
    if wide := _with_mode(written, _OTHERS_READ):
        return exposed(f"every user of the host may read {listed(wide)}", 0.5)
    return sealed("no file that it writes to is open to all users of the host")


def _with_mode(files: Sequence[File], bit: int) -> list[str]:
    """Each once, however many descriptors QEMU has of it."""
    return list(dict.fromkeys(file.path for file in files if file.mode & bit))
