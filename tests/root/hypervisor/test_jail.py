"""The jail around plain programs: what is inside, what can't be reached, and how it fails."""

import ast
import errno
import fcntl
import os
import resource
import select
import signal
import socket
import stat
import struct
import subprocess
import sys
import termios
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from attrs import evolve
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from hypervisor import jail as jails
from hypervisor import process
from hypervisor.jail import BootFile, Jail, JailFailed
from kvmsec.linux import keyrings, namespaces, processes, syscalls
from kvmsec.linux.children import run_in_child
from kvmsec.linux.credentials import Credentials

pytestmark = pytest.mark.root

SOMEBODY = Credentials(239001, 239002)
ROOT = Credentials(0, 0)
DEADLINE_S = 10.0
PROGRAMS = ("/bin/sh", "/bin/sleep", "/usr/bin/env", "/bin/true", "/bin/ls", "/bin/cat")
ADMINS = ("/bin/mount", "/bin/mknod", "/bin/chown", "/bin/mkdir", "/bin/touch", "/bin/ln")

Build = Callable[..., Jail]


@cache
def binds_of(*programs: str) -> tuple[tuple[str, str], ...]:
    """The programs and their libraries, under the names that they are asked for by."""
    files = dict.fromkeys(programs)
    for program in programs:
        told = subprocess.run(["ldd", program], capture_output=True, text=True, check=True)
        files |= dict.fromkeys(word for word in told.stdout.split() if word.startswith("/"))
    return tuple((os.path.realpath(file), file) for file in files)


@pytest.fixture
def build(tmp_path: Path) -> Iterator[Build]:
    for name in ("root", "output"):
        (tmp_path / name).mkdir()
    opened: list[int] = []

    def build_jail(who: Credentials = SOMEBODY, **more: Any) -> Jail:
        owned = f"size=64k,mode=0700,uid={who.uid},gid={who.gid}"
        namespaces.mount("output", str(tmp_path / "output"), "tmpfs", 0, owned)
        flags = os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC
        opened.append(os.open(tmp_path / "output" / "log", flags, 0o600))
        wanted: dict[str, Any] = {"binds": binds_of(*PROGRAMS), **more}
        return Jail(
            name="inside",
            credentials=who,
            mount_point=str(tmp_path / "root"),
            output=str(tmp_path / "output"),
            log=opened[-1],
            **wanted,
        )

    yield build_jail
    for descriptor in opened:
        os.close(descriptor)
        namespaces.umount(str(tmp_path / "output"), namespaces.MNT_DETACH)


@pytest.fixture(autouse=True)
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


# What is inside ----------------------------------------------------------------------


def test_the_tree_is_what_was_put_in_it_and_nothing_else(build: Build) -> None:
    firmware = os.memfd_create("firmware")
    os.write(firmware, b"code")
    jail = build(has_kvm=True, boot_files=(BootFile(firmware, 4, "firmware"),))
    with running(jail, "/bin/sleep", "60") as pid:
        tree = tree_of(pid)
        boot = Path(f"/proc/{pid}/root/boot/firmware").read_bytes()
    os.close(firmware)
    targets = [inside for _, inside in jail.binds]
    above = {str(step) for target in targets for step in Path(target).parents} - {"/"}
    devices = {f"/dev/{name}" for name in ("null", "zero", "full", "random", "urandom", "kvm")}
    places = {"/dev", "/boot", "/output", "/boot/firmware", "/output/log"}
    assert set(tree) == {*targets, *above, *devices, *places}
    assert boot == b"code"
    for path in (*above, "/dev", "/boot"):
        assert (tree[path].st_uid, stat.S_IMODE(tree[path].st_mode)) == (0, 0o755), path
    assert stat.S_IMODE(tree["/boot/firmware"].st_mode) == 0o444
    kvm = tree["/dev/kvm"]
    assert stat.S_ISCHR(kvm.st_mode)
    assert (kvm.st_rdev, stat.S_IMODE(kvm.st_mode)) == (os.makedev(10, 232), 0o600)
    assert (kvm.st_uid, kvm.st_gid) == (SOMEBODY.uid, SOMEBODY.gid)


