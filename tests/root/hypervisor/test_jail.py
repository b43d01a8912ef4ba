"""The jail around plain programs: what is inside, and what can't be reached."""

import errno
import fcntl
import os
import signal
import stat
import subprocess
import termios
from pathlib import Path
from typing import Any

import pytest
from attrs import evolve

from hypervisor import process
from hypervisor.errors import JailFailed
from hypervisor.jail import BootFile
from hypervisor.limits import ProcessLimits
from kvmsec.linux import keyrings, processes, syscalls
from kvmsec.linux.children import run_in_child
from kvmsec.linux.credentials import Credentials
from tests.root.hypervisor.jailed import (
    ADMINS,
    PROGRAMS,
    ROOT,
    SOMEBODY,
    Build,
    binds_of,
    failure_of,
    field,
    held_by,
    mounts_of,
    running,
    said,
    tree_of,
)

pytestmark = [pytest.mark.root, pytest.mark.usefixtures("the_launcher_is_as_before")]


# What is inside ----------------------------------------------------------------------


def test_the_tree_is_what_was_put_in_it_and_nothing_else(build: Build) -> None:
    firmware = os.memfd_create("firmware")
    os.write(firmware, b"code")
    jail = build(has_kvm=True, boot_files=(BootFile(firmware, 4, "firmware"),))
    with running(jail, "/bin/sleep", "60") as pid:
        tree = tree_of(pid)
        boot = Path(f"/proc/{pid}/root/boot/firmware").read_bytes()
    os.close(firmware)
    targets = [inside for _, inside in binds_of(*PROGRAMS)]
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
    plain = syscalls.detached_copy(str(tmp_path / "plain"))
    with running(evolve(build(), output=plain), "/bin/sleep", "60") as pid:
        os.close(plain)
        assert {"nosuid", "nodev", "noexec"} <= mounts_of(pid)["/output"][0]


@pytest.mark.parametrize("who", [SOMEBODY, ROOT])
def test_nothing_can_be_written_but_below_output(build: Build, who: Credentials) -> None:
    """Root's own files with no capability are still root's: only the mounts stand in the way."""
    binds = binds_of(*PROGRAMS, *ADMINS)
    with running(build(who, binds=binds), "/bin/sleep", "60") as pid:
        tree = tree_of(pid)
    directories = ["/", *(path for path, status in tree.items() if stat.S_ISDIR(status.st_mode))]
    files = [path for path, status in tree.items() if stat.S_ISREG(status.st_mode)]
    attempts = [f"/bin/touch {path.rstrip('/')}/new" for path in directories]
    attempts += [f"/bin/touch {path}" for path in files]
    script = "; ".join(f"({attempt}) 2>/output/words && echo {attempt}" for attempt in attempts)
    status, words = said(build(who, binds=binds), "/bin/sh", "-c", f"{script}; true")
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
    with pytest.raises(JailFailed, match=r"'files' failed: .*File exists"):
        build(binds=(*binds, (str(data), "/data")))


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


@pytest.mark.parametrize(("launchers", "its"), [("-500", "0"), ("-500", "5"), ("300", "70")])
def test_how_readily_it_is_killed_for_want_of_memory_is_not_the_launchers_affair(
    build: Build, launchers: str, its: str
) -> None:
    jail = build(limits=ProcessLimits(oom_score_adjust=int(its)))

    def start_it() -> str:
        try:
            Path("/proc/self/oom_score_adj").write_text(launchers)
        except PermissionError:  # Without CAP_SYS_RESOURCE nothing can be spared to begin with.
            return "not to be had"
        with running(jail, "/bin/sleep", "60") as pid:
            return Path(f"/proc/{pid}/oom_score_adj").read_text().strip()

    told = run_in_child(start_it, what="starting", timeout_s=20, keep=held_by(jail))
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
        start_with_a_terminal, what="starting", timeout_s=20, keep=held_by(jail)
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
        start_with_a_session, what="starting", timeout_s=20, keep=held_by(jail)
    )

    assert status == 0
    assert int(theirs) not in (own, -1)


def test_its_cgroups_are_joined_and_a_missing_one_is_an_error(build: Build, tmp_path: Path) -> None:
    (tmp_path / "cgroup.procs").touch()
    jail = build(cgroups=(str(tmp_path / "cgroup.procs"),))
    assert said(jail, "/bin/true")[0] == 0
    assert (tmp_path / "cgroup.procs").read_text() == "0"
    error = failure_of(
        evolve(jail, cell=evolve(jail.cell, cgroups=(str(tmp_path / "gone"),))), "/bin/true"
    )
    assert (error.step, error.errno) == ("cgroups", errno.ENOENT)
    assert not (tmp_path / "gone").exists()
