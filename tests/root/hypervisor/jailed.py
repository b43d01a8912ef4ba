"""Plain programs in a jail, and how they are looked at from outside."""

import contextlib
import os
import resource
import select
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from attrs import evolve

from hypervisor import process
from hypervisor.closure import Binds, Closure
from hypervisor.errors import JailFailed
from hypervisor.identity import FileIdentity
from hypervisor.jail import Cell, Jail
from hypervisor.limits import ProcessLimits
from hypervisor.newborn import Newborn, spawn
from hypervisor.nursery import Nursery
from hypervisor.tree import Trees
from kvmsec.linux import namespaces, syscalls
from kvmsec.linux.credentials import Credentials
from kvmsec.linux.readiness import is_readable

SOMEBODY = Credentials(239001, 239002)
ROOT = Credentials(0, 0)
DEADLINE_S = 10.0
PROGRAMS = ("/bin/sh", "/bin/sleep", "/usr/bin/env", "/bin/true", "/bin/ls", "/bin/cat")
ADMINS = ("/bin/mount", "/bin/mknod", "/bin/chown", "/bin/mkdir", "/bin/touch", "/bin/ln")

UNASKED = ProcessLimits()
OF_CELL = {"cgroups", "without_locks"}

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
        limits: ProcessLimits = UNASKED,
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
        of_cell = {name: wanted.pop(name) for name in OF_CELL & wanted.keys()}
        return Jail(
            Cell(tree, limits=evolve(limits, file_bytes=None), **of_cell),
            name="inside",
            credentials=who,
            output=opened[-1],
            log=log,
            file_bytes=limits.file_bytes or 0,
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
    return [jail.cell.tree, jail.output, jail.log]


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
def newborn(jail: Jail, *argv: str) -> Iterator[Newborn]:
    child = spawn(jail, argv[0], argv)
    try:
        yield child
    finally:
        end(child)


@pytest.fixture
def nursery() -> Iterator[Nursery]:
    """One that has not begun; afterwards no child may be left, not even a dead one."""
    made = Nursery()
    yield made
    made.close()
    left = children_of(os.getpid())
    for pid in left:
        assert pid > 0, left  # A number that kill(2) takes for a group of processes.
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
    assert not left


def nursery_pid(nursery: Nursery) -> int:
    assert nursery._child is not None
    return nursery._child.pid


def spares_of(nursery: Nursery) -> list[int]:
    """Those that were made and have not ended, in their order: used ones too."""
    assert nursery._orders is not None
    nursery._hear_of_spares(nursery._orders)
    return [spare.pid for spare in nursery._spares]


def wait_for_spare(nursery: Nursery) -> list[int]:
    """Once there is any that has not ended."""
    wait_until(lambda: bool(spares_of(nursery)))
    return spares_of(nursery)


def others_than(nursery: Nursery) -> list[int]:
    """This process's children but the nursery and its spares."""
    own = {nursery_pid(nursery), *spares_of(nursery)}
    return [pid for pid in children_of(os.getpid()) if pid not in own]


def children_of(pid: int) -> list[int]:
    """Its children, zombies too; a process that is gone has none."""
    try:
        return list(map(int, Path(f"/proc/{pid}/task/{pid}/children").read_text().split()))
    except (FileNotFoundError, ProcessLookupError):
        return []


def held_files(pid: int) -> dict[str, str]:
    """What each of a process's descriptors stands for, by its number."""
    found = {}
    for name in os.listdir(f"/proc/{pid}/fd"):
        with contextlib.suppress(FileNotFoundError):
            found[name] = os.readlink(f"/proc/{pid}/fd/{name}")
    return found


def wait_until(is_so: Callable[[], bool]) -> None:
    """Look again for a while: what a child does is seen a moment later."""
    deadline = time.monotonic() + DEADLINE_S
    while not is_so():
        assert time.monotonic() < deadline, "it never came"
        time.sleep(0.001)


def is_asleep(pid: int) -> bool:
    """Whether it is /bin/sleep, which has loaded its libraries."""
    nanosleep = "230"  # clock_nanosleep; linux/arch/x86/entry/syscalls/syscall_64.tbl
    return Path(f"/proc/{pid}/syscall").read_text().split()[0] == nanosleep


@contextmanager
def born(nursery: Nursery, jail: Jail, *argv: str, group: str | None = None) -> Iterator[Newborn]:
    """As `newborn`, of a nursery's making."""
    child = heard(asked(nursery, jail, group))
    try:
        child.become(jail, argv[0], argv)
        yield child
    finally:
        end(child)


def asked(nursery: Nursery, jail: Jail, group: str | None = None) -> Newborn:
    """One that is to shut itself in as far as the jail's cell."""
    child = nursery.birth(group)
    try:
        child.enter(jail.cell)
    except BaseException:
        child.close()
        raise
    return child


def heard(child: Newborn) -> Newborn:
    """One that was asked for, once it is there."""
    try:
        assert is_readable(child.line.fileno(), DEADLINE_S)
        child.hear()
    except BaseException:
        child.close()
        raise
    return child


def end(child: Newborn) -> None:
    """End one that was heard of, and free all that belongs to it."""
    child.close()
    process.kill_and_wait(child.pidfd, DEADLINE_S)
    process.reap(child.pidfd)
    os.close(child.pidfd)


@contextmanager
def descriptor_limit(soft: int) -> Iterator[None]:
    """How many descriptors this process may have."""
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (soft, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, before)


@contextmanager
def orphans_come_here() -> Iterator[None]:
    """This process is the parent of what its children leave behind."""
    set_child_subreaper = 36  # linux/include/uapi/linux/prctl.h
    syscalls.prctl(set_child_subreaper, 1)
    try:
        yield
    finally:
        syscalls.prctl(set_child_subreaper, 0)


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


def execute(child: Newborn) -> None:
    """Have one that was told what to become execute it."""
    child.release()
    assert is_readable(child.fileno(), DEADLINE_S)
    child.executed()


def status_of_end(child: Newborn) -> process.Ended | None:
    assert select.select([child.pidfd], [], [], DEADLINE_S)[0]
    return process.reap(child.pidfd)


def kill(pid: int) -> None:
    """Kill a child of this process's, and return when it is dead; it isn't reaped."""
    os.kill(pid, signal.SIGKILL)
    os.waitid(os.P_PID, pid, os.WEXITED | os.WNOWAIT)


def kill_spares(nursery: Nursery) -> None:
    for pid in wait_for_spare(nursery):
        kill(pid)