def test_all_is_read_only_but_the_output(build: Build) -> None:
    with running(build(), "/bin/sleep", "60") as pid:
        mounts = mounts_of(pid)
    output, kind = mounts.pop("/output")
    assert kind == "tmpfs"
    assert {"rw", "nosuid", "nodev", "noexec"} <= output
    devices, _ = mounts.pop("/dev")
    assert {"ro", "nosuid", "noexec"} <= devices
    root, _ = mounts["/"]
    assert "noexec" in root
    assert set(mounts) == {"/", *(inside for _, inside in binds_of(*PROGRAMS))}
    for place, (flags, _) in mounts.items():
        assert {"ro", "nosuid", "nodev"} <= flags, place


def test_an_output_that_is_a_plain_directory_is_restrained_as_well(
    build: Build, tmp_path: Path
) -> None:
    (tmp_path / "plain").mkdir()
    jail = evolve(build(), output=str(tmp_path / "plain"))
    with running(jail, "/bin/sleep", "60") as pid:
        assert {"nosuid", "nodev", "noexec"} <= mounts_of(pid)["/output"][0]


@pytest.mark.parametrize("who", [SOMEBODY, ROOT])
def test_nothing_can_be_written_but_below_output(build: Build, who: Credentials) -> None:
    """Root's own files with no capability are still root's: only the mounts stand in the way."""
    jail = build(who, binds=binds_of(*PROGRAMS, *ADMINS))
    with running(jail, "/bin/sleep", "60") as pid:
        tree = tree_of(pid)
    directories = ["/", *(path for path, status in tree.items() if stat.S_ISDIR(status.st_mode))]
    files = [path for path, status in tree.items() if stat.S_ISREG(status.st_mode)]
    attempts = [f"/bin/touch {path.rstrip('/')}/new" for path in directories]
    attempts += [f"/bin/touch {path}" for path in files]
    script = "; ".join(f"({attempt}) 2>/output/words && echo {attempt}" for attempt in attempts)
    status, words = said(jail, "/bin/sh", "-c", f"{script}; true")
    assert status == 0
    written = {line.split()[-1] for line in words.splitlines()}
    # The log is root's, as an instance's is that got it as a descriptor alone.
    assert written == {"/output/new"} | ({"/output/log"} if who == ROOT else set())


@pytest.mark.parametrize("who", [SOMEBODY, ROOT])
@pytest.mark.parametrize(
    "attempt",
    [
        "mount -t tmpfs x /output",
        "mount -o remount,rw /",
        "mount -o remount,rw,bind /dev",
        "mount --bind /bin /output",
        "mknod /output/sda b 8 0",
        "mknod /output/mem c 1 1",
        "chown 1:1 /output/file",
        "touch /dev/new",
    ],
)
def test_no_uid_can_change_the_tree(build: Build, who: Credentials, attempt: str) -> None:
    jail = build(who, binds=binds_of(*PROGRAMS, *ADMINS))
    script = f"touch /output/file; chown --version >/output/v || exit 99; {attempt}"
    status, words = said(jail, "/bin/sh", "-c", f"PATH=/bin; {script}")
    assert status not in (0, 99)
    refusals = ("denied", "not permitted", "Read-only", "must be superuser")
    assert any(refusal in words for refusal in refusals), words


def test_its_devices_can_be_used_and_not_changed(build: Build) -> None:
    script = "echo x >/dev/null && /bin/ls -l /dev/kvm; /bin/cat /bin/sh >/dev/full"
    status, words = said(build(has_kvm=True), "/bin/sh", "-c", script)
    assert status != 0
    assert "No space" in words
    assert words.startswith("crw-------")


@pytest.mark.parametrize("umask", [0o000, 0o022, 0o077])
def test_the_launchers_umask_changes_no_mode_inside(build: Build, umask: int) -> None:
    """A daemon with umask 077 would make directories that the instance can't enter."""
    firmware = os.open("/etc/hostname", os.O_RDONLY)
    size = os.fstat(firmware).st_size
    before = os.umask(umask)
    try:
        jail = build(boot_files=(BootFile(firmware, size, "firmware"),))
        status, words = said(jail, "/bin/cat", "/boot/firmware")
    finally:
        os.umask(before)
        os.close(firmware)
    assert (status, words) == (0, Path("/etc/hostname").read_text())


def test_a_bind_below_another_changes_nothing_on_the_node(build: Build, tmp_path: Path) -> None:
    data = tmp_path / "data"
    data.mkdir()
    (data / "file").write_text("old")
    os.utime(data / "file", (1, 1))
    before = (data / "file").stat(), data.stat()
    binds = (*binds_of(*PROGRAMS), (str(data), "/data"), ("/etc/hostname", "/data/file"))
    status, words = said(build(binds=binds), "/bin/cat", "/data/file")
    assert (status, words) == (0, Path("/etc/hostname").read_text())
    assert ((data / "file").stat().st_mtime_ns, data.stat().st_mtime_ns) == (
        before[0].st_mtime_ns,
        before[1].st_mtime_ns,
    )
    assert (
        failure_of(build(binds=(*binds, (str(data), "/data"))), "/bin/true").errno == errno.EEXIST
    )


