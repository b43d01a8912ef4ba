"""What a demo could leave behind on a host, read before and after it."""

import contextlib
import os
import re
import shutil
import subprocess
from collections.abc import Container, Iterator
from pathlib import Path
from typing import ClassVar, Final, Self

from attrs import frozen

from kvmsec.linux import processes
from kvmsec.paths import Paths

HOST_DIRECTORIES: Final = (Path("/run/kvmsec"), Path("/var/lib/kvmsec"))
_ACCOUNTS: Final = ("passwd", "group", "shadow", "gshadow", "subuid", "subgid")
_LISTINGS: Final = (
    ("nft", "-s", "list", "ruleset"),
    ("iptables-legacy-save",),
    ("ip6tables-legacy-save",),
)
_EMPTY: Final = re.compile(r"#.*|\*\w+|COMMIT|:\w+ ACCEPT \[\d+:\d+\]|")


@frozen
class HostState:
    """Users, rules, files, processes, mounts, control groups and interfaces, a line for each."""

    users: frozenset[str]
    rules: frozenset[str]
    files: frozenset[str]
    processes: frozenset[str]
    mounts: frozenset[str]
    cgroups: frozenset[str]
    interfaces: frozenset[str]

    ASPECTS: ClassVar = (
        *("users", "rules", "files", "processes", "mounts", "cgroups", "interfaces"),
    )

    @classmethod
    def read(cls, root: Path, uids: Container[int] = ()) -> Self:
        """Look at the host; processes and control groups are those of this root and these uids."""
        tag = Paths(root).tag
        return cls(
            users=frozenset(_users()),
            rules=frozenset(_rules()),
            files=frozenset(_files(uids)),
            processes=frozenset(_processes(root, tag, uids)),
            mounts=frozenset(_mounts()),
            cgroups=frozenset(_cgroups(tag)),
            interfaces=frozenset(os.listdir("/sys/class/net")),
        )

    def differences(self, later: Self) -> list[str]:
        """A line for whatever has come or gone since."""
        found = []
        for aspect in self.ASPECTS:
            before, after = getattr(self, aspect), getattr(later, aspect)
            found += [f"{aspect}: new: {line}" for line in sorted(after - before)]
            found += [f"{aspect}: gone: {line}" for line in sorted(before - after)]
        return found


def remove_host_directories(before: HostState) -> None:
    """Remove the directories that all roots of a host share, if they are new and nobody's."""
    for directory in HOST_DIRECTORIES:
        if str(directory) in before.files or not directory.exists():
            continue
        kept = [path for path in directory.rglob("*") if path.is_file() and path.stat().st_size]
        if not kept:
            shutil.rmtree(directory)


def _users() -> Iterator[str]:
    for name in _ACCOUNTS:
        with contextlib.suppress(FileNotFoundError):
            for line in Path("/etc", name).read_text(errors="replace").splitlines():
                # Not what stands after the name in shadow: a demo shows nobody's password.
                yield f"{name}: {line.split(':')[0] if 'shadow' in name else line}"


def _rules() -> Iterator[str]:
    """Every rule of the host, without counters; a table that holds nothing is none."""
    for argv in _LISTINGS:
        program = shutil.which(argv[0], path="/usr/sbin:/sbin:/usr/bin:/bin")
        if program is None:
            continue
        told = subprocess.run([program, *argv[1:]], capture_output=True, text=True, check=False)
        rules = [line for line in told.stdout.splitlines() if not _EMPTY.fullmatch(line)]
        yield from (f"{argv[0]} {number}: {line}" for number, line in enumerate(rules))


def _files(uids: Container[int]) -> Iterator[str]:
    """All of them, but for what is kept of other uids: that comes and goes with other roots."""
    for directory in HOST_DIRECTORIES:
        if directory.exists():
            for path in (directory, *directory.rglob("*")):
                uid = path.name.partition(".")[0]
                if not uid.isdecimal() or int(uid) in uids:
                    yield str(path)


def _processes(root: Path, tag: str, uids: Container[int]) -> Iterator[str]:
    """What runs for this root: other programs of the host come and go meanwhile.

    What has ended is none, though nobody collects it: in a container its first process may not.
    """
    place = f"KVMSEC_ROOT={root}".encode()
    for pid in processes.pids():
        entry, status = Path(f"/proc/{pid}"), processes.read_status(pid)
        if status is None or status.is_zombie:
            continue
        with contextlib.suppress(OSError):
            is_ours = (
                entry.stat().st_uid in uids
                or tag in (entry / "cgroup").read_text()
                or place in (entry / "environ").read_bytes()
            )
            if is_ours:
                yield f"{pid} {status.name}"


def _mounts() -> Iterator[str]:
    for line in Path("/proc/self/mountinfo").read_text().splitlines():
        fields = line.split()
        yield f"{fields[4]} ({fields[fields.index('-') + 1]})"


def _cgroups(tag: str) -> Iterator[str]:
    for pattern in (f"kvmsec/{tag}/**/", f"*/kvmsec/{tag}/**/"):
        yield from map(str, Path("/sys/fs/cgroup").glob(pattern))
