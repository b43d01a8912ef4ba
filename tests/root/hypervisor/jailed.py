"""Plain programs in a jail, and how they are looked at from outside."""

import os
import select
import subprocess
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

import pytest

from hypervisor import process
from hypervisor.closure import Binds, Closure
from hypervisor.errors import JailFailed
from hypervisor.identity import FileIdentity
from hypervisor.jail import Jail
from hypervisor.tree import Trees
from kvmsec.linux import namespaces, syscalls
from kvmsec.linux.credentials import Credentials

SOMEBODY = Credentials(239001, 239002)
ROOT = Credentials(0, 0)
DEADLINE_S = 10.0
PROGRAMS = ("/bin/sh", "/bin/sleep", "/usr/bin/env", "/bin/true", "/bin/ls", "/bin/cat")
ADMINS = ("/bin/mount", "/bin/mknod", "/bin/chown", "/bin/mkdir", "/bin/touch", "/bin/ln")

Build = Callable[..., Jail]


@cache
def binds_of(*programs: str) -> Binds:
    """The programs and their libraries, under the names that they are asked for by."""
    files = dict.fromkeys(programs)
    for program in programs:
        told = subprocess.run(["ldd", program], capture_output=True, text=True, check=True)
        files |= dict.fromkeys(word for word in told.stdout.split() if word.startswith("/"))
    return tuple((os.path.realpath(file), file) for file in files)


def closure_of(binds: Binds) -> Closure:
    """As `find_closure` has it: of these files, as they are now."""
    there = [source for source, _ in binds if os.path.exists(source)]
    return Closure("", binds, tuple(map(FileIdentity.of, there)))


@pytest.fixture
def build(tmp_path: Path) -> Iterator[Build]:
    for name in ("place", "output"):
        (tmp_path / name).mkdir(exist_ok=True)
    opened: list[int] = []
    trees = Trees(str(tmp_path / "place"))

    def build_jail(
        who: Credentials = SOMEBODY,
        binds: Binds | None = None,
        tree: int | None = None,
        **more: Any,
    ) -> Jail:
        if tree is None:
            tree = trees.take(closure_of(binds_of(*PROGRAMS) if binds is None else binds))
            opened.append(tree)
        owned = f"size=64k,mode=0700,uid={who.uid},gid={who.gid}"
        namespaces.mount("output", str(tmp_path / "output"), "tmpfs", 0, owned)
        flags = os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC
        log = os.open(tmp_path / "output" / "log", flags, 0o600)
        opened.extend([log, syscalls.detached_copy(str(tmp_path / "output"))])
        # Scripts start programs, which the filter lets nobody do.
        wanted: dict[str, Any] = {"system_calls": None, **more}
        return Jail(
            name="inside",
            credentials=who,
            tree=tree,
            output=opened[-1],
            log=log,
            **wanted,
        )

    yield build_jail
    trees.close()
    for descriptor in opened:
        os.close(descriptor)
    while os.path.ismount(tmp_path / "output"):
        namespaces.umount(str(tmp_path / "output"), namespaces.MNT_DETACH)


def held_by(jail: Jail) -> list[int]:
    """What a process needs to start a program in it."""
    return [jail.tree, jail.output, jail.log]


@pytest.fixture
def the_launcher_is_as_before() -> Iterator[None]:
    def look() -> Any:
        kinds = ("mnt", "net", "ipc", "uts", "pid", "pid_for_children", "cgroup")
        namespaces_ = [os.readlink(f"/proc/self/ns/{kind}") for kind in kinds]
        return set(os.listdir("/proc/self/fd")), namespaces_, os.uname().nodename

    before, mounts = look(), Path("/proc/self/mountinfo").read_text().count("\n")
    yield
    assert look()[1:] == before[1:]
    with pytest.raises(ChildProcessError):
        os.waitpid(-1, os.WNOHANG)
    assert Path("/proc/self/mountinfo").read_text().count("\n") >= mounts


@contextmanager
def newborn(jail: Jail, *argv: str) -> Iterator[process.Newborn]:
    child = process.spawn(jail, argv[0], argv)
    try:
        yield child
    finally:
        child.close()
        process.kill_and_wait(child.pidfd, DEADLINE_S)
        process.reap(child.pidfd)
        os.close(child.pidfd)


@contextmanager
def running(jail: Jail, *argv: str) -> Iterator[int]:
    """A program in its jail; gives its pid."""
    with newborn(jail, *argv) as child:
        child.release()
        child.executed()
        yield child.process.pid


def said(jail: Jail, *argv: str) -> tuple[int | None, str]:
    """A program's exit status and words, once it has ended."""
    with newborn(jail, *argv) as child:
        child.release()
        child.executed()
        assert select.select([child.pidfd], [], [], DEADLINE_S)[0]
        ended = process.reap(child.pidfd)
        assert ended is not None
    return ended.status, os.pread(jail.log, 65536, 0).decode()


def failure_of(jail: Jail, *argv: str) -> JailFailed:
    with newborn(jail, *argv) as child:
        child.release()
        assert select.select([child.fileno()], [], [], DEADLINE_S)[0]
        with pytest.raises(JailFailed) as raised:
            child.executed()
        return raised.value


def tree_of(pid: int) -> dict[str, os.stat_result]:
    """Everything below a process's root."""
    root = f"/proc/{pid}/root"
    found = {}
    for folder, directories, files in os.walk(root):
        for name in (*directories, *files):
            path = os.path.join(folder, name)
            found[path.removeprefix(root)] = os.lstat(path)
    return found


def mounts_of(pid: int) -> dict[str, tuple[set[str], str]]:
    """Each mount point's own flags and filesystem type (proc_pid_mountinfo(5))."""
    found = {}
    for line in Path(f"/proc/{pid}/mountinfo").read_text().splitlines():
        own, _, rest = line.partition(" - ")
        words = own.split()
        assert not any(word.startswith(("shared:", "master:")) for word in words[6:]), line
        found[words[4]] = (set(words[5].split(",")), rest.split()[0])
    return found


def field(pid: int, name: str) -> str:
    lines = Path(f"/proc/{pid}/status").read_text().split("\n")
    return next(line.partition(":")[2].strip() for line in lines if line.startswith(f"{name}:"))