@pytest.mark.parametrize("name", ["", ".", "..", "../x", "/etc/x", "a/b"])
def test_a_boot_file_has_a_plain_name(name: str) -> None:
    with pytest.raises(ValueError, match="is no name of a file"):
        BootFile(0, 1, name)


# What the process is -----------------------------------------------------------------


@pytest.mark.parametrize("who", [SOMEBODY, ROOT])
def test_the_kernel_says_that_nothing_is_left_of_root(build: Build, who: Credentials) -> None:
    os.setgroups([0, 4])
    try:
        with running(build(who), "/bin/sleep", "60") as pid:
            status = processes.read_status(pid)
            umask = field(pid, "Umask")
            limits = Path(f"/proc/{pid}/limits").read_text()
            environment = Path(f"/proc/{pid}/environ").read_bytes()
            shared = process._shared_namespaces(pid)
            terminal = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[4]
            session = os.getsid(pid)
            innermost = field(pid, "NSpid").split()[-1]
    finally:
        os.setgroups([])
    assert status is not None
    assert (status.uids, status.gids) == ((who.uid,) * 4, (who.gid,) * 4)
    assert (status.groups, status.capabilities) == ((), (0,) * 5)
    assert status.no_new_privs
    assert umask == "0077"
    assert next(line for line in limits.split("\n") if "core" in line).split()[4:6] == ["1", "1"]
    assert environment == b"PATH=/usr/bin\0LC_ALL=C\0"
    assert (shared, terminal, session, innermost) == ([], "0", pid, "1")


def test_it_keeps_no_signal_handling_of_the_launchers(build: Build) -> None:
    ignored = (signal.SIGCHLD, signal.SIGUSR1, signal.SIGRTMIN)
    before = {number: signal.signal(number, signal.SIG_IGN) for number in ignored}
    signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGTERM, signal.SIGHUP])
    try:
        with running(build(), "/bin/sleep", "60") as pid:
            masks = [int(field(pid, name), 16) for name in ("SigBlk", "SigIgn", "SigCgt")]
    finally:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, [signal.SIGTERM, signal.SIGHUP])
        for number, handler in before.items():
            signal.signal(number, handler)
    assert masks == [0, 0, 0]


@pytest.mark.parametrize(("launchers", "its"), [("-500", "0"), ("300", "300")])
def test_it_is_no_harder_to_kill_for_want_of_memory_than_others(
    build: Build, launchers: str, its: str
) -> None:
    jail = build()

    def start_it() -> str:
        try:
            Path("/proc/self/oom_score_adj").write_text(launchers)
        except PermissionError:  # Without CAP_SYS_RESOURCE nothing can be spared to begin with.
            return "not to be had"
        with running(jail, "/bin/sleep", "60") as pid:
            return Path(f"/proc/{pid}/oom_score_adj").read_text().strip()

    told = run_in_child(start_it, what="starting", timeout_s=20, keep=[jail.log])
    assert told in (its, "not to be had")


def test_the_launchers_terminal_is_not_its(build: Build) -> None:
    jail = build()

    def start_with_a_terminal() -> Any:
        primary, terminal = os.openpty()
        fcntl.ioctl(terminal, termios.TIOCSCTTY, 0)
        for number in (0, 1, 2):
            os.dup2(terminal, number)
        with running(jail, "/bin/sleep", "60") as pid:
            numbers = [
                Path(f"/proc/{each}/stat").read_text().rpartition(")")[2].split()[4]
                for each in ("self", pid)
            ]
            held = [os.readlink(f"/proc/{pid}/fd/{number}") for number in (0, 1, 2)]
        return [primary, numbers, held]

    _, (launchers, its), held = run_in_child(
        start_with_a_terminal, what="starting", timeout_s=20, keep=[jail.log]
    )
    assert launchers != "0"
    assert its == "0"
    assert held == ["/dev/null", *[os.readlink(f"/proc/self/fd/{jail.log}")] * 2]


