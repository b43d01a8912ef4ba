"""Which control group hierarchies this host has mounted, and what each has to give."""

import re
from collections.abc import Collection
from pathlib import Path
from typing import Final

from attrs import frozen

_OCTAL: Final = re.compile(r"\\([0-7]{3})")


@frozen
class Mount:
    """One mounted hierarchy: version 1 or 2, and the controllers it has to give."""

    path: str
    version: int
    controllers: frozenset[str]


def lines_of(path: str) -> list[str]:
    """The lines of a file of the kernel's; none where there is no such file."""
    try:
        return Path(path).read_text(errors="replace").splitlines()
    except OSError:
        return []


def mounted() -> list[Mount]:
    """The hierarchies that can be written to, each once however often it is mounted."""
    known = {line.split("\t")[0] for line in lines_of("/proc/cgroups")}
    return parse(lines_of("/proc/self/mountinfo"), known)


def parse(mountinfo: Collection[str], known: Collection[str]) -> list[Mount]:
    """Read the lines of a mountinfo (proc_pid_mountinfo(5)); `known` names all controllers.

    A version 1 mount names its controllers among its options, version 2 in a file at its root.
    """
    found: dict[str, Mount] = {}
    for line in mountinfo:
        mount, _, filesystem = line.partition(" - ")
        _, _, device, _, raw_path, options = mount.split(" ")[:6]
        kind, _, super_options = filesystem.split(" ")[:3]
        is_writable = "rw" in options.split(",") and "rw" in super_options.split(",")
        if kind not in ("cgroup", "cgroup2") or not is_writable or device in found:
            continue
        path = _OCTAL.sub(lambda match: chr(int(match[1], 8)), raw_path)
        if kind == "cgroup2":
            offered = " ".join(lines_of(f"{path}/cgroup.controllers")).split()
            found[device] = Mount(path, 2, frozenset(offered))
        else:
            offered = super_options.split(",")
            found[device] = Mount(path, 1, frozenset(offered) & frozenset(known))
    return list(found.values())
