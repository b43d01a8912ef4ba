"""Which control group hierarchies this host has mounted, and what each has to give."""

from collections.abc import Collection, Iterable

from attrs import frozen

from kvmsec.linux.mounts import Mount as AnyMount
from kvmsec.linux.mounts import read_mounts


@frozen
class Mount:
    """One mounted hierarchy: version 1 or 2, and the controllers it has to give."""

    path: str
    version: int
    controllers: frozenset[str]

    def offers(self, controllers: Iterable[str]) -> frozenset[str]:
        """Those of `controllers` that it has; what is `io` is called `blkio` in version 1."""
        own = {"io": "blkio"} if self.version == 1 else {}
        return frozenset(name for name in controllers if own.get(name, name) in self.controllers)


def lines_of(path: str) -> list[str]:
    """The lines of a file of the kernel's; none where there is no such file."""
    try:
        with open(path, "rb", buffering=0) as file:
            return file.readall().decode(errors="replace").splitlines()
    except OSError:
        return []


def mounted() -> list[Mount]:
    """The hierarchies that can be written to, each once however often it is mounted."""
    known = {line.split("\t")[0] for line in lines_of("/proc/cgroups")}
    try:
        return choose(read_mounts(), known)
    except OSError:
        return []


def choose(mounts: Iterable[AnyMount], known: Collection[str]) -> list[Mount]:
    """The hierarchies among all mounts; `known` names every controller.

    A version 1 mount names its controllers among its options, version 2 in a file at its root.
    """
    found: dict[str, Mount] = {}
    for mount in mounts:
        is_writable = "rw" in mount.options and "rw" in mount.super_options
        if not is_writable or mount.device in found:
            continue
        if mount.kind == "cgroup2":
            offered = " ".join(lines_of(f"{mount.path}/cgroup.controllers")).split()
            found[mount.device] = Mount(mount.path, 2, frozenset(offered))
        elif mount.kind == "cgroup":
            found[mount.device] = Mount(mount.path, 1, mount.super_options & frozenset(known))
    return list(found.values())