def test_the_launchers_session_keyring_is_not_its(build: Build) -> None:
    """What an admin's login left in it could be read by whoever possesses it."""
    if not Path("/proc/keys").exists():
        pytest.skip("this kernel has no keys")
    jail = build(binds=binds_of("/usr/bin/perl"))
    # keyctl(KEYCTL_GET_KEYRING_ID, KEY_SPEC_SESSION_KEYRING, 0)
    ask = ("/usr/bin/perl", "-e", "print syscall(250, 0, -3, 0)")

    def start_with_a_session() -> Any:
        keyrings.join_new_session()
        own = subprocess.run(ask, capture_output=True, text=True, check=True).stdout
        return [int(own), said(jail, *ask)]

    own, (status, theirs) = run_in_child(
        start_with_a_session, what="starting", timeout_s=20, keep=[jail.log]
    )

    assert status == 0
    assert int(theirs) not in (own, -1)


def test_its_cgroups_are_joined_and_a_missing_one_is_an_error(build: Build, tmp_path: Path) -> None:
    (tmp_path / "cgroup.procs").touch()
    jail = build(cgroups=(str(tmp_path / "cgroup.procs"),))
    assert said(jail, "/bin/true")[0] == 0
    assert (tmp_path / "cgroup.procs").read_text() == "0"
    error = failure_of(evolve(jail, cgroups=(str(tmp_path / "gone"),)), "/bin/true")
    assert (error.step, error.errno) == ("cgroups", errno.ENOENT)
    assert not (tmp_path / "gone").exists()


# Descriptors -------------------------------------------------------------------------


def test_exactly_the_granted_descriptors_arrive(build: Build, tmp_path: Path) -> None:
    left, right = socket.socketpair()
    lock = os.open(tmp_path / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC)
    fcntl.flock(lock, fcntl.LOCK_EX)
    leaked = os.open("/etc/passwd", os.O_RDONLY)
    grants = [os.open(name, os.O_RDONLY | os.O_CLOEXEC) for name in ("/etc/hostname", "/etc/hosts")]
    for descriptor in (left.fileno(), leaked, *grants):
        os.set_inheritable(descriptor, True)
    jail = build(descriptors={3: grants[1], 4: grants[0], 7: grants[0]})
    try:
        with running(jail, "/bin/sleep", "60") as pid:
            held = {
                int(name): os.stat(f"/proc/{pid}/fd/{name}")[1:3]
                for name in os.listdir(f"/proc/{pid}/fd")
            }
    finally:
        wanted = {
            3: os.fstat(grants[1])[1:3],
            4: os.fstat(grants[0])[1:3],
            7: os.fstat(grants[0])[1:3],
            1: os.fstat(jail.log)[1:3],
            2: os.fstat(jail.log)[1:3],
        }
        for descriptor in (lock, leaked, *grants):
            os.close(descriptor)
        left.close()
        right.close()
    del held[0]
    assert held == wanted


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(st.dictionaries(st.integers(3, 14), st.integers(3, 14), max_size=10), st.integers(1, 14))
def test_descriptors_come_to_their_numbers_however_these_overlap(
    wanted: dict[int, int], log: int
) -> None:
    """Inside number -> the launcher's number, both from the same few."""

    def place() -> Any:
        for number in {*wanted.values(), log}:
            opened = os.memfd_create(f"file-{number}")
            os.dup2(opened, number)
        files = {
            number: os.readlink(f"/proc/self/fd/{number}") for number in {*wanted.values(), log}
        }
        jail = Jail(
            name="x",
            credentials=SOMEBODY,
            mount_point="",
            output="",
            log=log,
            binds=(),
            descriptors=wanted,
        )
        jails._place_descriptors(jail)
        kept = {}
        for name in os.listdir("/proc/self/fd"):
            if os.path.exists(f"/proc/self/fd/{name}") and os.get_inheritable(int(name)):
                kept[int(name)] = os.readlink(f"/proc/self/fd/{name}")
        expected = {0: "/dev/null", 1: files[log], 2: files[log]}
        expected |= {inside: files[ours] for inside, ours in wanted.items()}
        return [sorted(kept.items()), sorted(expected.items())]

    reader, writer = os.pipe()
    pid = os.fork()
    if pid == 0:
        try:
            say = fcntl.fcntl(writer, fcntl.F_DUPFD_CLOEXEC, 50)
            os.write(say, repr(place()).encode())
        finally:
            os._exit(0)
    os.close(writer)
    told = os.read(reader, 65536)
    os.close(reader)
    os.waitpid(pid, 0)
    kept, expected = ast.literal_eval(told.decode())
    assert kept == expected


@contextmanager
def descriptor_limit(soft: int) -> Iterator[None]:
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (soft, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, before)


def test_a_launcher_with_many_descriptors_can_start_one(build: Build) -> None:
    if resource.getrlimit(resource.RLIMIT_NOFILE)[1] < 1400:
        pytest.skip("this process may not open enough descriptors")
    granted = os.open("/etc/hostname", os.O_RDONLY)
    with descriptor_limit(1400):
        many = [os.open("/dev/null", os.O_RDONLY) for _ in range(1200)]
        high = os.dup(granted)
        try:
            jail = build(descriptors={3: high})
            assert high > 1023
            with running(jail, "/bin/sleep", "60") as pid:
                assert sorted(map(int, os.listdir(f"/proc/{pid}/fd"))) == [0, 1, 2, 3]
        finally:
            for descriptor in (*many, high, granted):
                os.close(descriptor)


def test_too_few_descriptors_are_an_error_that_leaves_nothing(build: Build) -> None:
    jail = build()
    lowest_free = os.dup(0)
    os.close(lowest_free)
    failures = 0
    for limit in range(lowest_free, lowest_free + 200):
        before = set(os.listdir("/proc/self/fd"))
        with descriptor_limit(limit):
            try:
                child = process.spawn(jail, "/bin/true", ["true"])
            except OSError as error:
                assert error.errno == errno.EMFILE
                failures += 1
                child = None
            if child is not None:
                child.release()
                child.executed()
                process.kill_and_wait(child.pidfd, DEADLINE_S)
                process.reap(child.pidfd)
                child.close()
                os.close(child.pidfd)
        assert set(os.listdir("/proc/self/fd")) == before
        with pytest.raises(ChildProcessError):
            os.waitpid(-1, os.WNOHANG)
        if child is not None:
            break
    else:
        pytest.fail("it never succeeded")
    assert failures > 3


# Failures ----------------------------------------------------------------------------


def test_a_missing_file_is_told_with_its_step_and_number(build: Build) -> None:
    binds = (*binds_of(*PROGRAMS), ("/nowhere/library.so", "/lib/library.so"))
    error = failure_of(build(binds=binds), "/bin/true")
    assert (error.step, error.errno) == ("programs", errno.ENOENT)
    assert "/nowhere/library.so" in error.message


def test_a_boot_file_that_shrinks_is_told(build: Build) -> None:
    firmware = os.memfd_create("firmware")
    os.write(firmware, b"x" * 1000)
    jail = build(boot_files=(BootFile(firmware, 5000, "firmware"),))
    error = failure_of(jail, "/bin/true")
    os.close(firmware)
    assert (error.step, error.errno) == ("boot files", errno.ENODATA)
    assert "firmware became shorter" in error.message


def test_a_boot_file_that_grows_is_copied_as_long_as_it_was(build: Build) -> None:
    firmware = os.memfd_create("firmware")
    os.write(firmware, b"x" * 9000)
    jail = build(boot_files=(BootFile(firmware, 5000, "firmware"),))
    assert said(jail, "/bin/cat", "/boot/firmware") == (0, "x" * 5000)
    os.close(firmware)


def test_a_missing_mount_point_or_output_is_told(build: Build) -> None:
    jail = build()
    error = failure_of(evolve(jail, mount_point="/nowhere"), "/bin/true")
    assert (error.step, error.errno) == ("root", errno.ENOENT)
    error = failure_of(evolve(jail, output="/nowhere"), "/bin/true")
    assert (error.step, error.errno) == ("output", errno.ENOENT)


def test_a_host_name_that_is_too_long_is_told(build: Build) -> None:
    error = failure_of(evolve(build(), name="x" * 65), "/bin/true")
    assert error.step == "host name"


@pytest.mark.parametrize(
    ("program", "number"),
    [("/bin/missing", errno.ENOENT), ("/data", errno.EACCES), ("/text", errno.ENOEXEC)],
)
def test_a_program_that_cannot_be_executed_is_told(
    build: Build, tmp_path: Path, program: str, number: int
) -> None:
    (tmp_path / "data").write_text("data")
    (tmp_path / "text").write_text("text")
    (tmp_path / "data").chmod(0o644)
    (tmp_path / "text").chmod(0o755)
    extra = tuple((str(tmp_path / name), f"/{name}") for name in ("data", "text"))
    error = failure_of(build(binds=(*binds_of(*PROGRAMS), *extra)), program)
    assert (error.step, error.errno) == ("exec", number)


def test_one_that_is_killed_before_it_is_released_is_never_taken_for_started(
    build: Build,
) -> None:
    jail = build()
    for delay_ms in range(12):
        with newborn(jail, "/bin/sleep", "60") as child:
            time.sleep(delay_ms / 1000)
            processes.kill(child.pidfd)
            child.release()
            with pytest.raises(JailFailed, match="killed before it could start"):
                child.executed()


def test_a_program_that_ends_at_once_was_started_all_the_same(build: Build) -> None:
    with newborn(build(), "/bin/true") as child:
        child.release()
        assert select.select([child.pidfd], [], [], DEADLINE_S)[0]
        child.executed()
        assert process.reap(child.pidfd) == process.Ended(0, None)


def test_one_that_is_not_released_ends_when_its_launcher_lets_go(build: Build) -> None:
    with newborn(build(), "/bin/sleep", "60") as child:
        child.close()
        assert select.select([child.pidfd], [], [], DEADLINE_S)[0]
        assert process.reap(child.pidfd) == process.Ended(125, None)


@pytest.mark.parametrize("after_ms", [0, 1, 2, 4, 8, 30])
def test_a_launcher_that_is_killed_before_the_release_leaves_no_process(
    build: Build, after_ms: int
) -> None:
    jail = build()
    reader, writer = os.pipe()
    launcher = os.fork()
    if launcher == 0:
        try:
            os.close(reader)
            child = process.spawn(jail, "/bin/sleep", ["sleep", "60"])
            os.write(writer, struct.pack("i", child.process.pid))
            signal.pause()
        finally:
            os._exit(1)
    os.close(writer)
    with _orphans_come_here():
        pid = struct.unpack("i", os.read(reader, 4))[0]
        os.close(reader)
        pidfd = os.pidfd_open(pid)
        time.sleep(after_ms / 1000)
        os.kill(launcher, signal.SIGKILL)
        os.waitpid(launcher, 0)
        assert select.select([pidfd], [], [], DEADLINE_S)[0], "the child is still there"
        assert process.reap(pidfd) == process.Ended(125, None)
        os.close(pidfd)


@contextmanager
def _orphans_come_here() -> Iterator[None]:
    set_child_subreaper = 36  # linux/include/uapi/linux/prctl.h
    syscalls.prctl(set_child_subreaper, 1)
    try:
        yield
    finally:
        syscalls.prctl(set_child_subreaper, 0)


def test_a_launcher_that_ignores_its_children_is_told_what_failed(build: Build) -> None:
    jail = build(binds=(("/nowhere", "/nowhere"),))
    before = signal.signal(signal.SIGCHLD, signal.SIG_IGN)
    try:
        for _ in range(10):
            with pytest.raises(JailFailed, match="programs"):
                child = process.spawn(jail, "/bin/true", ["true"])
                child.release()
                try:
                    child.executed()
                finally:
                    process.kill_and_wait(child.pidfd, DEADLINE_S)
                    assert process.reap(child.pidfd) is None
                    child.close()
                    os.close(child.pidfd)
    finally:
        signal.signal(signal.SIGCHLD, before)


def test_a_later_child_of_the_launchers_is_born_outside(build: Build) -> None:
    with running(build(), "/bin/sleep", "60"):
        told = subprocess.run(
            [sys.executable, "-c", "import os; print(os.readlink('/proc/self/ns/pid'))"],
            capture_output=True,
            text=True,
            check=True,
        )
    assert told.stdout.strip() == os.readlink("/proc/self/ns/pid")


def test_every_process_inside_ends_with_the_first(build: Build) -> None:
    with newborn(build(), "/bin/sh", "-c", "/bin/sleep 60 & /bin/sleep 60 & wait") as child:
        child.release()
        child.executed()
        inside = os.readlink(f"/proc/{child.process.pid}/ns/pid")
        deadline = time.monotonic() + DEADLINE_S
        while len(_processes_in(inside)) < 3 and time.monotonic() < deadline:
            os.sched_yield()
        assert len(_processes_in(inside)) == 3
        assert process.kill_and_wait(child.pidfd, DEADLINE_S)
        assert process.reap(child.pidfd) == process.Ended(None, signal.SIGKILL)
        assert _processes_in(inside) == []


def _processes_in(namespace: str) -> list[int]:
    found = []
    for pid in processes.pids():
        try:
            if os.readlink(f"/proc/{pid}/ns/pid") == namespace:
                found.append(pid)
        except (FileNotFoundError, ProcessLookupError):
            continue
    return found
